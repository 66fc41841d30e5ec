"""Report to a consumer that got nothing for a while which changes it missed, by a gap message.

For each consumer of the store that the leader does not feed, it notes the LSN at which feeding stopped. When a session
feeds the consumer again, a gap message is sent to that consumer alone, before anything else. For example, a standby
led for an hour with an older file, which lacks the consumer. This module never reports a gap to a consumer that was
fed, nor to one that begins only now.
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

# A consumer with `start: snapshot` has missed nothing before the first bridge that has it in its file, because the
# snapshot reads all rows then.
_KNOWN: Final = """
    select id, name, snapshot_at is null and config ->> 'start' = 'snapshot' from consumers order by id
"""
_UNKNOWN: Final = 0  # the LSN at which feeding stopped, in notes of a version that did not keep it


@dataclass(slots=True, frozen=True)
class Known:
    """A consumer of the store.

    Attributes:
        to_begin: The consumer has `start: snapshot`, and no bridge has begun that snapshot yet.
    """

    id: int
    name: str
    to_begin: bool


def tell_missed(store: BridgeStore, fed: Collection[str]) -> dict[str, str]:
    """Append a gap message for each consumer that is fed again, and return the notes on those that are not fed.

    Call it while holding the lead, and store.set_feeds() after it. The commit of a gap message also removes that gap
    from the notes. The gap is therefore reported once, even if the process is killed between the two calls.

    Args:
        store: The bridge's session on the store.
        fed: The names of the consumers that the bridge is going to feed.

    Returns:
        The notes for Feeds.unfed.
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
    """Return the LSN since which each consumer got nothing, by its id.

    A consumer that was removed and added again under its name has another id, and has missed nothing.
    """
    if before is None:
        return {}
    if before.unfed is not None:
        return {int(consumer_id): parse_lsn(lsn) for consumer_id, lsn in before.unfed.items()}
    silent = {name for name, feed in before.consumers.items() if feed.state in ("not_in_file", "refused")}
    return {c.id: _UNKNOWN for c in consumers if c.name in silent and not c.to_begin}


def unfed_now(
    before: Feeds | None, consumers: Sequence[Known], stopped: Mapping[int, int], fed: Collection[str], end: int
) -> dict[str, str]:
    """Return the notes for Feeds.unfed.

    The LSN at which feeding stopped is kept from earlier notes, unless the log's end has moved back before it.
    """
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
    since = "" if first != _UNKNOWN else ". An older version did not note the place"
    return f"the bridge ({before.holder}) did not feed the consumer: {why}{since}"
