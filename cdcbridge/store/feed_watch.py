"""Read the leader's notes on the consumers that it feeds (store/feeds.py), and wait for new ones.

Never changes anything.
"""

from __future__ import annotations

import time
from typing import Final

from cdcbridge.database import Connection, store_errors
from cdcbridge.store.feeds import Feeds, load

PATIENCE: Final = 10.0  # seconds in which a running bridge should begin to use changed consumers
_LOOK_INTERVAL: Final = 0.1
_LEADS: Final = "select count(*) from advisory_holders('leaders'::regclass, 0, 2)"


def stored_feeds(connection: Connection) -> Feeds | None:
    """Return the notes that the leader wrote last, or None before a bridge has begun for the first time."""
    with store_errors():
        # As JSON, because a store of an older version lacks the column `feeds`.
        row = connection.execute("select to_jsonb(s) -> 'feeds' from source s").fetchone()
    return load(row[0]) if row else None


def bridge_runs(connection: Connection) -> bool:
    """Return whether a bridge leads on this store now."""
    with store_errors():
        return connection.execute(_LEADS).fetchone() != (0,)


def await_feeds(connection: Connection, patience: float = PATIENCE) -> tuple[bool, Feeds | None]:
    """Wait until the running bridge uses the newest change of consumers.

    Args:
        connection: A session on the store.
        patience: Seconds to wait.

    Returns:
        Whether the bridge uses the newest change, and the last notes of the leader.
    """
    with store_errors():
        row = connection.execute("select coalesce(max(epoch), 0) from leaders").fetchone()
    newest, deadline = row[0] if row else 0, time.monotonic() + patience
    while True:
        feeds = stored_feeds(connection)
        if feeds is not None and feeds.epoch >= newest:
            return True, feeds
        if time.monotonic() > deadline:
            return False, feeds
        time.sleep(_LOOK_INTERVAL)
