"""A table of the source, read in chunks: its shape, where a chunk ends, its rows as COPY gives them. Part of the rim.

PostgreSQL makes the JSON, as the decoders would make it from the WAL: composites and types of extensions as text, no
generated columns. Reads by the log's key; a table without one by its pages.
"""

from __future__ import annotations

import select
from dataclasses import dataclass
from typing import Any, Final

import orjson
from psycopg import errors, pq, sql

from cdcbridge.database import Connection, source_errors
from cdcbridge.errors import UsageError
from cdcbridge.reads import Snapshot

_ROWS_PER_PAGE: Final = 50  # of a table that is read by its pages, as a guess
_COLUMNS: Final = """
    with recursive bases as (
        select a.attname, a.attnum, a.atttypid as of, format_type(a.atttypid, a.atttypmod) as type from pg_attribute a
        where a.attrelid = %(oid)s and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
        union all
        select b.attname, b.attnum, t.typbasetype, b.type from bases b join pg_type t on t.oid = b.of
        where t.typtype = 'd'
    )
    select b.attname, b.type, b.attnum,
           case when t.typtype = 'c' or t.typtype = 'b' and t.typcategory <> 'A' and t.oid >= 16384 then 'text'
                when t.typcategory = 'A' and (e.typtype = 'c' or e.typtype = 'b' and e.oid >= 16384) then 'text[]' end,
           t.oid::int
    from bases b join pg_type t on t.oid = b.of left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
    where t.typtype <> 'd' order by b.attnum
"""
_KEY: Final = """
    select k.attnum from pg_index i cross join lateral unnest(i.indkey::int2[]) with ordinality as k (attnum, n)
    where i.indrelid = %s and i.indisvalid and k.n <= i.indnkeyatts
      and i.indexrelid = coalesce(
          (select p.indexrelid from pg_index p where p.indrelid = i.indrelid and p.indisprimary),
          (select p.indexrelid from pg_index p where p.indrelid = i.indrelid and p.indisreplident))
    order by k.n
"""
_LEAVES: Final = """
    select n.nspname, c.relname, c.oid::int8
    from pg_partition_tree(%s) t join pg_class c on c.oid = t.relid join pg_namespace n on n.oid = c.relnamespace
    where t.isleaf order by c.oid
"""
_FINGERPRINT: Final = """
    select concat_ws(' ', c.oid,
               (select string_agg(a.attnum || '/' || a.xmin, ' ' order by a.attnum) from pg_attribute a
                where a.attrelid = c.oid and a.attnum > 0),
               (select string_agg(i.indexrelid || '/' || i.xmin, ' ' order by i.indexrelid) from pg_index i
                where i.indrelid = c.oid and (i.indisprimary or i.indisreplident)),
               (select string_agg(t.relid::oid::text, ' ') from pg_partition_tree(c.oid) t))
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = %s and c.relname = %s
"""
_WRITERS: Final = """
    select l.virtualtransaction, coalesce(format('pid %%s (%%s, open for %%s)', a.pid, a.state,
                                                 date_trunc('second', clock_timestamp() - a.xact_start)),
                                          'a prepared transaction')
    from pg_locks l left join pg_stat_activity a on a.pid = l.pid
    where l.locktype = 'relation' and l.relation = any (%s) and l.granted
      and l.database = (select oid from pg_database where datname = current_database())
      and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
"""
_COMMA: Final = sql.SQL(", ")
_NONE: Final = sql.SQL("")
_PLAIN_TEXT: Final = frozenset({20, 21, 23, 25, 1043, 2950})  # types whose text is their JSON's: integers, text, uuid


@dataclass(slots=True, frozen=True)
class Column:
    """A column; `cast`: what it must be cast to before JSON is made of it; `base`: its type's OID, less domains."""

    name: str
    type: str
    cast: str | None
    base: int

    @property
    def of_t(self) -> sql.Composable:
        """In a query that calls the table t."""
        return sql.SQL("t.{}").format(sql.Identifier(self.name))

    @property
    def value(self) -> sql.Composable:
        """What JSON is made of."""
        return sql.SQL("{}::{}").format(self.of_t, sql.SQL(self.cast)) if self.cast else self.of_t

    @property
    def shown(self) -> sql.Composable:
        return sql.SQL("{} as {}").format(self.value, sql.Identifier(self.name))

    @property
    def text(self) -> sql.Composable:
        """As `record ->> column` would be."""
        if self.base in _PLAIN_TEXT:
            return sql.SQL("{}::text").format(self.of_t)
        return sql.SQL("(to_json({}) #>> '{{}}')").format(self.value)


@dataclass(slots=True, frozen=True)
class Shape:
    """A table: `key` by which it is read and its messages are keyed, empty where it has none; `leaves`: (name, OID) of
    the tables that hold its rows; `fingerprint`: changes with whatever of this does.
    """

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: tuple[Column, ...]
    leaves: tuple[tuple[sql.Identifier, int], ...]
    fingerprint: str

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


@dataclass(slots=True, frozen=True)
class Wanted:
    """What to read of a table: rows that meet `condition`, these columns (None: all), with the consumer's own key;
    leaving out row versions that are younger than `since`, where that can be told.
    """

    condition: str | None = None
    columns: tuple[str, ...] | None = None
    own_key: tuple[str, ...] | None = None
    since: Snapshot | None = None


def describe(connection: Connection, schema: str, name: str) -> Shape:
    """The table as it is now. Raises UsageError where there is none."""
    with source_errors():
        found = connection.execute(
            "select c.oid::int8, c.relkind::text from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = %s and c.relname = %s and c.relkind in ('r', 'p')",
            (schema, name),
        ).fetchone()
        if found is None:
            raise UsageError(f"the source has no table {schema}.{name}")
        oid = found[0]
        columns = {row[2]: Column(row[0], row[1], row[3], row[4])
                   for row in connection.execute(_COLUMNS, {"oid": oid}).fetchall()}  # fmt: skip
        key = [columns.get(number) for (number,) in connection.execute(_KEY, (oid,)).fetchall()]
        leaves = connection.execute(_LEAVES, (oid,)).fetchall()
        fingerprint = connection.execute(_FINGERPRINT, (schema, name)).fetchone()
    if not leaves and found[1] == "r":
        leaves = [(schema, name, oid)]
    return Shape(
        schema,
        name,
        tuple(columns[number] for number in sorted(columns)),
        tuple(column for column in key if column is not None) if None not in key else (),
        tuple((sql.Identifier(leaf[0], leaf[1]), leaf[2]) for leaf in leaves),
        fingerprint[0] if fingerprint else "",
    )


def writers(connection: Connection, shape: Shape) -> dict[str, str]:
    """Transactions that write into the table just now, by name; what to tell people of each."""
    oids = [oid for _, oid in shape.leaves]
    with source_errors():
        return dict(connection.execute(_WRITERS, (oids,)).fetchall())


def snapshot(connection: Connection) -> Snapshot:
    """Of the transaction that the session is in."""
    with source_errors():
        row = connection.execute("select pg_current_snapshot()::text").fetchone()
    return Snapshot.parse(row[0] if row else "")


def estimate(connection: Connection, shape: Shape) -> int:
    """How many rows the planner believes the table has."""
    with source_errors():
        row = connection.execute(sql.SQL("explain (format json) select from {}").format(shape.identifier)).fetchone()
    return round(row[0][0]["Plan"]["Plan Rows"]) if row else 0


def is_still(connection: Connection, shape: Shape) -> bool:
    """Whether the table has not been altered since it was described."""
    with source_errors():
        row = connection.execute(_FINGERPRINT, (shape.schema, shape.name)).fetchone()
    return row is not None and row[0] == shape.fingerprint


def next_place(connection: Connection, shape: Shape, place: list[Any], size: int) -> tuple[list[Any], int, bool]:
    """Where a chunk of about so many rows that begins behind `place` ends, how many rows that are, and whether it
    is the last. A place is the key's texts, or without a key (leaf, page).
    """
    if not shape.key:
        return _next_page(connection, shape, place, max(1, size // _ROWS_PER_PAGE))
    names = _COMMA.join(sql.Identifier(column.name) for column in shape.key)
    texts = _COMMA.join(sql.SQL("{}::text").format(sql.Identifier(column.name)) for column in shape.key)
    # Of s: a bare name would be the text beside it.
    down = _COMMA.join(sql.SQL("s.{} desc").format(sql.Identifier(column.name)) for column in shape.key)
    query = sql.SQL(
        "with s as materialized (select {names} from {table} {behind} order by {names} limit {size})"
        " select (select count(*) from s), {texts} from s order by {down} limit 1"
    ).format(
        names=names, table=shape.identifier, texts=texts, down=down, size=sql.Literal(size),
        behind=sql.SQL("where {}").format(_beyond(shape, ">", place)) if place else _NONE,
    )  # fmt: skip
    with source_errors():
        row = connection.execute(query).fetchone()
    if row is None:
        return place, 0, True
    return list(row[1:]), row[0], row[0] < size


def _next_page(connection: Connection, shape: Shape, place: list[Any], size: int) -> tuple[list[Any], int, bool]:
    leaf, page = place or (0, 0)
    if leaf >= len(shape.leaves):
        return place, 0, True
    with source_errors():
        row = connection.execute(
            "select pg_relation_size(c.oid) / current_setting('block_size')::int8, c.reltuples"
            " from pg_class c where c.oid = %s",
            (shape.leaves[leaf][1],),
        ).fetchone()
    pages, rows = row or (0, 0)
    density = max(0, rows) / pages if pages else 0
    if page + size < pages:
        return [leaf, page + size], round(density * size), False
    return [leaf + 1, 0], round(density * max(0, pages - page)), leaf + 1 >= len(shape.leaves)


def _beyond(shape: Shape, operator: str, place: list[Any]) -> sql.Composable:
    names = _COMMA.join(sql.Identifier(column.name) for column in shape.key)
    values = _COMMA.join(
        sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(column.type))
        for text, column in zip(place, shape.key, strict=True)
    )
    return sql.SQL("({}) {} ({})").format(names, sql.SQL(operator), values)


def rows_query(shape: Shape, wanted: Wanted, place: list[Any], end: list[Any]) -> sql.Composed:
    """COPY of the rows behind `place`, up to `end`: the log's key, data, and the consumer's own key if it has one."""
    table: sql.Composable = shape.identifier
    conditions: list[sql.Composable] = []
    if not shape.key:
        leaf, page = place or (0, 0)
        table = shape.leaves[leaf][0]
        conditions.append(sql.SQL("ctid >= '({},0)'").format(sql.SQL(str(page))))
        if end[0] == leaf:
            conditions.append(sql.SQL("ctid < '({},0)'").format(sql.SQL(str(end[1]))))
    else:
        conditions += [_beyond(shape, ">", place)] if place else []
        conditions.append(_beyond(shape, "<=", end))
    if wanted.condition:
        conditions.append(sql.SQL("({})").format(sql.SQL(wanted.condition)))
    if wanted.since is not None:
        xmax, running = sql.Literal(str(wanted.since.xmax)), sql.Literal([str(x) for x in sorted(wanted.since.running)])
        conditions.append(sql.SQL("age(xmin) > age({}::xid)").format(xmax))
        if wanted.since.running:
            conditions.append(sql.SQL("xmin <> all ({}::xid[])").format(running))
    by_name = {column.name: column for column in shape.columns}
    shown = [column for column in shape.columns if wanted.columns is None or column.name in wanted.columns]
    left_out = [column.name for column in shape.columns if column not in shown]
    fields = [_key_of(shape.key), sql.SQL("d.start || row_to_json(r)::text || d.rest")]
    if wanted.own_key:
        fields.append(_key_of(tuple(by_name.get(name) for name in wanted.own_key)))
    # Aliased from outside the condition, which may name the table or leave it out.
    return sql.SQL(
        "copy (select {fields} from (select * from {table} where {conditions}) t cross join lateral (select {shown}) r"
        " cross join (select {start}::text as start, {rest}::text as rest) d{order}) to stdout (format binary)"
    ).format(
        fields=_COMMA.join(fields),
        table=table,
        conditions=sql.SQL(" and ").join(conditions),
        shown=_COMMA.join(column.shown for column in shown),
        start=sql.Literal('{"op":"read","record":'),
        rest=sql.Literal(',"old":null,"unchanged":' + orjson.dumps(left_out).decode() + "}"),
        order=sql.SQL(" order by {}").format(_COMMA.join(column.of_t for column in shape.key)) if shape.key else _NONE,
    )


def _key_of(columns: tuple[Column | None, ...]) -> sql.Composable:
    """The key as text: of one column as `record ->> column`; of several a compact JSON array of such texts."""
    texts = [sql.SQL("null::text") if column is None else column.text for column in columns]
    if len(texts) < 2:
        return texts[0] if texts else sql.SQL("null::text")
    parts = sql.SQL(" || ',' || ").join(sql.SQL("coalesce(to_json({})::text, 'null')").format(text) for text in texts)
    nulls = sql.SQL(" and ").join(sql.SQL("{} is null").format(text) for text in texts)
    return sql.SQL("case when {} then null else '[' || {} || ']' end").format(nulls, parts)


_STATE: Final = sql.SQL(
    "(select {key} as key, row_to_json(r)::jsonb::text as record"
    " from {table} t cross join lateral (select {shown}) r) s"
)


def hashes_query(shape: Shape) -> sql.Composed:
    """The table's keys and records by bucket, as log_hashes() has the log's."""
    return sql.SQL(
        "select ('x' || left(md5(key), 3))::bit(12)::int, count(*),"
        " sum(('x' || left(md5(key || record), 15))::bit(60)::bigint) from {} group by 1"
    ).format(_state(shape))


def records_query(shape: Shape, buckets: list[int]) -> sql.Composed:
    """(key, hash of the record) of all rows in these buckets."""
    return sql.SQL(
        "select key, md5(record) from {} where ('x' || left(md5(key), 3))::bit(12)::int = any ({}::int[])"
    ).format(_state(shape), sql.Literal(buckets))


def _state(shape: Shape) -> sql.Composed:
    shown = _COMMA.join(column.shown for column in shape.columns)
    return _STATE.format(key=_key_of(shape.key), table=shape.identifier, shown=shown)


def try_condition(connection: Connection, shape: Shape, condition: str | None) -> None:
    """Raises psycopg.Error where the table cannot be read with this condition."""
    query = sql.SQL("select * from {} where ({}) limit 0").format(shape.identifier, sql.SQL(condition or "true"))
    result = connection.pgconn.exec_params(query.as_bytes(connection), None)  # one statement, whatever it says
    if result.status != pq.ExecStatus.TUPLES_OK:
        _raise(result)


def copy_rows(connection: Connection, query: sql.Composed) -> list[bytes]:
    """The rows of a COPY in binary format, each less its number of fields. In one go: a chunk fits into memory."""
    pgconn = connection.pgconn
    result = pgconn.exec_params(query.as_bytes(connection), None)  # one statement, whatever a condition says
    if result.status != pq.ExecStatus.COPY_OUT:
        _raise(result)
    rows: list[bytes] = []
    get = pgconn.get_copy_data
    while True:
        length, data = get(1)
        if length > 0:
            rows.append(bytes(data[2:]))
        elif length == 0:
            select.select([pgconn.socket], [], [])
            pgconn.consume_input()
        else:
            break
    while (ended := pgconn.get_result()) is not None:
        if ended.status == pq.ExecStatus.FATAL_ERROR:
            _raise(ended)
    if rows:
        rows[0] = rows[0][19:]  # COPY's header is in the first one's message
        rows.pop()  # and its trailer in a message of its own
    return rows


def _raise(result: pq.abc.PGresult) -> None:
    """The error as psycopg would raise it."""
    raise errors.error_from_result(result)
