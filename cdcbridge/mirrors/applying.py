"""Apply segments of changes to the target, each by a few statements.

The usual way assumes that nothing is unusual, and counts the rows that each statement wrote. If a number is not the
expected one, or if a constraint is violated, the segment is undone and goes the careful way (careful.py), which looks
at each row. Never commits, and never decides a conflict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import orjson
import psycopg

from cdcbridge.config import Mirror
from cdcbridge.errors import OperatorNeeded
from cdcbridge.mirrors.changes import MirroredChange, columns_of
from cdcbridge.mirrors.segments import Segment
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.tables import HISTORY, TargetTable
from cdcbridge.mirrors.target import TargetSession
from cdcbridge.mirrors.target_tables import TargetTables

_HISTORY: Final = tuple(name for name, _ in HISTORY)


class Unexpected(Exception):
    """A statement wrote another number of rows than expected, so the segment needs a closer look."""


@dataclass(slots=True)
class RowGroup:
    """Rows of one table that one statement writes: the names of their columns, and their JSON texts."""

    columns: tuple[str, ...]
    rows: list[str]


class Applying:
    """The statements by which one mirror writes its target.

    Args:
        mirror: The settings.
        target: The session, with an open transaction whenever a method is called.
        tables: The tables of the target.
        source: Answers questions about the source's rows.
    """

    def __init__(self, mirror: Mirror, target: TargetSession, tables: TargetTables, source: SourceTables) -> None:
        self._mirror = mirror
        self._target = target
        self._tables = tables
        self._source = source

    # the usual way

    def apply(self, segment: Segment, *, strict: bool, mirrored_only: bool) -> None:
        """Apply a segment.

        Args:
            segment: The changes.
            strict: Whether rows that a change expects must exist, and rows that it creates must not.
            mirrored_only: Whether only rows may be written that this mirror wrote last.

        Raises:
            Unexpected: The target's rows are not as the changes expect them.
        """
        for topic, rows in segment.keyless.items():
            self._insert_keyless(self._tables.get(topic), rows)
        suffix = "_mirrored" if mirrored_only else ""
        for topic, net in segment.net.items():
            table, fresh = self._tables.get(topic), segment.fresh[topic]
            gone = [change for change in net.values() if change.op == "delete"]
            if gone:
                self._remove(table, gone, fresh, strict=strict, suffix=suffix)
            written = [change for change in net.values() if change.op != "delete"] if gone else list(net.values())
            self._write(table, written, fresh, strict=strict, suffix=suffix)

    def _remove(
        self, table: TargetTable, gone: Sequence[MirroredChange], fresh: set[str], *, strict: bool, suffix: str
    ) -> None:
        known = [change for change in gone if change.row.key not in fresh]
        if strict and suffix and len(known) < len(gone):
            raise Unexpected  # rows that came and went in this segment, and that the target may have had before
        self._delete(known, table, f"delete{suffix}", strict=strict)
        if not strict:
            self._delete([change for change in gone if change.row.key in fresh], table, "delete", strict=False)

    def _write(
        self, table: TargetTable, written: Sequence[MirroredChange], fresh: set[str], *, strict: bool, suffix: str
    ) -> None:
        whole = [change for change in written if not change.unchanged]
        new = [change for change in whole if change.row.key in fresh] if strict else whole
        for group in self.grouped(table, new):
            self._target.run(table.statement("insert" if strict else "upsert", group.columns), [group.rows])
        if strict and len(new) < len(whole):
            for group in self.grouped(table, [change for change in whole if change.row.key not in fresh]):
                self._update(table, group, suffix)
        if len(whole) < len(written):
            for group in self.grouped(table, [change for change in written if change.unchanged]):
                self._update(table, group, suffix)

    def _update(self, table: TargetTable, group: RowGroup, suffix: str) -> None:
        if self._target.run(table.statement(f"update{suffix}", group.columns), [group.rows]) != len(group.rows):
            raise Unexpected

    def _delete(self, changes: Sequence[MirroredChange], table: TargetTable, name: str, *, strict: bool) -> None:
        if not changes:
            return
        rows = [change.old or "{}" for change in changes]
        if self._target.run(table.statement(name, table.key), [rows]) != len(rows) and strict:
            raise Unexpected

    def _insert_keyless(self, table: TargetTable, changes: Sequence[MirroredChange]) -> None:
        for change in changes:
            if change.op not in ("insert", "read"):
                raise OperatorNeeded(
                    f"the table {table.topic} has no key, so its {change.op} at {change.position} names no row",
                    hint="Give the table a primary key, leave it out of the mirror, or use apply: append.",
                )
        for group in self.grouped(table, changes):
            self._target.run(table.statement("insert", group.columns), [group.rows])

    # single changes

    def truncate(self, topics: Iterable[str]) -> None:
        """Empty the tables, in one statement because foreign keys may connect them."""
        names = psycopg.sql.SQL(", ").join(self._tables.only(topic) for topic in topics)
        self._target.connection.execute(psycopg.sql.SQL("truncate {}").format(names))

    def rekey(self, change: MirroredChange) -> None:
        """Apply an update that changed the key.

        Raises:
            Unexpected: The target did not have the row.
        """
        table = self._tables.get(change.row.topic)
        record = change.record or "{}"
        columns = table.written(self.checked_columns(table, change))
        if self._target.run(table.statement("rekey", columns), [[record], [change.old or "{}"]]) != 1:
            raise Unexpected

    def insert(self, table: TargetTable, changes: Sequence[MirroredChange]) -> None:
        """Insert rows that the target does not have."""
        for group in self.grouped(table, changes):
            self._target.run(table.statement("insert", group.columns), [group.rows])

    def upsert(self, table: TargetTable, changes: Sequence[MirroredChange]) -> None:
        """Write rows whether the target has them or not."""
        for group in self.grouped(table, [change for change in changes if not change.unchanged]):
            self._target.run(table.statement("upsert", group.columns), [group.rows])
        for group in self.grouped(table, [change for change in changes if change.unchanged]):
            self._target.run(table.statement("update", group.columns), [group.rows])

    def delete(self, table: TargetTable, changes: Sequence[MirroredChange]) -> None:
        """Delete the rows that the target has."""
        self._delete(changes, table, "delete", strict=False)

    def append(self, changes: Sequence[MirroredChange]) -> None:
        """Append each change to the history of its table."""
        by_table: dict[str, list[MirroredChange]] = {}
        for change in changes:
            by_table.setdefault(change.row.topic, []).append(change)
        for topic, rows in by_table.items():
            table = self._tables.get(topic)
            self._require_history(table)
            with_row = [change for change in rows if change.record is not None]
            for group in self.grouped(table, with_row, by_row=True):
                self._target.run(table.statement("append", group.columns), [group.rows])
            rest = [change for change in rows if change.record is None]
            if rest:
                texts = [_with_history(change, change.old or "{}") for change in rest]
                self._target.run(table.statement("append", table.key), [texts])

    def _require_history(self, table: TargetTable) -> None:
        missing = [name for name in _HISTORY if name not in table.columns]
        if missing:
            raise OperatorNeeded(
                f"target: the table {table.schema}.{table.name} has no column {missing[0]}, which a history needs",
                hint="A history has the columns op text, position text and commit_time timestamptz. With another name"
                " in `tables`, the mirror creates it.",
            )

    # columns

    def grouped(self, table: TargetTable, changes: Sequence[MirroredChange], *, by_row: bool = False) -> list[RowGroup]:
        """Return the rows of the changes, in groups with the same columns.

        The rows of a table have the same columns until its definition changes, and the definition changes between
        transactions. If the first and the last row have the same columns, then all have them.

        Args:
            table: The table.
            changes: The changes, with a record each.
            by_row: Return the rows of a history table.
        """
        if not changes:
            return []
        groups: dict[tuple[str, ...], RowGroup] = {}
        uniform = not any(change.unchanged for change in changes)
        first, last = (columns_of(changes[place].record or "{}") for place in (0, -1))
        uniform = uniform and first == last
        for change in changes:
            record = change.record or "{}"
            columns = first if uniform else columns_of(record)
            group = groups.get(columns)
            if group is None:
                self._check(table, columns, change)
                group = groups[columns] = RowGroup(table.written(columns), [])
            group.rows.append(_with_history(change, record) if by_row else record)
        return list(groups.values())

    def checked_columns(self, table: TargetTable, change: MirroredChange) -> tuple[str, ...]:
        """Return the columns of a change's row, which the target has all.

        Raises:
            OperatorNeeded: The target lacks one.
        """
        columns = columns_of(change.record or "{}")
        self._check(table, columns, change)
        return columns

    def _check(self, table: TargetTable, columns: tuple[str, ...], change: MirroredChange) -> None:
        if not table.lacking(columns):
            return
        self._tables.refresh(table)  # the target may have got the column since the last look
        lacking = table.lacking(columns)
        if not lacking:
            return
        types = {one.name: one.type for one in self._source.columns(table.topic)}
        name = table.full_name
        statements = " ".join(
            f"alter table {table.identifier.as_string(None)} add column {psycopg.sql.Identifier(one).as_string(None)}"
            f" {types.get(one, 'text')};"
            for one in lacking
        )
        raise OperatorNeeded(
            f"target: the table {name} lacks the column {', '.join(lacking)}, which {table.topic} has from"
            f" {change.position} on",
            hint=f"In the target: {statements} Then: cdcbridge mirror resume {self._mirror.name}",
        )


def _with_history(change: MirroredChange, record: str) -> str:
    """Return the row of a history table: the row with op, position and commit time in front."""
    time = change.row.commit_time
    head = orjson.dumps(
        {"op": change.op, "position": change.position, "commit_time": None if time is None else time.isoformat()}
    ).decode()
    rest = record[1:]
    return head[:-1] + ("" if rest.lstrip().startswith("}") else ",") + rest
