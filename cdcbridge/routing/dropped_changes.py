"""Keep account, by table, of the changes that wal2json drops because the table has no replica identity.

wal2json leaves out an UPDATE or DELETE of a table without a key, and sends a warning in its place. The first such
warning opens a gap: a message to the consumers of that table reports where it begins, and all other changes continue. A
session that finds the table with an identity again closes the gap with a second message. Each message is stored in one
commit with the list of gaps and the position. The module is pure. It never decides that a change may be dropped: the
change is missing already, and its gap is reported once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from cdcbridge.changes.events import Begin
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.batch import ROW_OVERHEAD, AppendBatch
from cdcbridge.routing.copy_format import GAP_TOPIC, message_row, shared_part
from cdcbridge.routing.subscription import Subscription

_KEY = "missing"


@dataclass(slots=True, frozen=True)
class Gap:
    """A gap in the changes of one table.

    Attributes:
        first: The commit LSN of the first transaction of which a change is missing.
        last: The LSN before which all transactions with missing changes committed. None: the gap is open.
    """

    first: int
    last: int | None = None


class Missing:
    """The newest gap of each table, for example that of `public.scratch`."""

    def __init__(self, stored: dict[str, Any] | None = None) -> None:
        """Begin with the gaps that `dump()` wrote, if there are any."""
        self._gaps = {topic: Gap(*ends) for topic, ends in (stored or {}).get(_KEY, {}).items()}

    def dump(self) -> dict[str, Any]:
        """Return the gaps as JSON for the store.

        The constructor reads it.
        """
        return {_KEY: {topic: [gap.first, gap.last] for topic, gap in self._gaps.items()}}

    def tells(self, topic: str, commit_lsn: int) -> bool:
        """Return whether a gap message covers changes of this table in the transaction that commits at `commit_lsn`."""
        gap = self._gaps.get(topic)
        return gap is not None and (gap.last is None or commit_lsn < gap.last)

    def open(self, topic: str, commit_lsn: int) -> int:
        """Begin a gap, and return its number among the gaps that begin with this transaction, from 0 on."""
        number = sum(gap.first == commit_lsn for other, gap in self._gaps.items() if other != topic)
        self._gaps[topic] = Gap(commit_lsn)
        return number

    def ended(self, unidentified: Collection[str]) -> list[str]:
        """Return the tables with an open gap that have an identity again, or were dropped.

        Args:
            unidentified: The tables that have no identity now.
        """
        return [topic for topic, gap in self._gaps.items() if gap.last is None and topic not in unidentified]

    def close(self, topic: str, last: int) -> Gap:
        """End the open gap of a table, and return it."""
        gap = self._gaps[topic] = Gap(self._gaps[topic].first, last)
        return gap


def opening(topic: str, commit_lsn: int) -> dict[str, Any]:
    """Return the record of the message that begins a gap."""
    reason = (
        f"updates and deletes of {topic} are missing from here on, because it has no replica identity. Another gap"
        " message reports the end"
    )
    return {"from": format_lsn(commit_lsn), "to": None, "table": topic, "reason": reason}


def closing(topic: str) -> str:
    """Return the reason in the message that ends a gap."""
    return f"updates and deletes of {topic} between the two are missing, because it had no replica identity"


def add_gap(
    batch: AppendBatch, begin: Begin, takers: Sequence[Subscription], record: dict[str, Any], number: int
) -> None:
    """Add a gap message to the batch, at the place that the stream has reached.

    Args:
        batch: The batch that the collector is filling.
        begin: The transaction in progress.
        takers: The consumers that take updates or deletes of the table. No other queue or fifo consumer gets the
            message.
        record: The message's `record`.
        number: The number of the gap within the transaction. The ordinal made of it is below 0, so no change has the
            same position.
    """
    data = orjson.dumps({"op": "gap", "record": record, "old": None, "unchanged": []})
    shared = shared_part(GAP_TOPIC, begin.commit_lsn or 0, begin.xid or 0, begin.commit_time or 0)
    row = message_row(-2 - number, None, 0, data, shared)
    index = len(batch.rows)
    batch.rows.append(row)
    batch.keys.append(None)
    batch.partitions.append(0)
    batch.size += len(row) + ROW_OVERHEAD
    batch.gap = True
    batch.gaps.append((record, [taker.name for taker in takers]))
    if queues := tuple(taker.consumer_id for taker in takers if not taker.reads_log):
        batch.groups.setdefault(queues, []).append(index)
    batch.streams.update(taker.consumer_id for taker in takers if taker.reads_log)
