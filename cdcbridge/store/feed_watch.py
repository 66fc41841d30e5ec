"""What the store says about which consumers the bridge feeds. Part of the rim; changes nothing."""

from __future__ import annotations

import time
from typing import Final

from cdcbridge.database import Connection, store_errors
from cdcbridge.store.feeds import Feeds, load

PATIENCE: Final = 10.0  # seconds that a running bridge gets to take changed consumers up
_LOOK_INTERVAL: Final = 0.1
_LEADS: Final = "select count(*) from advisory_holders('leaders'::regclass, 0, 2)"


def stored_feeds(connection: Connection) -> Feeds | None:
    """What the leader wrote last; None before the first session of a bridge."""
    with store_errors():
        # A store of an older version has no such column.
        row = connection.execute("select to_jsonb(s) -> 'feeds' from source s").fetchone()
    return load(row[0]) if row else None


def bridge_runs(connection: Connection) -> bool:
    """Whether a bridge leads on this store now."""
    with store_errors():
        return connection.execute(_LEADS).fetchone() != (0,)


def await_feeds(connection: Connection, patience: float = PATIENCE) -> tuple[bool, Feeds | None]:
    """Wait until the running bridge has taken up the newest change of consumers; whether it has, and what it feeds."""
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
