"""Look up in the source's catalogue how tables are defined now.

This module never keeps a result.

Source: PostgreSQL manual, "System Catalogs" (pg_class, pg_attribute, pg_index, pg_inherits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from cdcbridge.changes.events import Relation
from cdcbridge.changes.keys import key_columns
from cdcbridge.changes.wal2json import TableShape
from cdcbridge.database import Connection, source_errors
from cdcbridge.lsn import parse_lsn

NEVER: Final = 1 << 64  # above every LSN
_WAL_END: Final = (
    "select (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_insert_lsn() end)::text"
)
# The server uses a primary key as replica identity only if the key is not deferrable (indimmediate).
_INDEX_COLUMNS: Final = """
    (select array_agg(a.attname::text order by k.n)
     from pg_index i cross join lateral unnest(i.indkey::int2[]) with ordinality as k (attnum, n)
     join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
     where i.indrelid = t.{table} and {which} and i.indisvalid and k.n <= i.indnkeyatts)
"""
# The last column but one is Found.since: the youngest transaction that changed the table's definition, or its place in
# a partition tree.
_TABLES: Final = f"""
    with named as (
        select c.oid, n.nspname, c.relname, c.relkind, c.relispartition, c.relreplident, c.xmin as changed,
               case when c.relispartition then pg_partition_root(c.oid) else c.oid end as root
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'p', 'f', 'm', 'v') and {{which}}
    ), t as (
        select t.*, rn.nspname as root_schema, rc.relname as root_table
        from named t join pg_class rc on rc.oid = t.root join pg_namespace rn on rn.oid = rc.relnamespace
    )
    select t.nspname::text, t.relname::text, t.relkind::text, t.relispartition, t.relreplident::text,
           t.root_schema::text, t.root_table::text,
           {_INDEX_COLUMNS.format(table="root", which="i.indisprimary")},
           case t.relreplident
               when 'd' then {_INDEX_COLUMNS.format(table="oid", which="i.indisprimary and i.indimmediate")}
               when 'i' then {_INDEX_COLUMNS.format(table="oid", which="i.indisreplident and i.indimmediate")} end,
           a.columns, a.generated, a.toastable, a.attributes,
           (select x::text::int8 from (select t.changed as x union all select b.xmin from pg_attribute b
                                       where b.attrelid = t.oid and b.attnum > 0
                                       union all select i.xmin from pg_inherits i where i.inhrelid = t.oid
                                       union all select i.xmin from pg_index i where i.indrelid = t.oid
                                       and (i.indisprimary or i.indisreplident)) y
            order by age(x) limit 1),
           (select i.xmin::text::int8 from pg_inherits i where i.inhrelid = t.oid limit 1)
    from t cross join lateral (
        select coalesce(array_agg(a.attname::text order by a.attnum)
                        filter (where not a.attisdropped and a.attgenerated = ''), '{{{{}}}}') as columns,
               coalesce(array_agg(a.attname::text) filter (where not a.attisdropped and a.attgenerated <> ''),
                        '{{{{}}}}') as generated,
               coalesce(json_object_agg(a.attname, array[a.attnum, a.xmin::text::int8] order by a.attnum)
                        filter (where not a.attisdropped and a.attgenerated = '' and a.attlen = -1), '{{{{}}}}')
                   as toastable,
               coalesce(json_object_agg(a.attnum, a.xmin::text::int8), '{{{{}}}}') as attributes
        from pg_attribute a where a.attrelid = t.oid and a.attnum > 0) a
"""  # noqa: S608 - made of constants alone
_ONE: Final = _TABLES.format(which="n.nspname = %(schema)s and c.relname = %(table)s")
_ALL: Final = (
    _TABLES.format(which="c.relkind in ('r', 'p') and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'")
    + """
    where %(everything)s or t.root_schema = any (%(schemas)s) or exists (
        select from unnest(%(table_schemas)s::text[], %(table_names)s::text[]) as w (schema, name)
        where w.schema = t.root_schema and w.name = t.root_table)
"""
)
_ROOTS: Final = """
    select n.nspname, c.relname, a.attname, a.atttypid::int8, a.attlen = -1, a.xmin::text::int8
    from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid
    where c.relkind = 'p' and not c.relispartition and a.attnum > 0
"""


class Look(NamedTuple):
    """The result of a query, with two LSNs that bound which commits the query saw.

    Attributes:
        covered: The query saw every commit below this LSN.
        rows: The rows of the result.
        looked_at: The query saw no commit above this LSN.
    """

    covered: int
    rows: list[tuple[Any, ...]]
    looked_at: int


class Found(NamedTuple):
    """A table as it is defined now.

    Attributes:
        toastable: For each column that may be TOASTed, its number and the ID of the transaction that last changed it.
        attributes: By column number, the ID of that transaction, for dropped columns too.
        since: The ID of the youngest transaction that changed the table's definition.
        attached: The ID of the transaction that made the table a partition, or None.
    """

    schema: str
    table: str
    kind: str
    partition: bool
    replica_identity: str
    root_schema: str
    root_table: str
    primary_key: list[str] | None
    identity: list[str] | None
    columns: list[str]
    generated: list[str]
    toastable: dict[str, list[int]]
    attributes: dict[str, int]
    since: int
    attached: int | None

    def definition(self, *, captured: bool) -> TableShape:
        """Return the definition in the form that the decoders use.

        Only ordinary and partitioned tables are captured, and not, for example, materialized views.
        """
        primary, identity = tuple(self.primary_key or ()), tuple(self.identity or ())
        full = self.replica_identity == "f"
        relation = Relation(
            self.schema,
            self.table,
            f"{self.root_schema}.{self.root_table}",
            key_columns(primary, identity, full=full),
            frozenset(identity),
            full,
            frozenset(self.columns),
        )
        return TableShape(
            relation,
            captured and self.kind in ("r", "p"),
            self.partition,
            frozenset(self.generated),
            tuple(self.toastable),
            primary_key=primary,
            identity_order=identity,
            replica_identity=self.replica_identity,
        )


def ask(connection: Connection, query: str, parameters: dict[str, Any] | None = None) -> Look:
    """Run a query, and look up the end of the WAL before and after it."""
    with source_errors():
        before = connection.execute(_WAL_END).fetchone()
        rows = connection.execute(query.encode(), parameters).fetchall()
        after = connection.execute(_WAL_END).fetchone()
    return Look(parse_lsn(before[0]) if before else 0, rows, parse_lsn(after[0]) if after else NEVER)


def one_table(connection: Connection, schema: str, table: str) -> Look:
    """Return the row for Found(*row) of one table, or no row if there is no such table."""
    return ask(connection, _ONE, {"schema": schema, "table": table})


def all_tables(connection: Connection, patterns: Sequence[str]) -> Look:
    """Return rows for Found(*row): every table that the patterns name or cover, and every partition of these tables."""
    pairs = [pattern.split(".", 1) for pattern in patterns]
    named = [(schema, table) for schema, table in pairs if table != "*"]
    given = {
        "everything": "*.*" in patterns,
        "schemas": [schema for schema, table in pairs if table == "*"],
        "table_schemas": [schema for schema, _ in named],
        "table_names": [table for _, table in named],
    }
    return ask(connection, _ALL, given)


def partitioned_tables(connection: Connection) -> Look:
    """Return the columns of all partitioned tables that are not partitions themselves.

    Each row contains schema, table and column, and the OID of the column's type. Then follow whether an UPDATE may omit
    the column, and the ID of the transaction that last changed it.
    """
    return ask(connection, _ROOTS)
