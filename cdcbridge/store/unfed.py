"""The gap of a consumer that got nothing for a while: since where, and the message that tells it. Part of the rim.

The leader notes for each consumer of the store that it does not feed, where feeding it stopped. When a session feeds
the consumer again, that consumer alone gets a gap message first. For example, a stand-by with an older file led for an
hour. Never tells a gap to a consumer that was fed, nor to one that begins only now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cdcbridge.database import store_errors
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.store.feed_watch import stored_feeds
from cdcbridge.store.feeds import Feeds
from cdcbridge.store.gap import leave_gap
from cdcbridge.store.log import BridgeStore, log_end

# What `start: snapshot` reads when a bridge first has the consumer in its file makes up for everything before.
_KNOWN: Final = """
    select id, name, snapshot_at is null and config ->> 'start' = 'snapshot' from consumers order by id
"""
_UNKNOWN: Final = 0  # where feeding stopped, in the notes of a version that did not keep it


@dataclass(slots=True, frozen=True)
class Known:
    """A consumer of the store.

    to_begin: it has `start: snapshot`, and no bridge has begun with that yet.
    """

    id: int
    name: str
    to_begin: bool


def tell_missed(store: BridgeStore, fed: Collection[str]) -> dict[str, str]:
    """Leave a gap message to each consumer that is fed again, and give what is to be noted of those that are not.

    Call with the lead taken, and store.set_feeds() after it. The commit of a message takes its gap out of the notes, so
    that a process that is killed between the two tells it once.

    fed: the names of the consumers that the session feeds.
    """
    before, end = stored_feeds(store.connection), log_end(store.connection)
    with store_errors():
        consumers = [Known(*row) for row in store.connection.execute(_KNOWN).fetchall()]
    stopped = unfed_before(before, consumers)
    for consumer in consumers:
        first = stopped.get(consumer.id, end)
        if before is not None and consumer.name in fed and first < end:
            why = _reason(before, consumer.name, first)
            leave_gap(store, first, end, go_on=end, reason=why, consumer=consumer.name)
    return unfed_now(before, consumers, stopped, fed, end)


def unfed_before(before: Feeds | None, consumers: Sequence[Known]) -> dict[int, int]:
    """Tell since which LSN each consumer got nothing, by its id: one that was made anew under its name got no less."""
    if before is None:
        return {}
    if before.unfed is not None:
        return {int(consumer_id): parse_lsn(lsn) for consumer_id, lsn in before.unfed.items()}
    silent = {name for name, feed in before.consumers.items() if feed.state in ("not_in_file", "refused")}
    return {c.id: _UNKNOWN for c in consumers if c.name in silent and not c.to_begin}


def unfed_now(
    before: Feeds | None, consumers: Sequence[Known], stopped: Mapping[int, int], fed: Collection[str], end: int
) -> dict[str, str]:
    """Give what Feeds.unfed keeps: an older stop is carried over, unless the log's end has gone back behind it."""
    kept = {}
    for consumer in consumers:
        feed = None if before is None else before.of(consumer.name)
        was_fed = feed is not None and feed.state in ("fed", "as_before")
        begins_later = consumer.to_begin and consumer.id not in stopped and not was_fed
        if consumer.name not in fed and not begins_later:
            kept[str(consumer.id)] = format_lsn(min(stopped.get(consumer.id, end), end))
    return kept


def _reason(before: Feeds, name: str, first: int) -> str:
    feed = before.of(name)
    lacking = feed is None or feed.state == "not_in_file"
    why = f"its file {before.file} lacked it" if lacking or feed is None else feed.reason
    since = "" if first != _UNKNOWN else ". An older version did not note since where"
    return f"the bridge ({before.holder}) did not feed the consumer: {why}{since}"
