"""Apply changes with a look at each row: lock the target's rows, decide about each change, apply the winners.

This is the way for changes among which something is unusual: a row that the target wrote itself, a row that is missing
or there already, or a constraint that is violated. Each change is decided in its order, by rule.py. The rows are still
locked and written by a few statements. Never commits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import psycopg

from cdcbridge.config import Mirror
from cdcbridge.config.mirror import ConflictRule
from cdcbridge.errors import OperatorNeeded
from cdcbridge.mirrors.applying import Applying
from cdcbridge.mirrors.changes import MirroredChange, columns_of, effective_time
from cdcbridge.mirrors.conflicts import ConflictRow, end_holds, store_conflicts
from cdcbridge.mirrors.log_reader import Marks
from cdcbridge.mirrors.peer_log import OwnWrite, PeerLog
from cdcbridge.mirrors.rule import Decision, Incoming, Kind, Local, Write, decide
from cdcbridge.mirrors.segments import Segment, segments
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target import Target
from cdcbridge.mirrors.target_tables import TargetTables

_NEVER: Final = 1 << 62  # the LSN of a row that a backfill read on the other side: no write has seen it


class _Appeared(Exception):
    """A row that was missing is there now, because the target committed it in the meantime."""


@dataclass(slots=True)
class _Row:
    """A row of the target as the changes of the segment leave it.

    Attributes:
        exists: Whether it is there.
        mirrored: Whether this mirror wrote it last.
        text: The row as JSON text before the segment, or None.
        written_at: Its commit time, in microseconds since 2000-01-01 UTC, or None if not known.
        touched: Whether one of the changes was applied to it.
    """

    exists: bool = False
    mirrored: bool = False
    text: str | None = None
    written_at: int | None = None
    touched: bool = False


@dataclass(slots=True)
class _Look:
    """What a transaction has found in one table of the target.

    Attributes:
        table: The table.
        changes: The changes to decide.
        rows: The target's rows, locked, by key.
        missing: A change of each key that has no row.
    """

    table: TargetTable
    changes: list[MirroredChange]
    rows: dict[str, _Row]
    missing: dict[str, MirroredChange]


class Careful:
    """The careful way of one mirror.

    Args:
        mirror: The settings.
        target: The session on the target.
        tables: The tables of the target.
        source: Answers questions about the source's rows.
        applying: Writes the rows.
        sides: The identities of the source and the target.
        peer: The target's log. None: the mirror has one direction.
    """

    def __init__(
        self,
        mirror: Mirror,
        target: Target,
        tables: TargetTables,
        source: SourceTables,
        applying: Applying,
        sides: tuple[str, str],
        peer: PeerLog | None,
    ) -> None:
        self._mirror = mirror
        self._target = target
        self._tables = tables
        self._source = source
        self._applying = applying
        self._side, self._other = sides
        self._peer = peer

    def apply(self, changes: Sequence[MirroredChange], marks: Marks) -> int:
        """Apply changes, and return the number of conflicts.

        Args:
            changes: The changes, without truncates and without changes of a key.
            marks: The notes about their transactions.
        """
        by_topic: dict[str, list[MirroredChange]] = {}
        keyless: dict[str, list[MirroredChange]] = {}
        for change in changes:
            (by_topic if change.row.key is not None else keyless).setdefault(change.row.topic, []).append(change)
        self._applying.apply(Segment(keyless=keyless), strict=True, mirrored_only=False)
        while True:
            conflicts: list[ConflictRow] = []
            try:
                with self._target.connection.transaction():
                    self._decide_all([self._look(topic, rows) for topic, rows in by_topic.items()], marks, conflicts)
                break
            except _Appeared:
                continue
        store_conflicts(self._target, self._mirror.name, conflicts)
        return len(conflicts)

    def has_rival(self, fresh: Iterable[tuple[str, Collection[str]]], after: int) -> bool:
        """Return whether the target deleted a row that the source inserts, without the source having seen it.

        Such a row is missing as if it had never been there, so only the target's log can tell.

        Args:
            fresh: The keys of rows that were inserted, by table.
            after: The LSN of the target up to which the source had seen its writes.
        """
        given = [(topic, keys) for topic, keys in fresh if keys]
        if not given or self._peer is None:
            return False
        self._peer.catch_up(self._target.connection)
        return any(self._own(self._tables.get(topic), list(keys), after) for topic, keys in given)

    def truncate(self, change: MirroredChange, marks: Marks) -> int:
        """Empty a table, except for rows that the target wrote and the source had not seen. Return the conflicts."""
        table = self._tables.get(change.row.topic)
        if self._peer is None:
            self._applying.truncate([change.row.topic])
            return 0
        self._target.connection.execute(
            psycopg.sql.SQL("lock table {} in share row exclusive mode").format(table.identifier)
        )
        self._peer.catch_up(self._target.connection)
        own = self._peer.own_writes(table.full_name, None, marks.seen_by(change.row.lsn), self._other)
        conflicts, kept = [], []
        for key, rival in own.items():
            if rival.write.op == "delete" or rival.record is None:
                continue
            one = replace(change, row=change.row._replace(key=key), op="delete", old=rival.record)
            row = self._lock(table, {key: one}).get(key, _Row())
            decision = self._decide(table, one, row, rival, marks)
            if decision is None or decision.kind is None:
                continue
            conflicts.append(self._conflict(table, one, row, rival, decision, "the source truncated the table"))
            if not decision.apply:
                kept.append(rival.record)
        self._target.run(table.statement("delete_others", table.key), [kept])
        store_conflicts(self._target, self._mirror.name, conflicts)
        return len(conflicts)

    # all tables

    def _look(self, topic: str, changes: list[MirroredChange]) -> _Look:
        """Lock the target's rows that these changes of a table concern."""
        table = self._tables.get(topic)
        identities = {change.row.key or "": change for change in reversed(changes)}
        rows = self._lock(table, identities)
        missing = {key: change for key, change in identities.items() if key not in rows}
        return _Look(table, changes, rows, missing)

    def _decide_all(self, looks: Sequence[_Look], marks: Marks, conflicts: list[ConflictRow]) -> None:
        """Decide about the changes of each table, after the target's log has all that the target had committed."""
        if self._peer is not None:
            self._peer.catch_up(self._target.connection)
        for look in looks:
            own: dict[str, OwnWrite] = {}
            if self._peer is not None:
                self._require_missing(look.table, look.missing)
                own = self._own(look.table, list(look.rows | look.missing), marks.seen_by(look.changes[0].row.lsn))
            self._decide_table(look, own, marks, conflicts)

    def _decide_table(self, look: _Look, own: dict[str, OwnWrite], marks: Marks, conflicts: list[ConflictRow]) -> None:
        table = look.table
        equal = self._equal(table, [change for change in look.changes if change.op == "read"])
        winners: list[MirroredChange] = []
        for change in look.changes:
            key = change.row.key or ""
            row = look.rows.setdefault(key, _Row())
            if change.op == "read" and key in equal and not row.touched:
                continue  # both sides have it
            decision = self._decide(table, change, row, own.get(key), marks)
            if decision is None:
                continue
            if decision.kind is not None and self._reports(decision):
                conflicts.append(self._conflict(table, change, row, own.get(key), decision))
            if decision.apply:
                winners.append(self._completed(table, change, beaten=decision.kind is not None, exists=row.exists))
                row.exists, row.mirrored, row.touched = change.op != "delete", True, True
        self._write(table, winners, look.missing, marks, conflicts)
        self._end_holds(table, winners)

    def _require_missing(self, table: TargetTable, missing: dict[str, MirroredChange]) -> None:
        """Check that these rows are still missing. Nothing can lock a row that is not there.

        Raises:
            _Appeared: One of them is there.
        """
        if missing and self._lock(table, missing):
            raise _Appeared

    def _reports(self, decision: Decision) -> bool:
        """Return whether a conflict is stored. A delete of a row that both sides deleted loses nothing."""
        return not (self._peer is not None and decision.kind == "delete_missing")

    def _lock(self, table: TargetTable, identities: dict[str, MirroredChange]) -> dict[str, _Row]:
        """Lock the target's rows, and return those that are there by their key."""
        keys = list(identities)
        texts = [change.record or change.old or "{}" for change in identities.values()]
        if self._target.origin is None or self._peer is None:
            statement = table.statement("present", table.key)
        else:
            statement = table.statement("lock", table.key)
        found = self._target.fetch(statement, texts)
        return {keys[n - 1]: _Row(True, bool(mirrored), text, at) for n, text, mirrored, at in found}

    def _own(self, table: TargetTable, keys: Sequence[str], after: int) -> dict[str, OwnWrite]:
        if self._peer is None:
            return {}
        return self._peer.own_writes(table.full_name, keys, after, self._other)

    def _equal(self, table: TargetTable, reads: Sequence[MirroredChange]) -> set[str]:
        """Return the keys of those rows of a backfill that the target has exactly so."""
        found: set[str] = set()
        for group in self._applying.grouped(table, reads):
            keys = [change.row.key or "" for change in reads]
            if len(group.rows) == len(reads):
                found |= {
                    keys[n - 1] for (n,) in self._target.fetch(table.statement("equal", group.columns), group.rows)
                }
        return found

    # one change

    def _decide(
        self, table: TargetTable, change: MirroredChange, row: _Row, own: OwnWrite | None, marks: Marks
    ) -> Decision | None:
        """Decide about a change, or return None if it is void."""
        write = Write(
            "insert" if change.op == "read" else change.op,
            change.row.lsn,
            marks.times.get(change.row.lsn, effective_time(change.row)),
            self._side,
        )
        rival = None if own is None else own.write
        if change.op == "read" and self._peer is not None and row.exists and not row.mirrored and rival is None:
            at = self._source_time(table, change)
            if at is None:
                return None  # the row has changed since, and its change is a message of its own
            write = replace(write, effective_time=at)
            rival = Write("insert", _NEVER, row.written_at or 0, self._other)
        rule = self._rule(table)
        return decide(Incoming(write, marks.seen_by(change.row.lsn)), Local(row.exists, row.mirrored, rival), rule)

    def _rule(self, table: TargetTable) -> ConflictRule:
        return self._mirror.rule(table.topic) if self._peer is not None else "prefer_source"

    def _source_time(self, table: TargetTable, change: MirroredChange) -> int | None:
        """Return the commit time of a source's row that a backfill read, or None if the row is another one now."""
        return self._source.written_at(table.topic, table.key, change.record or "{}")

    def _completed(self, table: TargetTable, change: MirroredChange, *, beaten: bool, exists: bool) -> MirroredChange:
        """Return the change with all columns, if the target does not have the row that it leaves in part as it was.

        The target then has no row, or one that the change has beaten, whose other columns have lost as well.
        """
        if not change.unchanged or (exists and not beaten) or change.record is None:
            return change
        columns = (*columns_of(change.record), *change.unchanged)
        record = self._source.row(table.topic, table.key, change.record, columns)
        if record is None:
            return replace(change, op="delete", record=None, old=change.record, unchanged=())  # deleted meanwhile
        return replace(change, record=record, unchanged=())

    def _conflict(
        self,
        table: TargetTable,
        change: MirroredChange,
        row: _Row,
        own: OwnWrite | None,
        decision: Decision,
        note: str | None = None,
    ) -> ConflictRow:
        return ConflictRow(
            change,
            table.full_name,
            decision.kind or "update_exists",
            row.text,
            None if own is None else own.position,
            self._rule(table),
            decision.winner,
            "held" if decision.winner is None else "decided",
            note,
        )

    # writing the winners

    def _write(
        self,
        table: TargetTable,
        winners: Sequence[MirroredChange],
        missing: dict[str, MirroredChange],
        marks: Marks,
        conflicts: list[ConflictRow],
    ) -> None:
        """Write the winners. The rows of `missing` are inserted, so that a row that appeared is not overwritten."""
        if not winners:
            return
        try:
            with self._target.connection.transaction():
                self._write_together(table, winners, missing)
        except psycopg.errors.UniqueViolation:
            self._require_missing(table, missing)
            for change in winners:
                self._write_alone(table, change, marks, conflicts)

    def _write_together(
        self, table: TargetTable, changes: Iterable[MirroredChange], missing: Iterable[str] = ()
    ) -> None:
        absent = set(missing)
        for segment in segments(changes):
            net = segment.net.get(table.topic, {})
            self._applying.delete(table, [change for change in net.values() if change.op == "delete"])
            written = {key: change for key, change in net.items() if change.op != "delete"}
            self._applying.insert(table, [change for key, change in written.items() if key in absent])
            self._applying.upsert(table, [change for key, change in written.items() if key not in absent])
            absent -= net.keys()

    def _write_alone(
        self, table: TargetTable, change: MirroredChange, marks: Marks, conflicts: list[ConflictRow]
    ) -> None:
        """Write one row. If another row of the target has the same unique value, hold it or remove the other one."""
        try:
            with self._target.connection.transaction():
                self._write_together(table, [change])
            return
        except psycopg.errors.UniqueViolation as error:
            if self._peer is None:
                raise OperatorNeeded(
                    f"target: {error.diag.message_primary} at the change {change.position} of {table.topic}:"
                    f" {error.diag.message_detail}",
                    hint="Remove or change the row of the target that is in the way, then: cdcbridge mirror resume"
                    f" {self._mirror.name}",
                ) from error
            violated = error
        others = self._in_the_way(table, change, str(violated.diag.constraint_name))
        at = marks.times.get(change.row.lsn, effective_time(change.row))
        later = all((at, self._side) > (one.written_at or 0, self._other) for one in others)
        note = f"{violated.diag.constraint_name}: {violated.diag.message_detail}"
        kind: Kind = "insert_exists" if change.op in ("insert", "read") else "update_exists"
        if len(others) > 1:
            kind = "multiple_unique_conflicts"
        text = others[0].text if others else None
        decision = Decision(False, kind, None)
        if self._mirror.unique == "newest":
            decision = Decision(later, kind, "source" if later else "target")
            self._remove_loser(table, change, others, later=later)
        conflicts.append(self._conflict(table, change, _Row(True, False, text), None, decision, note))

    def _in_the_way(self, table: TargetTable, change: MirroredChange, constraint: str) -> list[_Row]:
        """Return the target's rows that have the same value in the columns of a unique constraint, and lock them."""
        found = self._target.connection.execute(
            "select a.attname from pg_index i cross join unnest(i.indkey::int2[]) with ordinality u (attnum, n)"
            " join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum"
            " where i.indexrelid = to_regclass(%s) order by u.n",
            (psycopg.sql.Identifier(table.schema, constraint).as_string(None),),
        ).fetchall()
        columns = tuple(name for (name,) in found)
        if not columns:
            return []
        unique = replace(table, key=columns, statements={})
        rows = self._target.fetch(unique.statement("lock", columns), [change.record or "{}"])
        return [_Row(True, bool(mirrored), text, at) for _, text, mirrored, at in rows]

    def _remove_loser(self, table: TargetTable, change: MirroredChange, others: Sequence[_Row], *, later: bool) -> None:
        """Delete the older row on this side. The other side deletes it as well, by the same comparison."""
        if later:
            for one in others:
                text = one.text or "{}"
                self._target.run(table.statement("delete", table.key), [[text]])
            self._write_together(table, [change])
        else:
            self._target.run(table.statement("delete", table.key), [[change.record or "{}"]])

    def _end_holds(self, table: TargetTable, winners: Sequence[MirroredChange]) -> None:
        name = table.full_name
        if self._peer is not None and winners:
            end_holds(self._target, self._mirror.name, [(name, change.row.key or "") for change in winners])
