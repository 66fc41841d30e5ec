"""Look up the tables of the source that a consumer's patterns name or cover. This module never changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from psycopg import sql

from cdcbridge.database import Connection, source_errors
from cdcbridge.routing.patterns import is_name, like, take, taken
from cdcbridge.routing.router import IDENTITY_SCHEMA
from cdcbridge.schemas import both


@dataclass(slots=True, frozen=True)
class Column:
    """A column of a table.

    Attributes:
        generated: '' for an ordinary column, 's' for a stored and 'v' for a virtual generated column.
        type: The type as SQL writes it. For a domain, that is its base type.
        kind: The kind of its value in `record`: number, text, boolean, list, or any.
        labels: The labels of an enum.
    """

    name: str
    generated: str
    floating: bool
    type: str = ""
    kind: str = "any"
    nullable: bool = True
    labels: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class Index:
    """A unique index of a table.

    Attributes:
        usable: Whether PostgreSQL uses it as replica identity if it is the primary key or was chosen.
        suitable: Whether `replica identity using index` may name it.
    """

    name: str
    columns: tuple[str, ...]
    primary: bool
    chosen: bool
    usable: bool
    suitable: bool


@dataclass(slots=True, frozen=True)
class Table:
    """A table that a consumer's pattern names or covers.

    For a partitioned table, this is the root, and `leaves` contains the partitions with rows.
    """

    schema: str
    name: str
    oid: int
    kind: str
    persistence: str
    partition: bool
    replica_identity: str
    columns: tuple[Column, ...]
    indexes: tuple[Index, ...]
    children: tuple[str, ...] = ()
    leaves: tuple[Table, ...] = ()

    @property
    def topic(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)

    @property
    def full(self) -> bool:
        return self.replica_identity == "f"

    @property
    def logged(self) -> bool:
        """Return whether the WAL contains its changes."""
        return self.kind == "r" and self.persistence == "p"

    @property
    def primary_key(self) -> Index | None:
        return next((index for index in self.indexes if index.primary), None)

    @property
    def identity_index(self) -> Index | None:
        """The index that identifies old rows, by the rules of the server.

        For example, a deferrable primary key does not identify rows.

        Source: PostgreSQL, RelationGetIndexList() and RelationGetReplicaIndex().
        """
        wanted = {"d": "primary", "i": "chosen"}.get(self.replica_identity)
        if wanted is None:
            return None
        return next((index for index in self.indexes if index.usable and getattr(index, wanted)), None)

    @property
    def identified(self) -> bool:
        return self.full or self.identity_index is not None

    @property
    def identity(self) -> frozenset[str]:
        """The columns of an old row that are both in the WAL and in `record`."""
        if self.full:
            return frozenset(column.name for column in self.columns if not column.generated)
        index = self.identity_index
        return frozenset(index.columns) - set(self.generated) if index else frozenset()

    @property
    def generated(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.generated)

    @property
    def virtual(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.generated == "v")

    @property
    def floats(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.floating)


# The kind of JSON that to_jsonb() makes from a value. A type of an extension may have a cast to json.
_KIND: Final = """case when b.oid in (20, 21, 23, 700, 701, 1700) then 'number' when b.oid = 16 then 'boolean'
    when b.typtype = 'd' or b.oid in (114, 3802) then 'any'
    when b.typtype = 'b' and b.typcategory <> 'A' and b.oid >= 16384 then 'any'
    when b.typcategory = 'A' then 'list' else 'text' end"""
# The conditions are those of RelationGetIndexList(). An index that it skips cannot be the replica identity.
_TABLES: Final = """
    select n.nspname, c.relname, c.oid::int8, c.relkind::text, c.relpersistence::text, c.relispartition,
           c.relreplident::text,
           (select coalesce(json_agg(json_build_array(a.attname, a.attgenerated::text,
                                                      a.atttypid in (700, 701, 1700),
                                                      format_type(b.oid, a.atttypmod), {kind}, not a.attnotnull,
                                                      array(select e.enumlabel from pg_enum e where e.enumtypid = b.oid
                                                            order by e.enumsortorder)) order by a.attnum), '[]')
            from pg_attribute a join pg_type t on t.oid = a.atttypid
            left join pg_type d on d.oid = t.typbasetype
            join pg_type b on b.oid = coalesce(nullif(d.typbasetype, 0), nullif(t.typbasetype, 0), t.oid)
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
           (select coalesce(json_agg(json_build_array(
                x.relname, k.names, i.indisprimary, i.indisreplident,
                i.indislive and i.indisvalid and i.indimmediate and i.indpred is null,
                i.indislive and i.indisvalid and i.indimmediate and i.indpred is null and k.suitable)
                order by i.indisprimary desc, x.relname), '[]')
            from pg_index i join pg_class x on x.oid = i.indexrelid
            cross join lateral (
                select coalesce(json_agg(a.attname order by u.n) filter (where a.attnum is not null), '[]') as names,
                       bool_and(coalesce(a.attnotnull and a.attgenerated = '', false)) as suitable
                from unnest(i.indkey::int2[]) with ordinality u (attnum, n)
                left join pg_attribute a on a.attrelid = c.oid and a.attnum = u.attnum and a.attnum > 0
                where u.n <= i.indnkeyatts) k
            where i.indrelid = c.oid and i.indisunique)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'f', 'v', 'm') and {condition}
    order by 1, 2
"""
_LEAVES: Final = """
    select r.oid::int8, l.relid::oid::int8 from unnest(%s::oid[]) r (oid), pg_partition_tree(r.oid) l
    where l.isleaf and l.relid <> r.oid
"""
_CHILDREN: Final = """
    with recursive below (root, oid) as (
        select inhparent, inhrelid from pg_inherits where inhparent = any (%s::oid[])
        union select b.root, i.inhrelid from below b join pg_inherits i on i.inhparent = b.oid
    )
    select b.root::int8, array_agg(n.nspname || '.' || c.relname order by 1)
    from below b join pg_class c on c.oid = b.oid join pg_namespace n on n.oid = c.relnamespace group by b.root
"""
# Topics are split at their first dot, so a table has no topic if the name of its schema contains a dot.
_COVERED: Final = """
    n.nspname || '.' || c.relname like %s and n.nspname <> all (%s) and n.nspname !~ '^pg_'
    and n.nspname <> 'information_schema' and position('.' in n.nspname) = 0
    and c.relkind in ('r', 'p') and c.relpersistence = 'p' and not c.relispartition
"""


def find_tables(connection: Connection, pattern: str, own_schema: str) -> list[Table]:
    """Look up the tables of a pattern.

    A name finds any kind of relation. A wildcard finds the tables that can be published. For a partitioned table it
    finds only the root.
    """
    schema, _, name = pattern.partition(".")
    if is_name(pattern):
        condition = "c.relpersistence <> 't' and n.nspname = %s and c.relname = %s"
        found = _look(connection, condition, (schema, name))
    else:
        found = _look(connection, _COVERED, (like(pattern), [*both(own_schema), IDENTITY_SCHEMA]))
    return _with_children(connection, _with_leaves(connection, found))


def tables_of(connection: Connection, patterns: Sequence[str], own_schema: str) -> list[Table]:
    """Look up the tables that a consumer's patterns take, each once."""
    found = [t for pattern in taken(patterns) for t in find_tables(connection, pattern, own_schema)]
    return list({table.oid: table for table in found if take(patterns, table.topic)}.values())


def dotted_schemas(connection: Connection) -> list[str]:
    """Return the schemas with tables and with a dot in their name. No topic can be written for their tables."""
    query = (
        "select nspname from pg_namespace n where position('.' in nspname) > 0 and exists (select from pg_class c"
        " where c.relnamespace = n.oid and c.relkind in ('r', 'p') and c.relpersistence = 'p') order by 1"
    )
    with source_errors():
        return [name for (name,) in connection.execute(query).fetchall()]


def _look(connection: Connection, condition: str, given: Sequence[Any]) -> list[Table]:
    with source_errors():
        rows = connection.execute(_TABLES.format(condition=condition, kind=_KIND).encode(), given).fetchall()
    found = []
    for schema, name, oid, kind, persistence, partition, identity, columns, indexes in rows:
        made_columns = tuple(_column(*column) for column in columns)
        made_indexes = tuple(Index(index, tuple(keys), *more) for index, keys, *more in indexes)
        found.append(Table(schema, name, oid, kind, persistence, partition, identity, made_columns, made_indexes))
    return found


def _column(
    name: str, generated: str, floating: bool, type_: str, kind: str, nullable: bool, labels: list[str]
) -> Column:
    return Column(name, generated, floating, type_, kind, nullable, tuple(labels))


def _with_leaves(connection: Connection, tables: list[Table]) -> list[Table]:
    roots = [table.oid for table in tables if table.kind == "p"]
    if not roots:
        return tables
    with source_errors():
        pairs = connection.execute(_LEAVES, (roots,)).fetchall()
    known = {leaf.oid: leaf for leaf in _look(connection, "c.oid = any (%s::oid[])", ([leaf for _, leaf in pairs],))}
    leaves: dict[int, list[Table]] = {}
    for root, leaf in pairs:
        if leaf in known:
            leaves.setdefault(root, []).append(known[leaf])
    return [replace(table, leaves=tuple(leaves.get(table.oid, ()))) for table in tables]


def _with_children(connection: Connection, tables: list[Table]) -> list[Table]:
    with source_errors():
        rows = connection.execute(_CHILDREN, ([table.oid for table in tables if table.kind == "r"],)).fetchall()
    children = {root: tuple(names) for root, names in rows}
    return [replace(table, children=children.get(table.oid, ())) for table in tables]
