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
from cdcbridge.mirrors.applying import Applying
from cdcbridge.mirrors.changes import MirroredChange, effective_time
from cdcbridge.mirrors.conflicts import ConflictRow, conflict_of, end_holds, store_conflicts
from cdcbridge.mirrors.log_reader import Marks
from cdcbridge.mirrors.peer_log import OwnWrite, PeerLog
from cdcbridge.mirrors.rule import Decision, Incoming, Local, Write, decide
from cdcbridge.mirrors.segments import Segment
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target import TargetSession
from cdcbridge.mirrors.target_tables import TargetTables
from cdcbridge.mirrors.winners import MaybeAppeared, Winners

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
        target: TargetSession,
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
        self._winners = Winners(mirror, target, applying, sides, peer)
        self._void: list[MirroredChange] = []

    def forget_void(self) -> None:
        """Forget the deletes that void() returns."""
        self._void.clear()

    @property
    def void(self) -> list[MirroredChange]:
        """The deletes since forget_void() that found no row.

        Nothing can lock a row that is not there. Until the commit, a session of the target may therefore have inserted
        the row again, without having seen the delete. After the commit these deletes are decided once more.
        """
        return list(self._void)

    def apply(self, changes: Sequence[MirroredChange], marks: Marks, until: int | None = None) -> int:
        """Apply changes, and return the number of conflicts.

        Args:
            changes: The changes, without truncates and without changes of a key.
            marks: The notes about their transactions.
            until: The commit LSN in the target with which these changes arrived there first. Writes after it have seen
                them. None: they have not arrived yet.
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
                    looks = [self._look(topic, rows) for topic, rows in by_topic.items()]
                    self._decide_all(looks, marks, until, conflicts)
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
            note = "the source truncated the table"
            conflicts.append(conflict_of(table, one, row.text, rival, decision, self._rule(table), note))
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

    def _decide_all(
        self, looks: Sequence[_Look], marks: Marks, until: int | None, conflicts: list[ConflictRow]
    ) -> None:
        """Decide about the changes of each table, after the target's log has all that the target had committed."""
        if self._peer is not None:
            self._peer.catch_up(self._target.connection)
        for look in looks:
            own: dict[str, OwnWrite] = {}
            if self._peer is not None:
                self._require_missing(look.table, look.missing)
                own = self._own(look.table, list(look.rows | look.missing), marks.seen_by(look.changes[0].row.lsn))
                if until is not None:
                    unseen = {key for key, one in own.items() if one.write.lsn < until}
                    look.changes = [change for change in look.changes if change.row.key in unseen]
            self._decide_table(look, own, marks, conflicts)

    def _decide_table(self, look: _Look, own: dict[str, OwnWrite], marks: Marks, conflicts: list[ConflictRow]) -> None:
        table = look.table
        equal = self._equal(table, [change for change in look.changes if change.op == "read"])
        winners: list[MirroredChange] = []
        decided: list[MirroredChange] = []  # without a rival, or against it
        for change in look.changes:
            key = change.row.key or ""
            row = look.rows.setdefault(key, _Row())
            if change.op == "read" and key in equal and not row.touched:
                continue  # both sides have it
            decision = self._decide(table, change, row, own.get(key), marks)
            if decision is None:
                continue
            if decision.kind == "delete_missing" and self._peer is not None:
                self._void.append(change)
            if decision.kind is not None and self._reports(decision):
                conflicts.append(conflict_of(table, change, row.text, own.get(key), decision, self._rule(table)))
            if decision.apply or decision.kind == "delete_missing":
                decided.append(change)
            if decision.apply:
                winners.append(self._completed(table, change, beaten=decision.kind is not None, exists=row.exists))
                row.exists, row.mirrored, row.touched = change.op != "delete", True, True
        if winners:
            try:
                self._winners.write(table, winners, look.missing)
            except MaybeAppeared:
                self._require_missing(table, look.missing)
                conflicts += self._winners.write_one_by_one(table, winners, marks)
        self._end_holds(table, decided)

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
        if change.op == "read" and rival is not None and rival.lsn > self._seen(change, marks):
            return None  # the row is older than it looks, and the target's write reaches the source as a change
        if change.op == "read" and self._peer is not None and row.exists and not row.mirrored and rival is None:
            at = self._source_time(table, change)
            if at is None:
                return None  # the row has changed since, and its change is a message of its own
            write = replace(write, effective_time=at)
            rival = Write("insert", _NEVER, row.written_at or 0, self._other)
        rule = self._rule(table)
        return decide(Incoming(write, self._seen(change, marks)), Local(row.exists, row.mirrored, rival), rule)

    @staticmethod
    def _seen(change: MirroredChange, marks: Marks) -> int:
        """Return how much of the target the change had seen. A backfill's row has seen the transaction before it."""
        return marks.seen_by(change.row.lsn + (change.op == "read"))

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
        # Only these columns: the others may have changed since, and that is a change of its own.
        rest = self._source.row(table.topic, table.key, change.record, change.unchanged)
        if rest is None:
            return replace(change, op="delete", record=None, old=change.record, unchanged=())  # deleted meanwhile
        return replace(change, record=f"{change.record[:-1]},{rest[1:]}", unchanged=())

    def _end_holds(self, table: TargetTable, winners: Sequence[MirroredChange]) -> None:
        name = table.full_name
        if self._peer is not None and winners:
            end_holds(self._target, self._mirror.name, [(name, change.row.key or "") for change in winners])
