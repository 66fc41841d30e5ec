"""What is wrong with the tables that consumers name, each with its mend. Part of the rim; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from cdcbridge.config import Config, Consumer
from cdcbridge.database import Connection
from cdcbridge.problem import Problem
from cdcbridge.tables import Table, find_tables


def pattern_problems(
    config: Config, connection: Connection, consumer: Consumer, pattern: str, plugin: str
) -> Iterator[Problem]:
    """What is wrong with a table or pattern that a consumer names."""
    tables = find_tables(connection, pattern, config.store.schema_)
    schema, _, name = pattern.partition(".")
    if schema == config.store.schema_:
        yield Problem("own_schema", "error", pattern, "the bridge's own schema is never captured", "Leave it out.")
        return
    if name != "*":
        if not tables:
            yield Problem(
                "table_missing",
                "error",
                pattern,
                f"consumer {consumer.name}: there is no table {pattern}",
                "Create it, or mend the consumer's tables. Names are as in pg_class, without quotes.",
            )
    elif schema != "*" and not connection.execute("select to_regnamespace(quote_ident(%s))", (schema,)).fetchone()[0]:  # type: ignore[index]
        yield Problem(
            "schema_missing",
            "error",
            pattern,
            f"consumer {consumer.name}: there is no schema {schema}",
            f"create schema {schema};",
        )
    for table in tables:
        yield from _table(connection, consumer, table)
    if name == "*" and plugin == "pgoutput" and {"update", "delete"} & set(consumer.operations):
        yield Problem(
            "wildcard_identity",
            "warning",
            pattern,
            f"consumer {consumer.name} takes updates and deletes of every table in {pattern}: PostgreSQL will refuse an"
            " UPDATE or DELETE of a table created there later without a primary key",
            "Give each new table a primary key or REPLICA IDENTITY FULL, or take only [insert, truncate] of the rest.",
        )


def _table(connection: Connection, consumer: Consumer, table: Table) -> Iterator[Problem]:
    name = table.identifier.as_string(connection)
    if table.kind not in ("r", "p"):
        kinds = {"f": "a foreign table", "v": "a view", "m": "a materialized view"}
        what = kinds.get(table.kind, "no table")
        message = f"consumer {consumer.name}: {table.topic} is {what}; its changes are not in the WAL"
        yield Problem("not_a_table", "error", table.topic, message, "Leave it out of the consumer's tables.")
        return
    if table.partition or table.persistence != "p":
        what = "a partition: name its root" if table.partition else "unlogged: its changes are not in the WAL"
        message = f"consumer {consumer.name}: {table.topic} is {what}"
        yield Problem("not_a_table", "error", table.topic, message, "Mend the consumer's tables.")
        return
    writes = [operation for operation in ("update", "delete") if operation in consumer.operations]
    if writes and not table.identity:
        yield Problem(
            "replica_identity",
            "error",
            table.topic,
            f"consumer {consumer.name} takes {' and '.join(w + 's' for w in writes)} of {table.topic}, which has no"
            " usable replica identity: they could not be told apart",
            f"alter table {name} replica identity full; -- or give it a primary key",
        )
    elif writes and table.leaves_without_identity:
        leaves = table.leaves_without_identity
        yield Problem(
            "replica_identity",
            "error",
            table.topic,
            f"consumer {consumer.name} takes {' and '.join(w + 's' for w in writes)} of {table.topic}, and partitions"
            f" of it have no usable replica identity: {', '.join(leaves)}",
            " ".join(f"alter table {leaf} replica identity full;" for leaf in leaves),
        )
    elif writes and consumer.key and not set(consumer.key) <= table.identity:
        missing = ", ".join(sorted(set(consumer.key) - table.identity))
        yield Problem(
            "key_not_covered",
            "error",
            table.topic,
            f"consumer {consumer.name} has the key ({', '.join(consumer.key)}), and a delete of {table.topic} carries"
            f" no {missing}: its replica identity does not cover it",
            f"alter table {name} replica identity full; -- or replica identity using an index of these columns",
        )
    readable = connection.execute("select has_table_privilege(%s, 'select')", (table.oid,)).fetchone()
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
            "Nothing to do, unless a consumer needs them.",
        )


def special_floats(config: Config, connection: Connection) -> list[Problem]:
    """Columns whose NaN and ±Infinity an old wal2json sends as null."""
    patterns = dict.fromkeys(pattern for consumer in config.consumers for pattern in consumer.tables)
    tables = [t for pattern in patterns for t in find_tables(connection, pattern, config.store.schema_)]
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
