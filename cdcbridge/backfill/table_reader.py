"""Read a table in chunks: find the end of each chunk by rows and bytes, and copy its rows.

A table is read in the order of its key, or page by page if it has no key. Sizes are read from TOAST pointers, before
any value is loaded. The length of a compressed json value is known only when the value arrives. If a chunk turns out
too large, it is read again with fewer rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import sql

from cdcbridge.database import Connection, source_errors
from cdcbridge.routing.overtaken import Snapshot
from cdcbridge.source.copying import copy_rows
from cdcbridge.source.row_sql import COMMA, NONE, key_of, read_data, shown, total
from cdcbridge.source.shapes import KeyColumn, ReadColumn, ReadShape

CHUNK_BYTES: Final = 8 << 20  # estimated bytes of a chunk with more than one row, at most
MOST_BYTES: Final = 12 << 20  # the same, as they arrive
_ROWS_PER_PAGE: Final = 50  # a guess, for a table that is read page by page
_SMALL_ROW: Final = 100  # bytes of a row without its values that may be large
_ITEM: Final = "'({},{})'"


@dataclass(slots=True, frozen=True)
class Wanted:
    """The part of a table that a backfill reads.

    Attributes:
        condition: The SQL condition that rows have to meet, or None for all rows.
        columns: The columns to read, or None for all.
        own_key: The columns of the consumer's own key, if it has one.
        since: Row versions younger than this snapshot are left out, if their transaction IDs show that.
        limit: Rows whose data certainly has more bytes than this are not loaded. Their keys are read, and the columns
            in `needed`.
        needed: The columns that the consumer's filter reads.
    """

    condition: str | None = None
    columns: tuple[str, ...] | None = None
    own_key: tuple[str, ...] | None = None
    since: Snapshot | None = None
    limit: int | None = None
    needed: tuple[str, ...] = ()

    def taken(self, shape: ReadShape) -> list[ReadColumn]:
        return [column for column in shape.columns if self.columns is None or column.name in self.columns]

    def of_large(self, shape: ReadShape) -> list[ReadColumn]:
        """Return the columns that are read of a row that is too large."""
        names = {*(column.name for column in shape.key), *(self.own_key or ()), *self.needed}
        return [c for c in self.taken(shape) if c.name in names or (not shape.key and c.narrow)]


@dataclass(slots=True, frozen=True)
class Stretch:
    """The part of a table that one chunk covers.

    Attributes:
        end: The place where the chunk ends. Empty if no rows are left.
        looked_at: The number of its rows.
        last: The table has no rows after this chunk.
        bounded: The chunk ended because of its bytes, for example after 2 rows of 4 MB.
        single: The chunk certainly has one row.
        large: Some rows of the chunk are too large to be loaded.
    """

    end: list[Any]
    looked_at: int
    last: bool
    bounded: bool = False
    single: bool = False
    large: bool = False


@dataclass(slots=True, frozen=True)
class Read:
    """A chunk that was read.

    Attributes:
        sized: Each row has one more field: the least size in bytes of a row that was not loaded, or null.
    """

    end: list[Any]
    rows: list[bytes]
    looked_at: int
    last: bool
    bounded: bool = False
    sized: bool = False


def read_chunk(connection: Connection, shape: ReadShape, wanted: Wanted, place: list[Any], size: int) -> Read:
    """Read about `size` rows after `place`, in the session's transaction.

    A place consists of the texts of the key's values, such as ["42"]. Without a key it is leaf, page and item, such as
    [0, 17, 3].
    """
    may_be_wide = any(column.wide for column in shape.columns)  # else all rows have about the same length
    wide, most = may_be_wide and _has_wide_rows(connection, shape), None
    while True:
        stretch = next_place(connection, shape, wanted, place, size, wide=wide, most_rows=most)
        if not stretch.end:
            return Read(place, [], 0, last=True)
        query = rows_query(shape, wanted, place, stretch.end, sized=stretch.large)
        with source_errors():
            rows, whole = copy_rows(connection, query, MOST_BYTES if may_be_wide and not stretch.single else None)
        if whole:
            return Read(stretch.end, rows, stretch.looked_at, stretch.last, stretch.bounded, stretch.large)
        # This number of rows fits. If a condition leaves rows out, the chunk has even fewer of them.
        wide, most = True, len(rows)


def _has_wide_rows(connection: Connection, shape: ReadShape) -> bool:
    """Return whether any value of the table is stored in a TOAST table."""
    query = "select bool_or(pg_relation_size(reltoastrelid) > 0) from pg_class where oid = any (%s::oid[])"
    with source_errors():
        return connection.execute(query, (shape.oids,)).fetchone() == (True,)


def next_place(
    connection: Connection,
    shape: ReadShape,
    wanted: Wanted,
    place: list[Any],
    size: int,
    *,
    wide: bool = False,
    most_rows: int | None = None,
) -> Stretch:
    """Find the end of a chunk that begins after `place` and has about `size` rows.

    With `wide`, the bytes of the rows can end the chunk, too, and it has no more than `most_rows` rows.
    """
    if not shape.key:
        return _next_page(connection, shape, wanted, place, max(1, size // _ROWS_PER_PAGE), wide, most_rows)
    texts = COMMA.join(sql.SQL("format('%s', c{})").format(sql.SQL(str(n))) for n in range(len(shape.key)))
    rows = sql.SQL("select {names}{sizes} from {rows} t {behind} order by {order} limit {size}").format(
        names=COMMA.join(column.of_t for column in shape.key),
        sizes=_sizes(shape, wanted) if wide else NONE,
        rows=shape.rows,
        behind=sql.SQL("where {}").format(_compared(shape.order, 5, place)) if place else NONE,
        order=COMMA.join(column.order for column in shape.order),
        size=sql.Literal(size),
    )
    names = COMMA.join(sql.SQL(f"c{n}") for n in range(len(shape.key)))
    with source_errors():
        if wide:
            row = connection.execute(_bounded(rows, names, texts, wanted, most_rows)).fetchone()
        else:
            row = connection.execute(
                sql.SQL(
                    "with s ({}) as materialized ({}), n as materialized (select count(*) as n from s)"
                    " select {}, n.n, n.n, false from s, n offset greatest(0, (select n.n - 1 from n)) limit 1"
                ).format(names, rows, texts)
            ).fetchone()
    if row is None:
        return Stretch([], 0, last=True)
    *end, count, found, large = row
    return Stretch(end, count, found < size and count == found, count < found, wide and count == 1, large)


def _sizes(shape: ReadShape, wanted: Wanted) -> sql.Composable:
    """Return SQL for two columns: about how many bytes a row has, and how many it has at least."""
    columns = wanted.taken(shape)
    return sql.SQL(", {}, {}").format(total(c.bytes for c in columns), total(c.least_bytes for c in columns))


def _bounded(
    rows: sql.Composable, names: sql.Composable, texts: sql.Composable, wanted: Wanted, most_rows: int | None
) -> sql.Composed:
    """Return a query for the last of these rows that still fits.

    It also returns how many rows fit, how many there are, and whether one of those that fit is too large to be loaded.
    """
    limit = sql.SQL("null::int8") if wanted.limit is None else sql.Literal(wanted.limit)
    return sql.SQL(
        "with s ({names}, bytes, at_least) as materialized ({rows}),"
        " r as (select s.*, row_number() over () as n, bool_or(at_least > {limit}) over w as large,"
        " sum({small} + case when at_least > {limit} then 0 else bytes end) over w as total"
        " from s window w as (rows unbounded preceding))"
        " select {texts}, r.n, (select count(*) from s), coalesce(r.large, false) from r"
        " where r.n = 1 or r.total <= {most} and r.n <= {most_rows} order by r.n desc limit 1"
    ).format(
        names=names, rows=rows, texts=texts, limit=limit, small=sql.Literal(_SMALL_ROW), most=sql.Literal(CHUNK_BYTES),
        most_rows=sql.Literal(1 << 30 if most_rows is None else most_rows),
    )  # fmt: skip


def _next_page(
    connection: Connection,
    shape: ReadShape,
    wanted: Wanted,
    place: list[Any],
    size: int,
    wide: bool,
    most_rows: int | None,
) -> Stretch:
    leaf, page, *_ = place or (0, 0)
    if leaf >= len(shape.leaves):
        return Stretch([], 0, last=True)
    with source_errors():
        row = connection.execute(
            "select pg_relation_size(c.oid) / current_setting('block_size')::int8, c.reltuples"
            " from pg_class c where c.oid = %s",
            (shape.leaves[leaf][1],),
        ).fetchone()
    pages, rows = row or (0, 0)
    density = max(0, rows) / pages if pages else 0
    if page + size < pages:
        whole = Stretch([leaf, page + size, 0], round(density * size), last=False)
    else:
        whole = Stretch([leaf + 1, 0, 0], round(density * max(0, pages - page)), leaf + 1 >= len(shape.leaves))
    if not wide:
        return whole
    within = sql.SQL("select t.ctid{} from only {} t where {} order by t.ctid").format(
        _sizes(shape, wanted), shape.leaves[leaf][0], _within(place, whole.end)
    )
    with source_errors():
        query = _bounded(within, sql.SQL("c0"), sql.SQL("format('%s', c0)"), wanted, most_rows)
        row = connection.execute(query).fetchone()
    if row is None:
        return Stretch(whole.end, 0, whole.last)
    end, count, found, large = row
    if count == found:
        return Stretch(whole.end, count, whole.last, single=count == 1, large=large)
    return Stretch([leaf, *map(int, end.strip("()").split(","))], count, False, True, count == 1, large)


def _within(place: list[Any], end: list[Any]) -> sql.Composable:
    """Return the condition for the rows of a leaf after `place`, up to `end`."""
    leaf, page, item = [*place, 0, 0, 0][:3]
    behind = sql.SQL(f"ctid > '({page},{item})'")
    return behind if end[0] != leaf else behind + sql.SQL(f" and ctid <= '({end[1]},{end[2]})'")


def _compared(order: Sequence[KeyColumn], strategy: int, place: list[Any]) -> sql.Composable:
    """Return `key > place` for strategy 5 of btree or `key <= place` for strategy 2, in the index's own order."""
    if all(column.ordinary for column in order):
        names = COMMA.join(column.column.of_t for column in order)
        values = COMMA.join(
            sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(column.column.type))
            for text, column in zip(place, order, strict=True)
        )
        return sql.SQL("({}) operator(pg_catalog.{}) ({})").format(
            names, sql.SQL(">" if strategy == 5 else "<="), values
        )
    return sql.SQL("{} and {}").format(_bound(order[0], strategy, place), _stepwise(order, strategy, place))


def _bound(column: KeyColumn, strategy: int, place: list[Any]) -> sql.Composable:
    """Return the part of a comparison that an index can look up, which is that of the first column alone."""
    return column.compared(4 if strategy == 5 else 2, place[0])


def _stepwise(order: Sequence[KeyColumn], strategy: int, place: list[Any]) -> sql.Composable:
    """Return a comparison column by column, with the operators of each column."""
    text, *others = place
    if not others:
        return order[0].compared(strategy, text)
    return sql.SQL("({} or {} and {})").format(
        order[0].compared(5 if strategy == 5 else 1, text),
        order[0].compared(3, text),
        _stepwise(order[1:], strategy, others),
    )


def rows_query(
    shape: ReadShape, wanted: Wanted, place: list[Any], end: list[Any], *, sized: bool = False
) -> sql.Composed:
    """Return a COPY statement for the rows after `place`, up to `end`.

    A row has the log's key, the data, and the consumer's own key if it has one. With `sized` it also has the least
    number of bytes of its data, if that is too much to be loaded.
    """
    rows, inside, outside = shape.rows, _conditions(wanted), []
    if shape.key:
        outside = [_compared(shape.order, 5, place)] if place else []
        outside.append(_compared(shape.order, 2, end))
    else:
        rows = sql.SQL("only {}").format(shape.leaves[place[0] if place else 0][0])
        inside.append(_within(place, end))
    taken = wanted.taken(shape)
    data = read_data("r", taken, [column for column in shape.columns if column not in taken])
    fields = [key_of(shape.key), data]
    if wanted.own_key:
        by_name = {column.name: column for column in shape.columns}
        fields.append(key_of([by_name.get(name) for name in wanted.own_key]))
    small = wanted.of_large(shape)
    if sized:
        least = total(column.least_bytes for column in taken)
        large = sql.SQL("{} > {}").format(least, sql.Literal(wanted.limit))
        stub = read_data("k", small, [column for column in shape.columns if column not in small])
        fields[1] = sql.SQL("case when {} then {} else {} end").format(large, stub, data)
        fields.append(sql.SQL("case when {} then {}::int8 end").format(large, least))
    # The table gets its alias outside the subquery, so that the condition inside may use the table's name or omit it.
    return sql.SQL(
        "copy (select {fields} from (select * from {rows} {inside}) t cross join lateral (select {shown}) r"
        "{small} {outside}{order}) to stdout (format binary)"
    ).format(
        fields=COMMA.join(fields),
        rows=rows,
        inside=_where(inside),
        shown=shown(taken),
        small=sql.SQL(" cross join lateral (select {}) k").format(shown(small)) if sized else NONE,
        outside=_where(outside),
        order=sql.SQL(" order by {}").format(COMMA.join(k.order for k in shape.order)) if shape.key else NONE,
    )


def _where(conditions: Sequence[sql.Composable]) -> sql.Composable:
    return sql.SQL("where {}").format(sql.SQL(" and ").join(conditions)) if conditions else NONE


def _conditions(wanted: Wanted) -> list[sql.Composable]:
    conditions: list[sql.Composable] = []
    if wanted.condition:
        conditions.append(sql.SQL("({})").format(sql.SQL(wanted.condition)))
    if wanted.since is not None:
        xmax, running = sql.Literal(str(wanted.since.xmax)), sql.Literal([str(x) for x in sorted(wanted.since.running)])
        conditions.append(sql.SQL("age(xmin) > age({}::xid)").format(xmax))
        if wanted.since.running:
            conditions.append(sql.SQL("xmin <> all ({}::xid[])").format(running))
    return conditions
