"""The tables of the source that a consumer's patterns name or cover. Part of the rim; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdcbridge.database import Connection, source_errors


@dataclass(slots=True, frozen=True)
class Table:
    """A table that a consumer's pattern names or covers; for partitions, only their root."""

    schema: str
    name: str
    oid: int
    kind: str
    identity: frozenset[str]
    full: bool
    generated: tuple[str, ...]
    floats: tuple[str, ...]
    partition: bool
    persistence: str
    leaves_without_identity: tuple[str, ...]

    @property
    def topic(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


_TABLES: Final = """
    select n.nspname, c.relname, c.oid, c.relkind,
           case c.relreplident
               when 'f' then (select array_agg(a.attname::text) from pg_attribute a
                              where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
               when 'n' then null
               else (select array_agg(a.attname::text) from pg_index i
                     join pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey)
                     where i.indrelid = c.oid and i.indisvalid
                       and case c.relreplident when 'd' then i.indisprimary else i.indisreplident end)
           end,
           c.relreplident = 'f',
           (select coalesce(array_agg(a.attname::text order by a.attnum), '{{}}') from pg_attribute a
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> ''),
           (select coalesce(array_agg(a.attname::text order by a.attnum), '{{}}') from pg_attribute a
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.atttypid in (700, 701, 1700)),
           c.relispartition, c.relpersistence,
           (select coalesce(array_agg(l.relid::regclass::text order by 1), '{{}}')
            from pg_partition_tree(c.oid) l join pg_class p on p.oid = l.relid
            where c.relkind = 'p' and l.isleaf and p.relreplident <> 'f' and not exists (
                select from pg_index i where i.indrelid = p.oid and i.indisvalid
                  and case p.relreplident when 'd' then i.indisprimary else i.indisreplident end))
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'f', 'v', 'm') and c.relpersistence <> 't'
      and n.nspname !~ '^pg_' and n.nspname <> 'information_schema' and {condition}
    order by 1, 2
"""


def find_tables(connection: Connection, pattern: str, own_schema: str) -> list[Table]:
    """The tables that a pattern names (any kind of relation) or covers (tables that can be published, root only)."""
    schema, _, name = pattern.partition(".")
    if name != "*":
        condition, given = "n.nspname = %s and c.relname = %s", (schema, name)
    else:
        condition = "(%s = '*' or n.nspname = %s) and n.nspname <> %s and c.relkind in ('r', 'p')"
        condition += " and c.relpersistence = 'p' and not c.relispartition"
        given = (schema, schema, own_schema)  # type: ignore[assignment]
    with source_errors():
        rows = connection.execute(_TABLES.format(condition=condition).encode(), given).fetchall()
    return [
        Table(
            r[0],
            r[1],
            r[2],
            r[3],
            frozenset(r[4] or ()),
            r[5],
            tuple(r[6]),
            tuple(r[7]),
            r[8],
            r[9],
            tuple(r[10]),
        )
        for r in rows
    ]
