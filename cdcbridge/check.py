"""Every reason why `run` would not work, or not as wished, each with its mend. Part of the rim; changes nothing.

`run` refuses what is an error here, in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import psycopg
from psycopg import sql

from cdcbridge import plugins, source
from cdcbridge.config import Config, Consumer
from cdcbridge.database import Connection, connect_source
from cdcbridge.errors import CdcbridgeError, CheckFailed
from cdcbridge.migrate import migrations, schema_version
from cdcbridge.source import Table

SLOT_GONE: Final = (
    "the slot does not exist any more, and the store knows of it: changes after the store's end are lost to it"
)
Severity = Literal["error", "warning"]
_OLDEST: Final = 150000


@dataclass(slots=True, frozen=True)
class Problem:
    """One thing found. `fix` is SQL where it is SQL."""

    code: str
    severity: Severity
    object: str
    message: str
    fix: str


def refuse(found: list[Problem]) -> None:
    """Raises CheckFailed if any problem is an error, with all of them in the message."""
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        raise CheckFailed("\n".join(f"{p.object}: {p.message}\n    fix: {p.fix}" for p in errors))


def problems(config: Config, connection: Connection, store: Connection | None, *, plugin: str) -> list[Problem]:
    """Everything found; `plugin` is the one that `run` would use. `store` None: the store was not reached."""
    found = [*_server(connection), *_slot(config, connection, plugin), *_plugin(config, connection, plugin)]
    for consumer in config.consumers:
        for pattern in consumer.tables:
            found += _pattern(config, connection, consumer, pattern, plugin)
    if plugin == "pgoutput":
        found += _publications(config, connection, refused=any(p.severity == "error" for p in found))
    if store is not None:
        found += _store(config, store)
        found += _history(config, connection, store)
    return list(dict.fromkeys(found))


def _show(connection: Connection, name: str) -> str:
    row = connection.execute("select current_setting(%s)", (name,)).fetchone()
    return str(row[0]) if row else ""


def _server(connection: Connection) -> Iterator[Problem]:
    version = connection.info.server_version
    if version < _OLDEST:
        yield Problem(
            "server_version", "error", "source", f"PostgreSQL {version // 10000} is too old", "Use 15 or newer."
        )
    if _show(connection, "wal_level") != "logical":
        yield Problem(
            "wal_level",
            "error",
            "source",
            f"wal_level is {_show(connection, 'wal_level')}; logical decoding needs logical",
            "alter system set wal_level = 'logical'; -- and restart the server",
        )
    row = connection.execute(
        "select rolreplication or rolsuper, quote_ident(current_user) from pg_roles where rolname = current_user"
    ).fetchone()
    if row and not row[0]:
        yield Problem(
            "privilege_replication",
            "error",
            row[1],
            f"the role {row[1]} may not use replication slots",
            f"alter role {row[1]} replication;",
        )


def _slot(config: Config, connection: Connection, plugin: str) -> Iterator[Problem]:
    name = config.source.slot
    existing = source.slots(connection, name)
    if not existing:
        row = connection.execute(
            "select count(*), current_setting('max_replication_slots')::int from pg_replication_slots"
        ).fetchone()
        if row and row[0] >= row[1]:
            yield Problem(
                "no_free_slot",
                "error",
                name,
                f"all {row[1]} replication slots of the server are taken",
                f"alter system set max_replication_slots = {row[1] + 5}; -- and restart; or drop a slot nobody uses",
            )
        return
    slot = existing[0]
    if slot.database != connection.info.dbname:
        yield Problem(
            "slot_database",
            "error",
            name,
            f"the slot {name} belongs to the database {slot.database}, not to {connection.info.dbname}",
            "Set source.slot to another name.",
        )
    if slot.plugin != plugin:
        yield Problem(
            "slot_plugin",
            "error",
            name,
            f"the slot {name} was made for {slot.plugin}; source.plugin is {plugin}",
            f"Set source.plugin to {slot.plugin}, or source.slot to another name.",
        )
    if slot.wal_status == "lost":
        yield Problem("slot_lost", "error", name, f"the slot {name} is lost", "cdcbridge slot recreate")


def _plugin(config: Config, connection: Connection, plugin: str) -> Iterator[Problem]:
    encoding = _show(connection, "server_encoding")
    if plugin == "wal2json" and encoding != "UTF8":
        yield Problem(
            "encoding",
            "error",
            connection.info.dbname,
            f"the database is {encoding}, and wal2json writes the database's encoding whatever the client's is",
            "Set source.plugin to pgoutput.",
        )
    if _show(connection, "wal_level") != "logical":
        return
    listed = plugins.listed(connection)
    if listed is not None and plugin not in listed and plugins.probe(config.source_dsn, plugin) == "refused":
        names = ", ".join([*(listed or ["pgoutput", "test_decoding"]), plugin])
        yield Problem(
            "plugin_refused",
            "error",
            plugin,
            f"the server does not let {plugin} be used: it is not listed in output_plugin_libraries",
            f"alter system set output_plugin_libraries = {names}; select pg_reload_conf(); -- as a superuser",
        )
    elif (
        plugin == "wal2json"
        and not source.slots(connection, config.source.slot)
        and plugins.probe(config.source_dsn, plugin) == "missing"
    ):
        package = f"postgresql-{connection.info.server_version // 10000}-wal2json"
        yield Problem(
            "plugin_missing",
            "error",
            plugin,
            "the server has no usable output plugin wal2json",
            f"apt-get install {package} (or your system's package), or set source.plugin to pgoutput",
        )


def _pattern(
    config: Config, connection: Connection, consumer: Consumer, pattern: str, plugin: str
) -> Iterator[Problem]:
    tables = source.find_tables(connection, pattern, config.store.schema_)
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
    tables = [t for pattern in patterns for t in source.find_tables(connection, pattern, config.store.schema_)]
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


def _publications(config: Config, connection: Connection, *, refused: bool) -> Iterator[Problem]:
    """What the role may not mend by itself. Where tables are refused anyway, nothing more is said of them."""
    if refused:
        return
    for wanted in source.wanted_publications(config.source.publication, config.consumers):
        existing = source.publication(connection, wanted.name)
        statements = source.publication_sql(wanted, existing)
        if not statements or (existing is not None and existing.covers(wanted)) or _may(connection, statements):
            continue
        text = "; ".join(statement.as_string(connection) for statement in statements) + ";"
        state = "does not exist" if existing is None else "does not publish all that the consumers take"
        yield Problem(
            "publication",
            "error",
            wanted.name,
            f"the publication {wanted.name} {state}, and this role may not mend that",
            text,
        )


def _may(connection: Connection, statements: list[sql.Composed]) -> bool:
    """Whether this role may run these: tried, and rolled back."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute("set local lock_timeout = '2s'")
            for statement in statements:
                connection.execute(statement)
    except psycopg.Error as error:
        return error.sqlstate in ("55P03", "57014")
    return True


def _store(config: Config, store: Connection) -> Iterator[Problem]:
    schema = config.store.schema_
    version, newest = schema_version(store), migrations()[-1][0]
    if version > newest:
        yield Problem(
            "store_newer",
            "error",
            schema,
            f"the store's schema has version {version}, newer than this program's {newest}",
            "Install the cdcbridge that made it, or a newer one.",
        )
    if version == 0:
        row = store.execute(
            "select has_database_privilege(current_database(), 'CREATE'), quote_ident(current_database()),"
            " quote_ident(current_user), to_regnamespace(quote_ident(%s)) is not null",
            (schema,),
        ).fetchone()
        if row and not row[0] and not row[3]:
            yield Problem(
                "privilege_store",
                "error",
                schema,
                f"the role {row[2]} may not create the schema {schema} in {row[1]}",
                f"grant create on database {row[1]} to {row[2]};",
            )


def _history(config: Config, connection: Connection, store: Connection) -> Iterator[Problem]:
    """What the store goes by, beside what is there. `run` compares more, with a replication session."""
    row = store.execute("select slot, plugin from source").fetchone() if schema_version(store) else None
    if row is None:
        return
    if row[0] != config.source.slot:
        yield Problem(
            "other_source",
            "error",
            config.source.slot,
            f"the store holds the changes of the slot {row[0]}: one store serves one source",
            f"Set source.slot back to {row[0]}, or store.schema to another name.",
        )
    elif not source.slots(connection, row[0]):
        yield Problem(
            "slot_gone",
            "error",
            row[0],
            SLOT_GONE,
            "cdcbridge slot recreate -- goes on behind a gap message",
        )


def refuse_unwritable(config: Config, store: Connection) -> None:
    """Before the first migration: raises CheckFailed, with all that is wrong, where the store may not be written."""
    if any(problem.code == "privilege_store" for problem in _store(config, store)):
        refuse(check(config))


def check(config: Config) -> list[Problem]:
    """All problems, with sessions of its own. Raises SourceUnavailable where the source cannot be reached."""
    from cdcbridge.database import connect_store

    with connect_source(config.source_dsn, "cdcbridge check") as connection:
        supported: bool | None = None
        plugin: str = config.source.plugin
        if plugin != "pgoutput":
            supported = plugins.supports_numbers_as_text(config.source_dsn)
        plugin = plugins.choose(connection, plugin, config.source.slot, wal2json=lambda: bool(supported))
        try:
            store: Connection | None = connect_store(config.store_dsn, config.store.schema_, "cdcbridge check")
        except CdcbridgeError as error:
            fix = error.hint or "Check store.dsn and the server."
            unreachable = Problem("store_unreachable", "error", "store", str(error), fix)
            return [*problems(config, connection, None, plugin=plugin), unreachable]
        try:
            found = problems(config, connection, store, plugin=plugin)
        finally:
            if store is not None:
                store.close()
        if plugin == "wal2json" and supported is False:
            found += special_floats(config, connection)
        return found
