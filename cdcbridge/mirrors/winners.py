"""Write the changes that careful.py has decided to apply, and deal with unique constraints other than the key.

Two rows with the same unique value cannot both be in the target. Both sides choose the same one of them, or hold the
source's row. Never decides about two writes of the same row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import psycopg

from cdcbridge.config import Mirror
from cdcbridge.errors import OperatorNeeded
from cdcbridge.mirrors.applying import Applying
from cdcbridge.mirrors.changes import MirroredChange, effective_time
from cdcbridge.mirrors.conflicts import ConflictRow, conflict_of
from cdcbridge.mirrors.log_reader import Marks
from cdcbridge.mirrors.rule import Decision, Kind
from cdcbridge.mirrors.segments import segments
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target import TargetSession

# The columns of a unique index, in their order.
_INDEXED = """
    select a.attname from pg_index i cross join unnest(i.indkey::int2[]) with ordinality u (attnum, n)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum
    where i.indexrelid = to_regclass(%s) order by u.n
"""


class MaybeAppeared(Exception):
    """A unique value was there already: that of a row that was missing a moment ago, or that of another row."""


@dataclass(slots=True, frozen=True)
class _Other:
    """A row of the target that is in the way.

    Attributes:
        text: The row as JSON text.
        written_at: Its commit time in microseconds since 2000-01-01 UTC, or 0 if that is not known.
    """

    text: str
    written_at: int


class Winners:
    """The writer of the winners of one mirror.

    Args:
        mirror: The settings.
        target: The session on the target.
        applying: Writes the rows.
        sides: The identities of the source and the target.
    """

    def __init__(self, mirror: Mirror, target: TargetSession, applying: Applying, sides: tuple[str, str]) -> None:
        self._mirror = mirror
        self._target = target
        self._applying = applying
        self._side, self._other = sides

    def write(self, table: TargetTable, changes: Sequence[MirroredChange], missing: Iterable[str]) -> None:
        """Write changes of a table together.

        Args:
            table: The table.
            changes: The changes, in their order.
            missing: The keys of rows that the target did not have. They are inserted, so that a row that has appeared
                since is not overwritten.

        Raises:
            MaybeAppeared: A unique value is there already. Nothing is written.
        """
        try:
            with self._target.connection.transaction():
                self._write(table, changes, missing)
        except psycopg.errors.UniqueViolation as error:
            raise MaybeAppeared from error

    def write_one_by_one(
        self, table: TargetTable, changes: Sequence[MirroredChange], marks: Marks
    ) -> list[ConflictRow]:
        """Write changes of a table, each by itself, and return the conflicts over unique values.

        Raises:
            OperatorNeeded: The mirror has one direction, and a row of the target is in the way.
        """
        found = [self._write_one(table, change, marks) for change in changes]
        return [one for one in found if one is not None]

    def _write(self, table: TargetTable, changes: Iterable[MirroredChange], missing: Iterable[str] = ()) -> None:
        absent = set(missing)
        for segment in segments(changes):
            net = segment.net.get(table.topic, {})
            self._applying.delete(table, [change for change in net.values() if change.op == "delete"])
            written = {key: change for key, change in net.items() if change.op != "delete"}
            self._applying.insert(table, [change for key, change in written.items() if key in absent])
            self._applying.upsert(table, [change for key, change in written.items() if key not in absent])
            absent -= net.keys()

    def _write_one(self, table: TargetTable, change: MirroredChange, marks: Marks) -> ConflictRow | None:
        """Write one row. If another row of the target has the same unique value, hold it or remove the other one."""
        try:
            with self._target.connection.transaction():
                self._write(table, [change])
            return None
        except psycopg.errors.UniqueViolation as error:
            if self._mirror.two_way is None:
                raise OperatorNeeded(
                    f"target: {error.diag.message_primary} at the change {change.position} of {table.topic}:"
                    f" {error.diag.message_detail}",
                    hint="Remove or change the row of the target that is in the way, then: cdcbridge mirror resume"
                    f" {self._mirror.name}",
                ) from error
            return self._decide(table, change, marks, error)

    def _decide(
        self, table: TargetTable, change: MirroredChange, marks: Marks, error: psycopg.errors.UniqueViolation
    ) -> ConflictRow:
        others = self._in_the_way(table, change, str(error.diag.constraint_name))
        kind: Kind = "insert_exists" if change.op in ("insert", "read") else "update_exists"
        if len(others) > 1:
            kind = "multiple_unique_conflicts"
        decision = Decision(False, kind, None)
        if self._mirror.unique == "newest":
            at = marks.times.get(change.row.lsn, effective_time(change.row))
            later = all((at, self._side) > (one.written_at, self._other) for one in others)
            decision = Decision(later, kind, "source" if later else "target")
            self._remove_loser(table, change, others, later=later)
        text = others[0].text if others else None
        note = f"{error.diag.constraint_name}: {error.diag.message_detail}"
        return conflict_of(table, change, text, None, decision, f"unique: {self._mirror.unique}", note)

    def _in_the_way(self, table: TargetTable, change: MirroredChange, constraint: str) -> list[_Other]:
        """Return the target's rows that have the same value in the columns of a unique constraint, and lock them."""
        name = psycopg.sql.Identifier(table.schema, constraint).as_string(None)
        columns = tuple(name for (name,) in self._target.connection.execute(_INDEXED, (name,)).fetchall())
        if not columns:
            return []
        unique = replace(table, key=columns, statements={})
        rows = self._target.fetch(unique.statement("lock", columns), [change.record or "{}"])
        return [_Other(text, at or 0) for _, text, _, at in rows]

    def _remove_loser(
        self, table: TargetTable, change: MirroredChange, others: Sequence[_Other], *, later: bool
    ) -> None:
        """Delete the older row on this side. The other side deletes it as well, by the same comparison."""
        if later:
            for one in others:
                self._target.run(table.statement("delete", table.key), [[one.text]])
            self._write(table, [change])
        else:
            self._target.run(table.statement("delete", table.key), [[change.record or "{}"]])
