"""Look at the tables of a revert in the source: their definitions, foreign keys, and rows as they are now.

This module never changes a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import psycopg
from psycopg import sql

from cdcbridge.database import Connection, source_errors
from cdcbridge.errors import RevertRefused, UsageError
from cdcbridge.revert.messages import TextRow, same, text_row
from cdcbridge.revert.order import Reference
from cdcbridge.revert.plan import Identity, RevertTable
from cdcbridge.revert.statements import ambiguous, count, find, lock, read_back, referring
from cdcbridge.source import shapes
from cdcbridge.source.sessions import refuse_row_security
from cdcbridge.source.shapes import ReadShape

_FLOATS: Final = frozenset({700, 701, 1021, 1022})  # float4, float8 and their arrays
_IDENTITY: Final = """
    select c.relreplident = 'f',
           array(select a.attname::text from pg_index i
                 join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any (i.indkey::int2[])
                 where i.indrelid = c.oid and i.indisreplident)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = %s and c.relname = %s
"""
_REFERENCES: Final = """
    select f.conname::text, n.nspname || '.' || c.relname,
           array(select a.attname::text from unnest(f.conkey) with ordinality k (attnum, n)
                 join pg_attribute a on a.attrelid = f.conrelid and a.attnum = k.attnum order by k.n),
           pn.nspname || '.' || p.relname,
           array(select a.attname::text from unnest(f.confkey) with ordinality k (attnum, n)
                 join pg_attribute a on a.attrelid = f.confrelid and a.attnum = k.attnum order by k.n),
           f.confdeltype::text
    from pg_constraint f
    join pg_class c on c.oid = f.conrelid join pg_namespace n on n.oid = c.relnamespace
    join pg_class p on p.oid = f.confrelid join pg_namespace pn on pn.oid = p.relnamespace
    where f.contype = 'f' and f.conparentid = 0 and pn.nspname || '.' || p.relname = any (%s)
    order by f.oid
"""


def describe_all(source: Connection, topics: Iterable[str]) -> dict[str, ReadShape]:
    """Describe the tables, by topic.

    Raises:
        UsageError: A table does not exist any more.
        OperatorNeeded: Row-level security hides rows of a table from this role.
    """
    found = {}
    for topic in sorted(topics):
        schema, _, name = topic.partition(".")
        found[topic] = shapes.describe(source, schema, name)
        refuse_row_security(source, schema, name)
    return found


def for_plan(source: Connection, shape: ReadShape) -> RevertTable:
    """Return the table as a plan needs it."""
    with source_errors():
        full, identity = source.execute(_IDENTITY, (shape.schema, shape.name)).fetchone() or (False, [])
    return RevertTable(
        f"{shape.schema}.{shape.name}",
        tuple(column.name for column in shape.key),
        tuple(column.name for column in shape.columns),
        frozenset(column.name for column in shape.columns if column.changed is not None),
        frozenset(identity),
        full,
    )


def floats(shape: ReadShape) -> frozenset[str]:
    """Return the columns with floats, which the plugins write in several ways."""
    return frozenset(column.name for column in shape.columns if column.base in _FLOATS)


def references(source: Connection, topics: Iterable[str]) -> list[Reference]:
    """Return the foreign keys that refer to these tables."""
    with source_errors():
        rows = source.execute(_REFERENCES, (sorted(topics),)).fetchall()
    return [Reference(name, c, tuple(columns), p, tuple(keys), action) for name, c, columns, p, keys, action in rows]


def look(
    source: Connection, places: Mapping[Identity, TextRow], known: Mapping[str, ReadShape], *, locked: bool
) -> tuple[dict[Identity, TextRow | None], dict[Identity, int]]:
    """Return the rows with a key as they are now, and the number of rows with the same values in tables without a key.

    Args:
        source: The session.
        places: The rows to look at.
        known: Their tables, by topic.
        locked: Whether the rows are locked before, in the order of their identities.
    """
    rows: dict[Identity, TextRow | None] = {}
    counts: dict[Identity, int] = {}
    for place, row in sorted(places.items(), key=lambda item: repr(item[0])):
        shape = known[place[0]]
        with _naming(place):
            if not shape.order:
                counts[place] = _number(source, count(row, shape)) if _complete(row, shape) else 0
                continue
            if locked:
                source.execute(lock(row, shape))
            found = source.execute(find(row, shape)).fetchone()
            rows[place] = None if found is None else text_row(found[0])
    return rows, counts


@contextmanager
def _naming(place: Identity) -> Iterator[None]:
    """Name the table in an error about a value of a key."""
    try:
        yield
    except psycopg.DataError as error:
        raise RevertRefused(
            f"{place[0]}: the key of a row does not fit its columns any more: {error.diag.message_primary}",
            hint="The type of a column may have changed. Undo the change by hand.",
        ) from error


def _complete(row: TextRow, shape: ReadShape) -> bool:
    return all(column.name in row for column in shape.columns) and len(row) == len(shape.columns)


def _number(source: Connection, query: sql.Composed) -> int:
    row = source.execute(query).fetchone()
    return int(row[0]) if row else 0


def refers(source: Connection, child: ReadShape, reference: Reference, row: TextRow) -> int:
    """Return the number of rows that refer to this row."""
    return _number(source, referring(child, reference.columns, row, reference.keys))


def unreadable(source: Connection, values: TextRow, shape: ReadShape) -> str | None:
    """Return why the table cannot hold these values as they were, or None if it can.

    For example, an enum may have lost a value, and a column may have become shorter.
    """
    if not values:
        return None
    unclear = [c.name for c in shape.columns if c.name in values and ambiguous(c, values[c.name])]
    if unclear:
        return f"the dimensions of the arrays of {', '.join(unclear)} are not in the log"
    try:
        found = source.execute(read_back(values, shape)).fetchone()
    except (psycopg.DataError, psycopg.IntegrityError, psycopg.NotSupportedError) as error:
        return f"the table cannot hold a value any more: {error.diag.message_primary}"
    row = text_row(found[0]) if found else None
    wrong = [name for name, value in values.items() if row is None or not same(value, row.get(name, ""))]
    return f"the table cannot hold the former values of {', '.join(wrong)} any more" if wrong else None


def refuse_altered(source: Connection, known: Sequence[ReadShape]) -> None:
    """Raise UsageError if a table was altered since it was described."""
    for shape in known:
        if not shapes.is_still(source, shape):
            raise UsageError(
                f"{shape.schema}.{shape.name} was altered meanwhile, and nothing was changed. Run it again"
            )
