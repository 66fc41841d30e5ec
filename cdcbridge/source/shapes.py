"""Describe a table of the source for its readers: columns, key, order, and the tables that hold its rows.

PostgreSQL makes the JSON of a row, equal to the JSON that the decoders would make from the WAL. Composites and types of
extensions are text, and generated columns are omitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from psycopg import sql

from cdcbridge.database import Connection, source_errors
from cdcbridge.errors import UsageError
from cdcbridge.routing.overtaken import Snapshot
from cdcbridge.source.no_table import nearest

_ORDINARY: Final = ("<", "<=", "=", ">=", ">")  # by strategy of btree
JSON: Final = 114  # pg_type's OID of json
_PLAIN_TEXT: Final = frozenset({20, 21, 23, 25, 1043, 2950})  # types with the same text in JSON: integers, text, uuid
# By type, the SQL for the size of a value's text. It needs only the TOAST pointer, so no value is loaded.
_OCTETS: Final = {
    25: "octet_length({})", 1042: "octet_length({})", 1043: "octet_length({})", 17: "2 * octet_length({})",
    JSON: "pg_column_size({}) - 8", 142: "pg_column_size({}) - 8",
}  # fmt: skip
_COLUMNS: Final = """
    with recursive bases as (
        select a.attname, a.attnum, a.atttypid as of, format_type(a.atttypid, a.atttypmod) as type,
               a.attlen = -1 and a.attstorage <> 'p' as wide, a.attlen > 0 as narrow, a.xmin as changed
        from pg_attribute a
        where a.attrelid = %(oid)s and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
        union all
        select b.attname, b.attnum, t.typbasetype, b.type, b.wide, b.narrow, b.changed
        from bases b join pg_type t on t.oid = b.of
        where t.typtype = 'd'
    )
    select b.attname, b.type,
           case when t.typtype = 'c' or t.typtype = 'b' and t.typcategory <> 'A' and t.oid >= 16384 then 'text'
                when e.typtype = 'c' or e.typtype = 'b' and e.typcategory <> 'A' and e.oid >= 16384 then 'text[]' end,
           t.oid::int8, coalesce(e.oid, t.oid) = 114, b.wide, b.narrow,
           (select b.changed::text::int8 where b.changed <> all
               (select s.xmin from pg_attribute s where s.attrelid = %(oid)s and s.attnum < 0)),
           b.attnum
    from bases b join pg_type t on t.oid = b.of
    left join lateral (
        with recursive element as (
            select y.* from pg_type y where y.oid = t.typelem
            union all
            select y.* from element x join pg_type y on y.oid = x.typbasetype where x.typtype = 'd'
        )
        select x.oid, x.typtype, x.typcategory from element x where x.typtype <> 'd'
    ) e on t.typcategory = 'A'
    where t.typtype <> 'd' order by b.attnum
"""
# The columns of the primary key, or of the replica identity's index if that lacks a column of the primary key (see
# key_columns in changes/keys.py). Each row shows whether `order by column` has the index's order, and otherwise which
# operators and collation have it.
_KEY: Final = """
    with i as (
        select i.*, c.relreplident, array(select k.a from unnest(i.indkey::int2[]) with ordinality as k (a, n)
                                          where k.n <= i.indnkeyatts order by k.n) as columns
        from pg_index i join pg_class c on c.oid = i.indrelid where i.indrelid = %s and i.indisvalid
    ), identity as (
        select * from i where i.indisreplident and i.indimmediate and i.relreplident = 'i'
    ), chosen as (
        select p.*, 1 as rank from i p
        where p.indisprimary and not exists (select from identity r where not p.columns <@ r.columns)
        union all
        select r.*, 2 from identity r
        order by rank limit 1
    )
    select k.attnum,
           x.amname <> 'btree' or (
               o.opcdefault and k.option = 0 and k.coll in (0, a.attcollation)
               and not exists (select from pg_amop p join pg_operator w on w.oid = p.amopopr
                               where p.amopfamily = o.opcfamily and p.amoplefttype = o.opcintype
                                 and p.amoprighttype = o.opcintype
                                 and (w.oprnamespace <> 'pg_catalog'::regnamespace
                                      or w.oprname <> (array['<', '<=', '=', '>=', '>'])[p.amopstrategy]))),
           k.option & 1 > 0, k.option & 2 > 0,
           (select json_object_agg(p.amopstrategy, array[quote_ident(n.nspname), w.oprname])
            from pg_amop p join pg_operator w on w.oid = p.amopopr join pg_namespace n on n.oid = w.oprnamespace
            where p.amopfamily = o.opcfamily and p.amoplefttype = o.opcintype and p.amoprighttype = o.opcintype),
           (select array[n.nspname, c.collname] from pg_collation c join pg_namespace n on n.oid = c.collnamespace
            where c.oid = k.coll and k.coll <> a.attcollation)
    from chosen i
    cross join lateral rows from (unnest(i.columns), unnest(i.indclass::oid[]), unnest(i.indoption::int2[]),
                                  unnest(i.indcollation::oid[])) with ordinality as k (attnum, class, option, coll, n)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    join pg_opclass o on o.oid = k.class join pg_am x on x.oid = o.opcmethod
    order by k.n
"""
# Foreign partitions are omitted, because their changes never arrive.
_LEAVES: Final = """
    select n.nspname, c.relname, c.oid::int8, pg_relation_filenode(c.oid)::int8
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and c.oid in (select %(oid)s::oid
                                        union all select t.relid from pg_partition_tree(%(oid)s) t where t.isleaf)
    order by c.oid
"""
_FINGERPRINT: Final = """
    select concat_ws(' ', c.oid, c.relreplident,
               (select string_agg(a.attnum || '/' || a.xmin, ' ' order by a.attnum) from pg_attribute a
                where a.attrelid = c.oid and a.attnum > 0),
               (select string_agg(i.indexrelid || '/' || i.xmin, ' ' order by i.indexrelid) from pg_index i
                where i.indrelid = c.oid and (i.indisprimary or i.indisreplident)),
               (select string_agg(t.relid::oid::text, ' ') from pg_partition_tree(c.oid) t),
               (select string_agg(l.oid || '/' || coalesce(pg_relation_filenode(l.oid), 0), ' ' order by l.oid)
                from pg_class l where l.oid in (select c.oid union all select t.relid from pg_partition_tree(c.oid) t)))
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


@dataclass(slots=True, frozen=True)
class ReadColumn:
    """A column, with the SQL that reads it.

    Attributes:
        cast: The type to which its values are cast before they become JSON, or None for no cast.
        base: The OID of its type. For a domain, that is the type below the domain.
        json: Whether its values are json, or arrays of json.
        wide: Whether its values may be TOASTed.
        narrow: Whether its values have a fixed length.
        changed: The ID of the transaction that last altered it, or None if it is as the table was created.
    """

    name: str
    type: str
    cast: str | None
    base: int
    json: bool = False
    wide: bool = True
    narrow: bool = False
    changed: int | None = None

    @property
    def of_t(self) -> sql.Composable:
        """The column in a query that calls the table `t`."""
        return sql.SQL("t.{}").format(sql.Identifier(self.name))

    @property
    def value(self) -> sql.Composable:
        """The expression from which JSON is made."""
        return sql.SQL("{}::{}").format(self.of_t, sql.SQL(self.cast)) if self.cast else self.of_t

    @property
    def shown(self) -> sql.Composable:
        return sql.SQL("{} as {}").format(self.value, sql.Identifier(self.name))

    @property
    def text(self) -> sql.Composable:
        """The expression for the text that `record ->> column` would give."""
        if self.base in _PLAIN_TEXT:
            return sql.SQL("{}::text").format(self.of_t)
        if self.base == JSON:
            return sql.SQL("({}::json #>> '{{}}')").format(one_line(sql.SQL("{}::text").format(self.of_t)))
        text = sql.SQL("(to_json({}) #>> '{{}}')").format(self.value)
        return one_line(text) if self.json else text

    @property
    def bytes(self) -> sql.Composable | None:
        """The expression for the approximate size of a value in bytes, or None if values are small."""
        if not self.wide:
            return None
        return sql.SQL("coalesce({}, 0)").format(_filled(_OCTETS.get(self.base, "pg_column_size({})"), self.of_t))

    @property
    def least_bytes(self) -> sql.Composable | None:
        """The expression for the least size of a value's JSON in bytes.

        The result is None if values are small, or if the size is unknown before the value is loaded.
        """
        if not self.wide or self.base not in _OCTETS:
            return None
        return sql.SQL("coalesce({}, 0)").format(_filled(_OCTETS[self.base], self.of_t))


def _filled(template: str, value: sql.Composable) -> sql.Composable:
    before, _, after = template.partition("{}")
    return sql.SQL(before) + value + sql.SQL(after)


def one_line(text: sql.Composable) -> sql.Composable:
    """Return SQL that replaces the newlines of JSON text with spaces. They are white space between tokens."""
    return sql.SQL(r"translate({}, E'\n\r', '  ')").format(text)


@dataclass(slots=True, frozen=True)
class KeyColumn:
    """A column of the key, with the order of its index.

    Attributes:
        ordinary: Whether the index has the order of `order by column`, with PostgreSQL's own operators.
        operators: The operators < <= = >= > in the order of btree's strategies 1 to 5. The operators of citext are in
            the schema of that extension.
    """

    column: ReadColumn
    ordinary: bool = True
    descending: bool = False
    nulls_first: bool = False
    operators: tuple[sql.Composable, ...] = ()
    collation: sql.Identifier | None = None

    @property
    def sorted(self) -> sql.Composable:
        """The expression that the order compares."""
        if self.collation is None:
            return self.column.of_t
        return sql.SQL("{} collate {}").format(self.column.of_t, self.collation)

    @property
    def order(self) -> sql.Composable:
        if self.ordinary:
            return self.column.of_t
        nulls = sql.SQL("nulls first" if self.nulls_first else "nulls last")
        return sql.SQL("{} using {} {}").format(self.sorted, self.operators[4 if self.descending else 0], nulls)

    def compared(self, strategy: int, text: str) -> sql.Composable:
        """Return SQL that compares the column with `text`: `column < text` for strategy 1, and so on.

        For a descending column, "less" means earlier in the order.
        """
        operator = self.operators[(6 - strategy if self.descending else strategy) - 1]
        return sql.SQL("{} {} {}::{}").format(self.sorted, operator, sql.Literal(text), sql.SQL(self.column.type))


@dataclass(slots=True, frozen=True)
class ReadShape:
    """A table, as its readers need to know it.

    Attributes:
        order: The key's columns. The table is read in their order, and its messages have this key. Empty without a key.
        leaves: Name, OID and file of each table that holds its rows.
        fingerprint: A text that changes whenever any of these attributes changes.
    """

    schema: str
    name: str
    columns: tuple[ReadColumn, ...]
    order: tuple[KeyColumn, ...]
    leaves: tuple[tuple[sql.Identifier, int, int | None], ...]
    fingerprint: str
    partitioned: bool = False

    @property
    def key(self) -> tuple[ReadColumn, ...]:
        return tuple(k.column for k in self.order)

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)

    @property
    def rows(self) -> sql.Composable:
        """The table for FROM, without the rows of tables that inherit from it."""
        return self.identifier if self.partitioned else sql.SQL("only {}").format(self.identifier)

    @property
    def oids(self) -> list[int]:
        return [oid for _, oid, _ in self.leaves]


def describe(connection: Connection, schema: str, name: str) -> ReadShape:
    """Describe the table as it is now, or raise UsageError if there is no such table."""
    with source_errors():
        found = connection.execute(
            "select c.oid::int8, c.relkind::text from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = %s and c.relname = %s and c.relkind in ('r', 'p')",
            (schema, name),
        ).fetchone()
        if found is None:
            given = f"{schema}.{name}" if name else schema
            near = nearest(connection, given)
            hint = None if name else "Write a table with its schema, as in public.orders."
            raise UsageError(f"the source has no table {given}{near}", hint=hint)
        oid, kind = found
        columns = {row[-1]: ReadColumn(*row[:-1]) for row in connection.execute(_COLUMNS, {"oid": oid}).fetchall()}
        key = connection.execute(_KEY, (oid,)).fetchall()
        leaves = connection.execute(_LEAVES, {"oid": oid}).fetchall()
        fingerprint = connection.execute(_FINGERPRINT, (schema, name)).fetchone()
        order = tuple(_key_column(columns[row[0]], row) for row in key) if all(row[0] in columns for row in key) else ()
    return ReadShape(
        schema,
        name,
        tuple(columns[number] for number in sorted(columns)),
        order,
        tuple((sql.Identifier(leaf[0], leaf[1]), leaf[2], leaf[3]) for leaf in leaves),
        fingerprint[0] if fingerprint else "",
        kind == "p",
    )


def _key_column(column: ReadColumn, row: tuple[Any, ...]) -> KeyColumn:
    _, ordinary, descending, nulls_first, named, collation = row
    if ordinary:
        return KeyColumn(column, operators=tuple(sql.SQL(f"operator(pg_catalog.{name})") for name in _ORDINARY))
    operators = tuple(sql.SQL(f"operator({'.'.join(named[str(n)])})") for n in range(1, 6))
    return KeyColumn(
        column, False, descending, nulls_first, operators, sql.Identifier(*collation) if collation else None
    )


def lock(connection: Connection, shape: ReadShape) -> None:
    """Prevent any ALTER of the table until the transaction ends.

    Call this function before the transaction takes its snapshot, because a snapshot sees no rows of a table that is
    rewritten later.
    """
    with source_errors():
        connection.execute(sql.SQL("lock table {} in access share mode").format(shape.rows))


def begin_locked(connection: Connection, shape: ReadShape) -> None:
    """Give the new transaction a single snapshot, and lock() the table before that snapshot is taken."""
    with source_errors():
        connection.execute(
            sql.SQL(
                "set transaction isolation level repeatable read, read only; lock table {} in access share mode"
            ).format(shape.rows)
        )


def is_still(connection: Connection, shape: ReadShape) -> bool:
    """Return whether the table has not been altered since it was described."""
    with source_errors():
        row = connection.execute(_FINGERPRINT, (shape.schema, shape.name)).fetchone()
    return row is not None and row[0] == shape.fingerprint


def rewritten(before: ReadShape, after: ReadShape) -> bool:
    """Return whether rows may look newer in `after` although they have not changed since `before`.

    ALTER TABLE may have rewritten them, for example to change a column's type, or a partition may have been attached.
    """
    files = {(oid, file) for _, oid, file in before.leaves}
    return any((oid, file) not in files for _, oid, file in after.leaves)


def altered_since(connection: Connection, shape: ReadShape, since: Snapshot) -> bool:
    """Return whether a transaction that the snapshot does not see altered a table that holds the rows."""
    query = "select xmin::text::int8 from pg_class where oid = any (%s::oid[])"
    with source_errors():
        return any(not since.sees(xid) for (xid,) in connection.execute(query, (shape.oids,)).fetchall())


def replaced_since_snapshot(connection: Connection, shape: ReadShape) -> bool:
    """Return whether the table was rewritten or replaced after the transaction's snapshot, which then hides its rows.

    Queries of the catalogue show the state of the snapshot. Functions such as pg_relation_filenode() show the present
    state.
    """
    query = (
        "select coalesce(bool_or(c.relfilenode is distinct from pg_relation_filenode(c.oid)), false),"
        " to_regclass(%s)::oid is distinct from split_part(%s, ' ', 1)::oid"
        " from pg_class c where c.oid = any (%s::oid[])"
    )
    named = shape.identifier.as_string(connection)
    with source_errors():
        row = connection.execute(query, (named, shape.fingerprint, shape.oids)).fetchone()
    return row is None or row[0] or row[1]


def writers(connection: Connection, shape: ReadShape) -> dict[str, str]:
    """Return the transactions that are writing into the table, each with a description for people."""
    with source_errors():
        return dict(connection.execute(_WRITERS, (shape.oids,)).fetchall())


def snapshot(connection: Connection) -> Snapshot:
    """Return the snapshot of the session's transaction."""
    with source_errors():
        row = connection.execute("select pg_current_snapshot()::text").fetchone()
    return Snapshot.parse(row[0] if row else "")


def estimate(connection: Connection, shape: ReadShape) -> int:
    """Return the planner's estimate of the number of rows."""
    with source_errors():
        row = connection.execute(sql.SQL("explain (format json) select from {}").format(shape.rows)).fetchone()
    return round(row[0][0]["Plan"]["Plan Rows"]) if row else 0
