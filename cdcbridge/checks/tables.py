"""Find the problems of the tables that consumers name, and give a fix for each.

This module reads the source and never changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from psycopg import sql

from cdcbridge.checks.columns import column_problems
from cdcbridge.checks.filters import filter_problems
from cdcbridge.checks.identity import identity_fix, identity_problems, identity_trouble
from cdcbridge.config import Config, Consumer
from cdcbridge.database import Connection
from cdcbridge.problem import Problem
from cdcbridge.routing.patterns import is_name, left_out, matches, take, taken, whole
from cdcbridge.schemas import both
from cdcbridge.source.no_table import nearest
from cdcbridge.source.tables import Table, dotted_schemas, find_tables, tables_of

_VIRTUAL_SINCE: Final = 180000
_WRITES: Final = frozenset({"update", "delete"})
_STRANGERS: Final = """
    select c.relname, rn.nspname, r.relname
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    join pg_class r on r.oid = pg_partition_root(c.oid) join pg_namespace rn on rn.oid = r.relnamespace
    where c.relispartition and c.relkind in ('r', 'p') and n.nspname = %s and rn.oid <> n.oid
    order by 1
"""
_KINDS: Final = {"f": "a foreign table", "v": "a view", "m": "a materialized view"}


def consumer_problems(config: Config, connection: Connection, consumer: Consumer, plugin: str) -> Iterator[Problem]:
    """Yield the problems of the tables that a consumer names, and of their columns."""
    found: list[Table] = []
    passed: list[Table] = []
    for pattern in taken(consumer.tables):
        tables = find_tables(connection, pattern, config.store.schema_)
        kept = [table for table in tables if take(consumer.tables, table.topic)]
        yield from _pattern(config, connection, consumer, pattern, tables, kept, plugin)
        found += [table for table in kept if table.kind in ("r", "p")]
        passed += [table for table in tables if table not in kept]
    yield from _leaving_out(config, connection, consumer, passed, plugin)
    tables = list({table.oid: table for table in found}.values())
    yield from column_problems(consumer, tables)
    yield from filter_problems(consumer, tables)


def _pattern(
    config: Config,
    connection: Connection,
    consumer: Consumer,
    pattern: str,
    tables: list[Table],
    kept: list[Table],
    plugin: str,
) -> Iterator[Problem]:
    """Check one pattern. `tables` are all tables that match it, and `kept` are those that no `!` pattern leaves out."""
    schema, _, name = pattern.partition(".")
    if schema in both(config.store.schema_):
        yield Problem(
            "own_schema",
            "error",
            pattern,
            "the bridge never captures its own schema",
            "Leave it out of the consumer's tables.",
        )
        return
    if is_name(pattern):
        if not tables:
            yield Problem(
                "table_missing",
                "error",
                pattern,
                f"consumer {consumer.name}: there is no table {pattern}{nearest(connection, pattern)}",
                "Create it, or correct the consumer's tables. Names are as in pg_class, without quotes. A schema's name"
                " ends at the first dot.",
            )
    elif schema != "*" and not connection.execute("select to_regnamespace(quote_ident(%s))", (schema,)).fetchone()[0]:  # type: ignore[index]
        yield Problem(
            "schema_missing",
            "error",
            pattern,
            f"consumer {consumer.name}: there is no schema {schema}",
            f"create schema {sql.Identifier(schema).as_string(connection)};",
        )
    elif not kept:
        of = f" besides {', '.join(t.topic for t in tables[:3])}, which `tables` leaves out" if tables else ""
        yield Problem(
            "pattern_empty",
            "warning",
            pattern,
            f"consumer {consumer.name}: the pattern {pattern} matches no table{of}",
            "Ignore this if the tables are created later. Names are as in pg_class, without quotes.",
        )
    for table in kept:
        yield from _table(connection, consumer, table, plugin)
    if pattern == "*.*":
        yield from _dotted(connection, consumer)
    elif name == "*":
        yield from _strangers(config, connection, consumer, schema)


def _leaving_out(
    config: Config, connection: Connection, consumer: Consumer, passed: list[Table], plugin: str
) -> Iterator[Problem]:
    """Find `!` patterns that leave nothing out, and tables that are published although no consumer takes them.

    `passed` are the tables that the other patterns match and that a `!` pattern leaves out.
    """
    for pattern in left_out(consumer.tables):
        if not any(matches(pattern, table.topic) for table in passed):
            yield Problem(
                "pattern_empty",
                "warning",
                f"!{pattern}",
                f"consumer {consumer.name}: !{pattern} leaves nothing out: no table of the other patterns matches it",
                "Ignore this if such tables are created later. Otherwise correct the pattern.",
            )
    if plugin == "pgoutput" and _WRITES & set(consumer.operations):
        yield from _published_beside(config, connection, consumer)


def _published_beside(config: Config, connection: Connection, consumer: Consumer) -> Iterator[Problem]:
    """Find published tables that no consumer takes and that have no replica identity.

    A publication cannot leave out single tables of a schema. PostgreSQL would therefore refuse the application's UPDATE
    of such a table.
    """
    strict = connection.info.server_version >= _VIRTUAL_SINCE
    for pattern in whole(consumer.tables):
        for table in find_tables(connection, pattern, config.store.schema_) if not is_name(pattern) else ():
            without = [x for x in (table, *table.leaves) if identity_trouble(x, strict=strict)]
            without = [x for x in without if x is table or x.logged]
            if not without or any(take(other.tables, table.topic) for other in config.consumers):
                continue
            fixes = [identity_fix(x, (), strict=strict).partition(" -- ")[0] for x in without]
            trouble = identity_trouble(without[0], strict=strict)
            yield Problem(
                "replica_identity",
                "error",
                table.topic,
                f"consumer {consumer.name} does not take {table.topic}, but for its other tables the publication has"
                f" all of {pattern}, and PostgreSQL would refuse UPDATE and DELETE of {table.topic}: {trouble}",
                f"{' '.join(fixes)} -- or name the consumer's tables one by one",
            )


def _dotted(connection: Connection, consumer: Consumer) -> Iterator[Problem]:
    """Find schemas whose name has a dot, for example `a.b`: a topic's schema ends at the first dot."""
    for schema in dotted_schemas(connection):
        old, new = (sql.Identifier(name).as_string(connection) for name in (schema, schema.replace(".", "_")))
        yield Problem(
            "schema_dot",
            "error",
            schema,
            f"consumer {consumer.name} takes every table, and the name of the schema {schema} has a dot: a topic's"
            " schema ends at the first dot, so the tables there cannot be named",
            f"alter schema {old} rename to {new}; -- or name the other schemas one by one",
        )


def _strangers(config: Config, connection: Connection, consumer: Consumer, schema: str) -> Iterator[Problem]:
    """Find partitions in the consumer's schema whose root is in another schema and is taken by no consumer.

    Changes of a partition have the topic of its root. For example, "public.*" does not take public.leaf if that is a
    partition of s.root.
    """
    for leaf, root_schema, root in connection.execute(_STRANGERS, (schema,)).fetchall():
        if not any(take(other.tables, f"{root_schema}.{root}") for other in config.consumers):
            name = sql.Identifier(schema, leaf).as_string(connection)
            home = sql.Identifier(root_schema).as_string(connection)
            yield Problem(
                "partition_elsewhere",
                "error",
                f"{schema}.{leaf}",
                f"consumer {consumer.name} takes {schema}.*, and {schema}.{leaf} is a partition of"
                f" {root_schema}.{root}, which no consumer takes: changes of its rows have the topic of the root",
                f"alter table {name} set schema {home}; -- or name {root_schema}.{root} in the consumer's tables",
            )


def _table(connection: Connection, consumer: Consumer, table: Table, plugin: str) -> Iterator[Problem]:
    name = table.identifier.as_string(connection)
    if table.kind not in ("r", "p"):
        message = f"consumer {consumer.name}: {table.topic} is {_KINDS[table.kind]}, and its changes are not in the WAL"
        yield Problem("not_a_table", "error", table.topic, message, "Leave it out of the consumer's tables.")
        return
    if table.partition:
        root = _root(connection, table)
        message = f"consumer {consumer.name}: {table.topic} is a partition of {root}"
        yield Problem("not_a_table", "error", table.topic, message, f"Write {root} in the consumer's tables.")
        return
    if table.persistence != "p":
        message = f"consumer {consumer.name}: {table.topic} is unlogged: its changes are not in the WAL"
        yield Problem(
            "not_a_table", "error", table.topic, message, f"alter table {name} set logged; -- or leave it out"
        )
        return
    strict = plugin == "pgoutput" and connection.info.server_version >= _VIRTUAL_SINCE
    yield from identity_problems(consumer, table, strict=strict)
    yield from _left_out(connection, consumer, table)
    readable = connection.execute("select has_table_privilege(%s::oid, 'select')", (table.oid,)).fetchone()
    if consumer.start == "snapshot" and readable == (False,):
        yield Problem(
            "privilege_select",
            "error",
            table.topic,
            f"consumer {consumer.name} has start: snapshot, and this role may not read {table.topic}",
            f"grant select on {name} to {_role(connection)};",
        )
    if table.generated:
        yield Problem(
            "generated_columns",
            "warning",
            table.topic,
            f"generated columns are not in record: {', '.join(table.generated)}",
            "Ignore this unless a consumer needs them.",
        )


def _left_out(connection: Connection, consumer: Consumer, table: Table) -> Iterator[Problem]:
    """Find rows that a query of the table returns, but that its consumers do not get.

    These are the rows of partitions that are foreign or unlogged, and of other tables that inherit from the table.
    """
    foreign = [leaf for leaf in table.leaves if leaf.kind == "f"]
    if foreign:
        yield Problem(
            "foreign_partition",
            "warning",
            table.topic,
            f"consumer {consumer.name}: partitions of {table.topic} are foreign tables: {_names(foreign)}. Their"
            " changes are not in this server's WAL, and their rows are in no snapshot",
            "Ignore this unless a consumer needs these rows. Then capture them at the foreign server.",
        )
    unlogged = [leaf for leaf in table.leaves if leaf.kind == "r" and leaf.persistence != "p"]
    if unlogged:
        yield Problem(
            "unlogged_partition",
            "warning",
            table.topic,
            f"consumer {consumer.name}: partitions of {table.topic} are unlogged: {_names(unlogged)}. Their changes are"
            " not in the WAL, and their rows are in no snapshot",
            " ".join(f"alter table {leaf.identifier.as_string(connection)} set logged;" for leaf in unlogged),
        )
    if not all(take(consumer.tables, child) for child in table.children):
        yield Problem(
            "inheritance_children",
            "warning",
            table.topic,
            f"consumer {consumer.name}: other tables inherit from {table.topic}: {', '.join(table.children)}. Each"
            f" table is a topic of its own, and {table.topic} is that table alone",
            "Ignore this unless a consumer needs these rows. Then name these tables, too.",
        )


def _names(tables: list[Table]) -> str:
    return ", ".join(table.topic for table in tables)


def _root(connection: Connection, table: Table) -> str:
    query = (
        "select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where c.oid = pg_partition_root(%s::oid)"
    )
    row = connection.execute(query, (table.oid,)).fetchone()
    return str(row[0]) if row else ""


def special_floats(config: Config, connection: Connection) -> list[Problem]:
    """Return the tables with columns whose NaN and ±Infinity an old wal2json sends as null."""
    found = [t for c in config.consumers for t in tables_of(connection, c.tables, config.store.schema_)]
    tables = {table.oid: table for table in found}.values()
    return [
        Problem(
            "wal2json_special_numbers",
            "warning",
            table.topic,
            f"this wal2json sends NaN and ±Infinity of {', '.join(table.floats)} as null",
            "Install wal2json 2.6 or newer, or set source.plugin to pgoutput.",
        )
        for table in tables
        if table.floats
    ]


def _role(connection: Connection) -> str:
    row = connection.execute("select quote_ident(current_user)").fetchone()
    return str(row[0]) if row else ""
