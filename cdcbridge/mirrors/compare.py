"""Compare a mirror's tables on both sides while both are written to, for `cdcbridge mirror verify`.

A table is read chunk by chunk. The hashes of a chunk are compared first, single rows only where they differ. Rows that
differ are looked at again after the mirror has applied everything. Only rows that still differ, and that nobody wrote
between the two looks, are reported. This module never changes a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from psycopg import sql

from cdcbridge.database import Connection, source_errors, target_errors
from cdcbridge.mirrors import compare_sql
from cdcbridge.mirrors.row_texts import array, differing, row_key
from cdcbridge.mirrors.tables import TargetTable

CHUNK_ROWS: Final = 5000
MOST: Final = 10_000  # rows of a table that differ, after which the comparison of the table ends
_AT_ONCE: Final = 500  # rows that are read at a time
_Rows: TypeAlias = list[tuple[Any, ...]]
Kind = Literal["missing", "extra", "different"]


@dataclass(slots=True, frozen=True)
class Seen:
    """One row as both sides had it at a look.

    Attributes:
        identity: The key as a JSON object.
        source: The source's row as JSON text, or None.
        target: The target's row as JSON text, or None.
        converted: The source's row as the target's types write it, or None.
    """

    identity: str
    source: str | None
    target: str | None
    converted: str | None

    @property
    def equal(self) -> bool:
        return self.converted == self.target


@dataclass(slots=True, frozen=True)
class RowDifference:
    """A row that differs and is quiet.

    Attributes:
        key: The key, as the log has it.
        kind: `missing`: the target lacks it. `extra`: the source lacks it.
        columns: For a row that both have, the columns that differ.
        held: Whether a conflict about the row waits for a decision.
        seen: Both rows.
    """

    key: str
    kind: Kind
    columns: tuple[str, ...]
    held: bool
    seen: Seen


@dataclass(slots=True)
class Compared:
    """The result for one table.

    Attributes:
        table: The table in the source.
        target: The table in the target.
        rows: The number of rows that the source had.
        differences: The rows that differ.
        moving: How many rows differed and were written between the two looks.
        notes: The parts that could not be compared, and the reasons.
        fault: Why the table could not be compared at all, or None.
        fixed: How many rows were repaired.
    """

    table: str
    target: str
    rows: int = 0
    differences: list[RowDifference] = field(default_factory=list)
    moving: int = 0
    notes: list[str] = field(default_factory=list)
    fault: str | None = None
    fixed: int = 0

    @property
    def ok(self) -> bool:
        return self.fault is None and self.fixed == len(self.differences)


class TableComparison:
    """The comparison of one table.

    Args:
        source: A session on the source.
        target: A session on the target.
        ours: The table in the source.
        theirs: The table in the target.
        columns: The columns to compare, with those of the key.
    """

    def __init__(
        self,
        source: Connection,
        target: Connection,
        ours: TargetTable,
        theirs: TargetTable,
        columns: tuple[str, ...],
    ) -> None:
        self.source = source
        self.target = target
        self.ours = ours
        self.theirs = theirs
        self.columns = columns
        self.result = Compared(ours.full_name, theirs.full_name)
        self._candidates: dict[str, Seen] = {}

    def first_look(self) -> None:
        """Read both tables, and remember the rows that differ at this moment."""
        for number, keys in self._chunks(self.source, self.ours):
            self.result.rows += number
            if self._digest(self.source, self.ours, keys) != self._digest(self.target, self.theirs, keys):
                first = self._hashes(self.source, self.ours, keys)
                second = self._hashes(self.target, self.theirs, keys)
                self._remember(keys, (n for n in range(1, number + 1) if first.get(n) != second.get(n)))
        for number, keys in self._chunks(self.target, self.theirs):
            if self._digest(self.source, self.ours, keys)[0] != number:
                present = self._hashes(self.source, self.ours, keys)
                self._remember(keys, (n for n in range(1, number + 1) if n not in present))

    def second_look(self, held: Iterable[str]) -> None:
        """Look at the remembered rows again, and keep those that still differ and are quiet.

        Args:
            held: The keys of rows about which a conflict waits for a decision.
        """
        on_hold = set(held)
        for seen in self.look(list(self._candidates)):
            if seen.equal:
                continue
            if seen != self._candidates[seen.identity]:
                self.result.moving += 1
                continue
            key = row_key(seen.identity, self.ours.key)
            kind: Kind = "different" if seen.converted and seen.target else "missing" if seen.converted else "extra"
            columns = differing(seen.converted, seen.target) if seen.converted and seen.target else ()
            self.result.differences.append(RowDifference(key, kind, columns, key in on_hold, seen))

    def look(self, identities: Sequence[str], *, lock: Literal["source", "target"] | None = None) -> list[Seen]:
        """Return rows as both sides have them now.

        Args:
            identities: The keys as JSON objects.
            lock: The side whose rows are locked, and read first. The caller has begun a transaction on it.
        """
        found: list[Seen] = []
        for start in range(0, len(identities), _AT_ONCE):
            part = identities[start : start + _AT_ONCE]
            sides = {"source": (self.source, self.ours), "target": (self.target, self.theirs)}
            order = sorted(sides, key=lambda side: side != lock)
            rows = {side: self._rows(*sides[side], part, lock=side == lock) for side in order}
            found += self._together(part, rows["source"], rows["target"])
        return found

    def _together(self, part: Sequence[str], ours: dict[int, str], theirs: dict[int, str]) -> list[Seen]:
        numbers = list(ours)
        given = array([ours[n] for n in numbers])
        texts = self._fetch(self.target, compare_sql.converted(self.theirs, self.columns), given) if numbers else []
        converted = {n: text for n, (text,) in zip(numbers, texts, strict=True)}
        return [Seen(one, ours.get(n), theirs.get(n), converted.get(n)) for n, one in enumerate(part, 1)]

    def _remember(self, keys: str, numbers: Iterable[int]) -> None:
        wanted = list(numbers)
        if not wanted or len(self._candidates) >= MOST:
            return
        identities = self._elements(keys)
        for seen in self.look([identities[n - 1] for n in wanted]):
            if not seen.equal:
                self._candidates[seen.identity] = seen
        if len(self._candidates) >= MOST:
            self.result.notes.append(f"more than {MOST} rows differ, and only the first of them were compared")

    def _chunks(self, connection: Connection, table: TargetTable) -> Iterator[tuple[int, str]]:
        """Yield the keys of a table as JSON arrays, each after the number of its keys."""
        last: list[Any] = []
        while len(self._candidates) < MOST:
            statement = compare_sql.chunk(table, first=not last)
            ((number, keys, last),) = self._run(connection, statement, [*last, CHUNK_ROWS])
            if number:
                yield number, keys
            if number < CHUNK_ROWS:
                return

    def _digest(self, connection: Connection, table: TargetTable, keys: str) -> tuple[Any, ...]:
        (found,) = self._fetch(connection, compare_sql.digest(table, self.columns), keys)
        return found

    def _hashes(self, connection: Connection, table: TargetTable, keys: str) -> dict[int, str]:
        return dict(self._fetch(connection, compare_sql.hashes(table, self.columns), keys))

    def _rows(self, connection: Connection, table: TargetTable, part: Sequence[str], *, lock: bool) -> dict[int, str]:
        return dict(self._fetch(connection, compare_sql.rows(table, self.columns, lock=lock), array(part)))

    def _elements(self, keys: str) -> list[str]:
        """Return the elements of a JSON array as texts."""
        rows = self._run(self.source, sql.SQL("select value::text from json_array_elements(%s)"), [keys])
        return [text for (text,) in rows]

    def _fetch(self, connection: Connection, statement: sql.Composed, given: str) -> _Rows:
        return self._run(connection, statement, [given])

    def _run(self, connection: Connection, statement: sql.SQL | sql.Composed, given: Sequence[Any]) -> _Rows:
        with source_errors() if connection is self.source else target_errors():
            return connection.execute(statement, given, prepare=False).fetchall()


def compared_columns(ours: TargetTable, theirs: TargetTable) -> tuple[tuple[str, ...], list[str]]:
    """Return the columns that can be compared, and notes about those that cannot.

    Columns that the mirror leaves out, and columns that a server computes, are not compared.
    """
    plain = [name for name, column in ours.columns.items() if not column.generated]
    lacking = theirs.lacking(plain)
    notes = [f"column {name}: the target lacks it" for name in lacking]
    columns = [name for name in theirs.mirrored(plain) if name not in lacking and not theirs.columns[name].generated]
    return tuple(columns), notes
