"""Find every reason why `run` would not work, or not as configured, and give a fix for each.

`run` refuses the same errors with the same messages. This module never leaves a change in a database. It rolls back the
statements that it tries, and creates only temporary slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import sql

from cdcbridge.checks.decision import slot_refusal, wanted_plugin
from cdcbridge.checks.encodings import encoding_problems, server_encoding
from cdcbridge.checks.facts import Facts, look
from cdcbridge.checks.other_stores import slot_problems
from cdcbridge.checks.store import (
    applied_config,
    as_problem,
    filled_consumers,
    history_problems,
    mode_problems,
    role_problems,
    store_problems,
)
from cdcbridge.checks.tables import consumer_problems, special_floats
from cdcbridge.checks.wal import replication_right, wal_problems
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store
from cdcbridge.database.encodings import WITHOUT_CONVERSION, unusable
from cdcbridge.errors import CdcbridgeError, CheckFailed
from cdcbridge.problem import Problem, refuse
from cdcbridge.source import event_trigger, plugins, publications
from cdcbridge.source.facts import look_at_source
from cdcbridge.source.sessions import replication_problems, snapshot_problems, unreachable
from cdcbridge.source.setting_lists import literals, meant, names
from cdcbridge.source.table_locks import holders
from cdcbridge.store.migrate import schema_version

_OLDEST: Final = 150000
# Codes of errors about one table whose changes cannot be captured.
UNUSABLE: Final = frozenset({"table_missing", "schema_missing", "not_a_table", "replica_identity"})
LOCKED: Final = "publication_locked"


def problems(config: Config, facts: Facts, connection: Connection, store: Connection | None) -> list[Problem]:
    """Return all problems of the source, the store and the consumers, each once.

    Args:
        config: The configuration.
        facts: The facts about source and store, as `look()` read them.
        connection: A session on the source.
        store: A session on the store, or None if the store was not reached.
    """
    plugin = wanted_plugin(config, facts)
    encodings = list(encoding_problems(config, connection, store, plugin))
    if encodings:
        return encodings  # with such an encoding, names cannot be compared
    found = [
        *_server(connection),
        *_standbys(config, facts, connection),
        *_slot(config, facts, connection),
        *wal_problems(config, connection),
        *_plugin(config, facts, connection),
    ]
    for consumer in config.consumers:
        found += consumer_problems(config, connection, consumer, plugin)
    found += event_trigger.problems(config, connection, plugin)
    if plugin == "pgoutput":
        refused = any(p.severity == "error" for p in found)
        applied = applied_config(config, store)
        found += _one_for_each(
            list(_left_out(applied or config, connection, begun=applied is not None)),
            [] if refused else list(publication_problems(config, connection)),
        )
    if store is not None:
        found += store_problems(config, store)
        found += role_problems(config, store)
        found += mode_problems(config, store)
        found += history_problems(config, facts, connection, store)
    found += snapshot_problems(config, connection, filled_consumers(store))
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
            f"wal_level is {_show(connection, 'wal_level')}, but logical decoding needs logical",
            "alter system set wal_level = 'logical'; -- as a superuser. Then restart the server",
        )
    yield from replication_right(connection)


def _standbys(config: Config, facts: Facts, connection: Connection) -> Iterator[Problem]:
    """Find settings that would lose the slot or changes in a failover, and a standby that is too old to be the source.

    Source: PostgreSQL manual, "Logical Replication Failover" and "Logical Decoding Concepts".
    """
    version = facts.source.version
    if facts.source.on_standby:
        if version < 160000:
            yield Problem(
                "standby_too_old",
                "error",
                "source",
                f"the source is a standby, and PostgreSQL {version // 10000} cannot decode there",
                "Use the primary, or PostgreSQL 16 or newer.",
            )
        return
    if config.source.failover is True and version < 170000:
        yield Problem(
            "failover_too_old",
            "error",
            "source.failover",
            f"PostgreSQL {version // 10000} cannot keep slots on standbys",
            "Set source.failover to auto. After a failover, `cdcbridge slot recreate` continues after a gap message.",
        )
    if config.source.failover is False or version < 170000:
        return
    rows = connection.execute("select slot_name from pg_replication_slots where slot_type = 'physical'").fetchall()
    listed = set(names(_show(connection, "synchronized_standby_slots")))
    missing = sorted({name for (name,) in rows} - listed)
    if missing:
        wanted = literals(sorted({name for (name,) in rows} | listed))
        yield Problem(
            "synchronized_standby_slots",
            "warning",
            ", ".join(missing),
            f"the bridge may get changes before the standby of {', '.join(missing)} has them: after a failover these"
            " changes belong to a lost history, and a gap message reports them",
            f"alter system set synchronized_standby_slots = {wanted}; select pg_reload_conf();"
            " -- as a superuser. Name the standbys that may be promoted: while one of them is away, the bridge waits"
            " for it",
        )


def _slot(config: Config, facts: Facts, connection: Connection) -> Iterator[Problem]:
    name, slot, plugin = config.source.slot, facts.source.slot, wanted_plugin(config, facts)
    if slot is None:
        row = connection.execute(
            "select count(*), current_setting('max_replication_slots')::int from pg_replication_slots"
        ).fetchone()
        if row and row[0] >= row[1]:
            yield Problem(
                "no_free_slot",
                "error",
                name,
                f"all {row[1]} replication slots of the server are taken",
                f"alter system set max_replication_slots = {row[1] + 5}; -- as a superuser. Then restart. Or drop"
                " a slot that is not used",
            )
        return
    if slot.database != facts.source.identity.database:
        yield Problem(
            "slot_database",
            "error",
            name,
            f"the slot {name} belongs to the database {slot.database}, not to {facts.source.identity.database}",
            "Set source.slot to another name.",
        )
    if slot.plugin != plugin:
        yield Problem(
            "slot_plugin",
            "error",
            name,
            f"the slot {name} was created for {slot.plugin}, but source.plugin is {plugin}",
            f"Set source.plugin to {slot.plugin}. To change to {plugin}, use a second slot and a second store:"
            ' docs/OPERATIONS.md, "Changing source.plugin".',
        )
    if lost := slot_refusal(name, facts):
        yield as_problem(name, lost)


def _plugin(config: Config, facts: Facts, connection: Connection) -> Iterator[Problem]:
    plugin = wanted_plugin(config, facts)
    if _show(connection, "wal_level") != "logical":
        return
    listed = plugins.listed(connection)
    unmade = plugin == "wal2json" and facts.source.slot is None
    # Only the server can judge its list of allowed plugins, so the plugin is tried on each server with such a list.
    state = plugins.probe(config.source_dsn, plugin) if unmade or listed is not None else "usable"
    if state == "refused" or (state == "unknown" and listed and plugin not in listed):
        yield _refused(plugin, listed or [])
    elif unmade and state == "missing":
        package = f"postgresql-{connection.info.server_version // 10000}-wal2json"
        yield Problem(
            "plugin_missing",
            "error",
            plugin,
            "the server has no usable output plugin wal2json",
            f"apt-get install {package} (or your system's package), or set source.plugin to pgoutput",
        )


def _refused(plugin: str, listed: list[str]) -> Problem:
    """Return the problem of a plugin that output_plugin_libraries does not allow.

    `listed` is empty if this role may not read the setting.
    """
    wanted = meant([*(listed or ["pgoutput", "test_decoding"]), plugin])
    why = "it is not listed in output_plugin_libraries"
    if any(plugin in meant([name.lower()]) for name in listed):
        one = next(name for name in listed if plugin in meant([name.lower()]))
        why = f'output_plugin_libraries has "{one}", which the server reads as one name, and no separate name {plugin}'
    return Problem(
        "plugin_refused",
        "error",
        plugin,
        f"the server does not let {plugin} be used: {why}",
        f"alter system set output_plugin_libraries = {literals(wanted)}; select pg_reload_conf(); -- as a superuser,"
        " with each name in quotes of its own",
    )


def publication_problems(config: Config, connection: Connection) -> Iterator[Problem]:
    """Yield a problem for each publication that is missing or leaves changes out, and that cannot be fixed now.

    The reason is a locked table, or a right that this role lacks. `problems()` skips this check if it has already found
    an error, for example a table that cannot be captured.
    """
    for wanted in publications.needed(config, connection):
        existing = publications.publication(connection, wanted.name)
        statements = publications.publication_sql(wanted, existing)
        if not statements or (existing is not None and existing.covers(wanted)):
            continue
        if locked := holders(connection, wanted.tables):
            said = f"the publication {wanted.name} cannot be changed yet: {'; '.join(one.said for one in locked)}"
            yield Problem(LOCKED, "warning", wanted.name, said, " ".join(dict.fromkeys(one.fix for one in locked)))
            continue
        if _may(connection, statements):
            continue
        text = _text(connection, statements)
        state = "does not exist" if existing is None else "leaves changes out that the consumers take"
        lacks = existing.left_out(wanted, own=True) if existing else ""
        yield Problem(
            "publication",
            "error",
            wanted.name,
            f"the publication {wanted.name} {state}{lacks and f' ({lacks})'}, and this role may not fix that",
            text,
        )


def _left_out(config: Config, connection: Connection, *, begun: bool) -> Iterator[Problem]:
    """Find publications that leave changes out: created by hand before the first run, or altered since.

    Before the first run, a publication may belong to another subscriber, so `run` does not alter it. From the first run
    on, the publication belongs to the bridge. `begun` is True from then on.
    """
    for wanted in publications.needed(config, connection) if config.consumers else ():
        existing = publications.publication(connection, wanted.name)
        if existing is None:
            if begun and wanted.name == config.source.publication:
                statements = publications.publication_sql(wanted, None)
                said = f"the publication {wanted.name} does not exist any more: changes since then are left out."
                said += " `run` creates it" if _may(connection, statements) else " This role may not create it"
                fix = _text(connection, statements)
                yield Problem("publication_leaves_out", "warning", wanted.name, said, fix)
            continue
        left_out = existing.left_out(wanted, own=begun)
        if not left_out:
            continue
        statements = publications.publication_sql(wanted, existing)
        fix = _text(connection, statements)
        said = f"the publication {wanted.name} leaves changes out that the consumers take: {left_out}"
        may = begun and _may(connection, statements)
        said += ". The bridge corrects it when it starts" if may else ""
        said += ". This role may not change it" if begun and not may else ""
        yield Problem("publication_leaves_out", "warning" if begun else "error", wanted.name, said, fix)


def _one_for_each(left_out: list[Problem], denied: list[Problem]) -> list[Problem]:
    """Keep one kind of problem for each publication.

    An error about changes that are left out hides one about a missing right. The latter hides a warning about them.
    """
    errors = {problem.object for problem in left_out if problem.severity == "error"}
    denied = [problem for problem in denied if problem.object not in errors]
    told = {problem.object for problem in denied}
    return [*(problem for problem in left_out if problem.object not in told), *denied]


def _text(connection: Connection, statements: list[sql.Composed]) -> str:
    return "; ".join(statement.as_string(connection) for statement in statements) + ";"


def _may(connection: Connection, statements: list[sql.Composed]) -> bool:
    """Return whether this role may run the statements: try them and roll them back.

    The result is also True if a lock or a timeout stopped the attempt.
    """
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(f"set local lock_timeout = '{publications.LOCK_TIMEOUT}'")
            for statement in statements:
                connection.execute(statement)
    except psycopg.Error as error:
        return error.sqlstate in ("55P03", "57014")
    return True


def refuse_unwritable(config: Config, store: Connection) -> None:
    """Refuse a store that cannot be used, before the first migration creates anything.

    A store that has a version already passes without a check.

    Raises:
        CheckFailed: The store may not be written, an encoding does not fit, or the slot belongs to another store. The
            error contains every error that `check()` finds.
        SourceUnavailable: The source cannot be reached. Its encoding is part of the decision.
    """
    if schema_version(store):
        return
    with connect_source(config.source_dsn, "cdcbridge check") as connection:
        unfit = any(encoding_problems(config, connection, store, config.source.plugin))
        facts = look_at_source(connection, config.source.slot)
        taken = not unfit and any(slot_problems(config, facts, connection, store, begun=False))
    if unfit or taken or any(problem.code == "privilege_store" for problem in store_problems(config, store)):
        refuse(check(config))


def refuse_unconvertible(store: Connection) -> None:
    """Raise CheckFailed if the characters of the store's database cannot be converted to UTF-8."""
    encoding = server_encoding(store)
    if encoding in WITHOUT_CONVERSION:
        refuse([unusable("store", encoding)])


def check(config: Config) -> list[Problem]:
    """Open sessions on source and store, and return all problems.

    If the store cannot be reached, that is one of the problems, and the others are found on the source alone. A session
    that pg_hba.conf or a connection pooler refuses is a problem, too.

    Raises:
        SourceUnavailable: The source cannot be reached for another reason.
    """
    try:
        connection = connect_source(config.source_dsn, "cdcbridge check")
    except CheckFailed as error:
        return list(error.problems)
    except CdcbridgeError as error:
        known = unreachable(error, "source.dsn", "bridge")
        if known is None:
            raise
        return [known]
    with connection:
        supported: bool | None = None
        if config.source.plugin != "pgoutput":
            supported = plugins.supports_numbers_as_text(config.source_dsn)
        try:
            store: Connection | None = connect_store(config.store_dsn, config.store.schema_, "cdcbridge check")
        except CheckFailed as error:
            return [*_without_store(config, connection, supported), *error.problems]
        except CdcbridgeError as error:
            fix = error.hint or "Check store.dsn and the server."
            away = Problem("store_unreachable", "error", "store", str(error).removeprefix("store: "), fix)
            known = unreachable(error, "store.dsn", "bridge")
            return [*_without_store(config, connection, supported), known or away]
        try:
            facts = look(config, connection, store, wal2json=supported)
            found = problems(config, facts, connection, store)
        finally:
            if store is not None:
                store.close()
        if not any(problem.code == "privilege_replication" for problem in found):
            found += replication_problems(config, facts.source, connection)
        if wanted_plugin(config, facts) == "wal2json" and supported is False and facts.source.encoding == "UTF8":
            found += special_floats(config, connection)
        return found


def _without_store(config: Config, connection: Connection, wal2json: bool | None) -> list[Problem]:
    """Return the problems that can be found on the source alone."""
    return problems(config, look(config, connection, None, wal2json=wal2json), connection, None)
