"""Take the messages of the log apart without parsing the rows in them.

The target's server turns the JSON of a row into values. This module only cuts the row's JSON text out of the message's
`data`, whose members always have the order op, record, old, unchanged (docs/CONSUMERS.md). It is pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

import orjson

from cdcbridge.lsn import format_lsn
from cdcbridge.routing.logical_messages import members

_PLAIN_END: Final = ',"old":null,"unchanged":[]}'
_END: Final = ',"unchanged":[]}'
_READ: Final = '{"op":"read",'
_OLD: Final = '},"old":'
_OP_START: Final = len('{"op":"')
_RECORD: Final = len('","record":')


class MirrorRow(NamedTuple):
    """A message as scan_mirror() returns it. `lsn` is the commit LSN."""

    seq: int
    topic: str
    data: str
    key: str | None
    old_key: str | None
    lsn: int
    ordinal: int
    commit_time: datetime | None = None

    @property
    def is_own(self) -> bool:
        """True if the message is no change of the transaction that committed at `lsn`.

        A row that a backfill read, and a gap message, have the LSN of the transaction before them.
        """
        return self.ordinal < 0 or self.data.startswith(_READ)


@dataclass(slots=True, frozen=True)
class MirrorChunk:
    """Messages that were read together.

    Attributes:
        rows: The messages, in order of seq.
        whole: Whether the log has no more messages of the last transaction.
    """

    rows: list[MirrorRow]
    whole: bool = True

    def ends(self) -> list[int]:
        """Return the numbers of messages with which a transaction ends, for example [2, 5] for two and three."""
        rows = self.rows
        inner = [number for number in range(1, len(rows)) if rows[number].lsn != rows[number - 1].lsn]
        return [*inner, len(rows)] if self.whole and rows else inner


@dataclass(slots=True)
class MirroredChange:
    """A change that a mirror has to apply.

    Attributes:
        row: The message in the log.
        op: insert, update, delete, truncate or read.
        record: The row after the change, as JSON text, or None. A delete has none.
        old: The row before the change or its key, as JSON text, or None.
        unchanged: The columns that `record` lacks because the change did not touch them.
    """

    row: MirrorRow
    op: str
    record: str | None
    old: str | None
    unchanged: tuple[str, ...]

    @property
    def position(self) -> str:
        """The position of the change, for example `16/B374D848#3`."""
        return f"{format_lsn(self.row.lsn)}#{self.row.ordinal}"


def take_apart(row: MirrorRow) -> MirroredChange:
    """Return the parts of a message.

    Most messages have one of two forms, which need two comparisons. All others are read member by member.
    """
    data = row.data
    end = data.index('"', _OP_START)
    op = data[_OP_START:end]
    start = end + _RECORD
    if data.endswith(_PLAIN_END):
        record = data[start : -len(_PLAIN_END)]
        if op == "delete":
            return MirroredChange(row, op, None, record, ())
        return MirroredChange(row, op, None if record == "null" else record, None, ())
    if data.endswith(_END) and data.count(_OLD) == 1:
        middle = data.index(_OLD) + 1
        return MirroredChange(row, op, data[start:middle], data[middle + len(_OLD) - 1 : -len(_END)], ())
    return _by_members(row, op)


def _by_members(row: MirrorRow, op: str) -> MirroredChange:
    found = dict(members(row.data))
    record, old = found.get("record", "null"), found.get("old", "null")
    if op == "delete":
        record, old = "null", record
    return MirroredChange(
        row,
        op,
        None if record == "null" else record,
        None if old == "null" else old,
        tuple(orjson.loads(found.get("unchanged", "[]"))),
    )


def columns_of(record: str) -> tuple[str, ...]:
    """Return the names of the columns in the JSON text of a row, in their order."""
    try:
        return tuple(orjson.loads(record))
    except orjson.JSONDecodeError:  # for example a number such as 1e400, which PostgreSQL accepts
        return tuple(name for name, _ in members(record))


def effective_time(row: MirrorRow) -> int:
    """Return the commit time of a message in microseconds since 2000-01-01 UTC, or 0 if it has none."""
    return 0 if row.commit_time is None else _microseconds(row.commit_time)


_EPOCH: Final = datetime.fromisoformat("2000-01-01T00:00:00+00:00")


def _microseconds(time: datetime) -> int:
    since = time - _EPOCH
    return (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds
