"""Find reasons why a mirror would not work, each with its fix, for `cdcbridge check`.

The checks only read. They never create a table, a role or a replication origin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Final

from psycopg import sql

from cdcbridge.config import Config, Mirror
from cdcbridge.database import Connection, connect_source, database_place, source_errors, target_errors
from cdcbridge.database.rights import guest
from cdcbridge.errors import CdcbridgeError, OperatorNeeded, SourceUnavailable, TargetUnavailable
from cdcbridge.mirrors.peer_log import PeerLog
from cdcbridge.mirrors.source_tables import SourceTables, quoted
from cdcbridge.mirrors.tables import HISTORY, TargetTable
from cdcbridge.mirrors.target import ORIGIN_FUNCTIONS, TargetSession, rights_needed
from cdcbridge.mirrors.target_tables import TargetTables
from cdcbridge.problem import Problem, Severity
from cdcbridge.source.tables import tables_of

_RESTART: Final = " -- then restart the server"
_WRITES: Final = "select, insert, update, delete, truncate"
_RIGHTS: Final = """
    select quote_ident(current_user),
           (select coalesce(bool_and(has_function_privilege('pg_catalog.' || f, 'execute')), true)
            from unnest(%s::text[]) f),
           has_parameter_privilege('session_replication_role', 'set')
"""
_ROOM: Final = """
    select s.name, s.setting::int, (select count(*) from pg_replication_origin where roname not like %s)
    from pg_settings s where s.name in ('max_active_replication_origins', 'max_replication_slots') order by s.name
"""
# The schema of the mirror's own tables: whether it exists, and the rights of the session on it and on the tables.
_HOME: Final = """
    select n.oid is not null,
           case when n.oid is null then has_database_privilege(current_database(), 'create')
                else has_schema_privilege(n.oid, 'usage') and has_schema_privilege(n.oid, 'create') end,
           (select bool_and(has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert')
                            and has_table_privilege(c.oid, 'update') and has_table_privilege(c.oid, 'delete'))
            from pg_class c where c.relnamespace = n.oid and c.relname in ('mirror_places', 'conflicts')),
           quote_ident(current_database())
    from (values (%s)) v (name) left join pg_namespace n on n.nspname = v.name
"""
_MAY_WRITE: Final = """
    select has_schema_privilege(c.relnamespace, 'usage') and has_table_privilege(c.oid, 'select')
           and has_table_privilege(c.oid, 'insert') and has_table_privilege(c.oid, 'update')
           and has_table_privilege(c.oid, 'delete') and has_table_privilege(c.oid, 'truncate')
    from pg_class c where c.oid = to_regclass(%s)
"""


def check_mirrors(config: Config) -> list[Problem]:
    """Return the problems of the file's mirrors, each with the name of its mirror or table and a fix."""
    found: list[Problem] = []
    for mirror in config.mirrors:
        try:
            with closing(TargetSession(mirror, "")) as target, target_errors():
                found += _Checks(config, mirror, target).all()
        except TargetUnavailable as error:
            fix = error.hint or "Start the target's server, or correct target.dsn. Also check the network."
            found.append(Problem("mirror_unreachable", "error", mirror.name, str(error), fix))
        except SourceUnavailable:
            return found  # the other checks report it
        except CdcbridgeError as error:
            found.append(Problem("mirror_unusable", "error", mirror.name, str(error), error.hint or ""))
    return found


class _Checks:
    """The checks of one mirror.

    Args:
        config: The configuration.
        mirror: The mirror.
        target: Its session on the target, without an origin.
    """

    def __init__(self, config: Config, mirror: Mirror, target: TargetSession) -> None:
        self._config = config
        self._mirror = mirror
        self._target = target
        self._connection = target.connection
        self._place = database_place(mirror.target.dsn.get_secret_value())
        self._role = ""

    def all(self) -> list[Problem]:
        """Return all problems, those of the server first."""
        found = [*self._rights(), *self._home()]
        if self._mirror.two_way is not None:
            found += [*self._settings(), *self._peer()]
        return [*found, *self._room(), *self._tables()]

    def _problem(self, code: str, severity: Severity, message: str, *fixes: str, subject: str | None = None) -> Problem:
        """Return a problem of the target, with the name of the target in the fix."""
        fix = "\n".join([f"-- In the target, {self._place}:", *fixes])
        return Problem(code, severity, subject or self._mirror.name, message, fix)

    def _one(self, query: str, *given: Any) -> tuple[Any, ...]:
        return self._connection.execute(query.encode(), given or None).fetchone() or ()

    # the server

    def _rights(self) -> Iterator[Problem]:
        self._role, origins, silence = self._one(_RIGHTS, list(ORIGIN_FUNCTIONS))
        grants = ["-- As a superuser:", *rights_needed(self._role)]
        two_way = self._mirror.two_way is not None
        if not origins:
            rest = "two_way needs them" if two_way else "one-way works without, with the place in a row"
            text = f"the target's role {self._role} may not use replication origins: {rest}"
            yield self._problem("mirror_origin_rights", "error" if two_way else "warning", text, *grants)
        if not silence and self._mirror.triggers == "replica":
            text = f"the target's role {self._role} may not set session_replication_role, which triggers: replica needs"
            yield self._problem("mirror_trigger_rights", "error", text, *grants)

    def _home(self) -> Iterator[Problem]:
        schema = self._mirror.target.schema_
        named = sql.Identifier(schema).as_string(None)
        exists, may, writes, database = self._one(_HOME, schema)
        if writes is None and not may:
            text = f"the target's role {self._role} may not create the mirror's tables in the schema {schema}"
            grant = f"grant usage, create on schema {named} to {self._role};"
            if not exists:
                grant = f"grant create on database {database} to {self._role};"
            yield self._problem("mirror_schema_rights", "error", text, grant)
        elif writes is False:
            text = f"the target's role {self._role} may not write the mirror's tables in the schema {schema}"
            yield self._problem(
                "mirror_schema_rights",
                "error",
                text,
                f"grant usage on schema {named} to {self._role};",
                f"grant select, insert, update, delete on {named}.mirror_places, {named}.conflicts to {self._role};",
            )

    def _settings(self) -> Iterator[Problem]:
        wal_level, timestamps = self._one(
            "select current_setting('wal_level'), current_setting('track_commit_timestamp')"
        )
        if timestamps != "on":
            text = "two_way needs to know who wrote a row last, but the target has track_commit_timestamp = off"
            fix = f"alter system set track_commit_timestamp = on;{_RESTART}"
            yield self._problem("mirror_commit_timestamps", "error", text, fix)
        if wal_level != "logical":
            text = f"two_way needs the target's changes, but the target has wal_level = {wal_level}"
            fix = f"alter system set wal_level = 'logical';{_RESTART}"
            yield self._problem("mirror_wal_level", "error", text, fix)

    def _room(self) -> Iterator[Problem]:
        own = f"cdcbridge:{self._mirror.name}:%"
        name, most, taken = self._one(_ROOM, own)
        if taken >= most:
            text = f"the target has {taken} replication origins, and {name} = {most}, so the mirror can have none"
            fix = f"alter system set {name} = {taken + 10};{_RESTART}"
            yield self._problem("mirror_origins_exhausted", "error", text, fix)

    def _peer(self) -> Iterator[Problem]:
        """Yield the problems of the target's own store, which two_way reads."""
        try:
            with closing(PeerLog(self._mirror, "")) as peer:
                who = guest(peer.connection)
                if who is not None:
                    text = f"two_way reads the target's own store, which belongs to {who.owner}, not to {who.role}"
                    fix = f"Give target.store_dsn the role {who.owner}."
                    yield Problem("mirror_store_rights", "error", self._mirror.name, text, fix)
                    return
                peer.require_peer(self._target.identity())
        except TargetUnavailable as error:
            yield Problem("mirror_peer", "warning", self._mirror.name, str(error), error.hint or "")
        except CdcbridgeError as error:
            yield Problem("mirror_peer", "error", self._mirror.name, str(error), error.hint or "")

    # the tables

    def _tables(self) -> Iterator[Problem]:
        dsn = self._config.source_dsn
        with connect_source(dsn, "cdcbridge check", reads=True) as source:
            topics = [one.topic for one in tables_of(source, self._mirror.patterns, self._config.store.schema_)]
            if self._mirror.two_way is not None:
                yield from self._of_source(source)
        with closing(SourceTables(dsn)) as source_tables:
            tables = TargetTables(self._mirror, source_tables, self._connection)
            for topic in topics:
                yield from self._table(topic, tables, source_tables)

    def _of_source(self, source: Connection) -> Iterator[Problem]:
        with source_errors():
            row = source.execute("select current_setting('track_commit_timestamp')").fetchone()
        if row != ("on",):
            text = "two_way needs the commit time of rows, but the source has track_commit_timestamp = off"
            fix = f"alter system set track_commit_timestamp = on;{_RESTART}"
            yield Problem("mirror_commit_timestamps", "error", self._mirror.name, text, fix)

    def _table(self, topic: str, tables: TargetTables, source: SourceTables) -> Iterator[Problem]:
        table = tables.described(topic)
        if not table.columns:
            yield from self._missing(table, tables)
            return
        name = quoted(table.full_name)
        if self._one(_MAY_WRITE, name) != (True,):
            text = f"the target's role {self._role} may not write the table {table.full_name}"
            schema = sql.Identifier(table.schema).as_string(None)
            grants = (
                f"grant usage on schema {schema} to {self._role};",
                f"grant {_WRITES} on {name} to {self._role};",
            )
            yield self._problem("mirror_table_rights", "error", text, *grants, subject=topic)
        types = {one.name: one.type for one in source.columns(topic)}
        lacking = [(one, types[one]) for one in table.lacking(types)]
        if self._mirror.apply == "append":
            lacking += [(one, kind) for one, kind in HISTORY if one not in table.columns]
        if lacking:
            text = f"the target's table {table.full_name} lacks the column {', '.join(one for one, _ in lacking)}"
            yield self._problem("mirror_column_missing", "error", text, *_added(name, lacking), subject=topic)
        elif table.key and self._mirror.apply == "upsert":
            try:
                tables.require_key(table)
            except OperatorNeeded as error:
                fix = (error.hint or "").removeprefix("In the target: ")
                text = str(error).removeprefix("target: ")
                yield self._problem("mirror_no_unique_index", "error", text, fix, subject=topic)

    def _missing(self, table: TargetTable, tables: TargetTables) -> Iterator[Problem]:
        """Yield the problem of a table that the target does not have, if the mirror cannot create it."""
        exists, may, _, database = self._one(_HOME, table.schema)
        schema = sql.Identifier(table.schema).as_string(None)
        if self._mirror.create_tables is False:
            create = [] if exists else [f"create schema {schema};"]
            text = f"the target has no table {table.full_name}, and create_tables is false"
            statement = f"{tables.definition(table).as_string(self._connection)};"
            yield self._problem("mirror_table_missing", "error", text, *create, statement, subject=table.topic)
        elif not may:
            text = f"the target has no table {table.full_name}, and its role {self._role} may not create it"
            grant = f"grant usage, create on schema {schema} to {self._role};"
            if not exists:
                grant = f"grant create on database {database} to {self._role};"
            yield self._problem("mirror_table_rights", "error", text, grant, subject=table.topic)


def _added(table: str, columns: Sequence[tuple[str, str]]) -> list[str]:
    return [f"alter table {table} add column {sql.Identifier(name).as_string(None)} {kind};" for name, kind in columns]
