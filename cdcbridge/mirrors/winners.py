"""Write the changes that careful.py has decided to apply, and deal with unique constraints other than the key.

Two rows with the same unique value cannot both be in the target. Both sides choose the same one of them, or hold the
source's row. Never decides about two writes of the same row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import orjson
import psycopg

from cdcbridge.changes.keys import key_text
from cdcbridge.config import Mirror
from cdcbridge.errors import OperatorNeeded
from cdcbridge.mirrors.applying import Applying
from cdcbridge.mirrors.changes import MirroredChange, effective_time
from cdcbridge.mirrors.conflicts import ConflictRow, conflict_of
from cdcbridge.mirrors.log_reader import Marks
from cdcbridge.mirrors.peer_log import PeerLog
from cdcbridge.mirrors.rule import Decision, Kind
from cdcbridge.mirrors.segments import segments
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target import TargetSession

# The columns of a unique index, in their order.
_INDEXED = """
    select a.attname from pg_index i cross join unnest(i.indkey::int2[]) with ordinality u (attnum, n)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum
    where i.indexrelid = to_regclass(%s) and u.n <= i.indnkeyatts and i.indexprs is null order by u.n
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
        peer: The target's log. None: the mirror has one direction.
    """

    def __init__(
        self, mirror: Mirror, target: TargetSession, applying: Applying, sides: tuple[str, str], peer: PeerLog | None
    ) -> None:
        self._mirror = mirror
        self._target = target
        self._applying = applying
        self._side, self._other = sides
        self._peer = peer

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
        if self._mirror.unique == "newest" and others:
            at = marks.times.get(change.row.lsn, effective_time(change.row))
            rivals = self._times(table, others, marks.seen_by(change.row.lsn))
            later = all((at, self._side) > (rival, self._other) for rival in rivals)
            try:
                with self._target.connection.transaction():
                    self._remove_loser(table, change, others, later=later)
                decision = Decision(later, kind, "source" if later else "target")
            except psycopg.errors.UniqueViolation:
                kind = "multiple_unique_conflicts"  # another constraint is violated, too: a person has to decide
                decision = Decision(False, kind, None)
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

    def _times(self, table: TargetTable, others: Sequence[_Other], after: int) -> list[int]:
        """Return the effective commit times of these rows, as the other side knows them."""
        keys = [key_text(orjson.loads(one.text), table.key) or "" for one in others]
        own = self._peer.own_writes(table.full_name, keys, after, self._other) if self._peer is not None else {}
        return [
            own[key].write.effective_time if key in own else one.written_at
            for key, one in zip(keys, others, strict=True)
        ]

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
