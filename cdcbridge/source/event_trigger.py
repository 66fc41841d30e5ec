"""Install, compare and remove the event trigger that gives new tables a replica identity.

A wildcard such as `public.*` publishes tables that do not exist yet. PostgreSQL refuses an UPDATE of such a table if it
has no primary key. The trigger therefore gives the table REPLICA IDENTITY FULL in the transaction that creates it. The
SQL is in sql/source/identity.sql.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from importlib import resources
from typing import Final, TypeAlias

import psycopg
import structlog
from psycopg import sql

from cdcbridge.config import Config
from cdcbridge.database import Connection, source_errors
from cdcbridge.errors import CdcbridgeError
from cdcbridge.problem import Problem
from cdcbridge.routing.patterns import whole
from cdcbridge.routing.router import IDENTITY_SCHEMA
from cdcbridge.source.tables import find_tables

_WRITES: Final = frozenset({"update", "delete"})
# The first version also does its work, but does not record which replica identity a table had before.
_VERSIONS: Final = ["cdcbridge event trigger 1", "cdcbridge event trigger 2"]
_LATER: Final = {
    "pgoutput": "PostgreSQL will refuse to change or delete rows of",
    "wal2json": "wal2json will drop the updates and deletes of",
}
Keep: TypeAlias = Callable[[list[tuple[int, str]]], None]
log = structlog.get_logger()


@dataclass(slots=True, frozen=True)
class Scope:
    """The tables that the trigger covers for one bridge: a row of cdcbridge_identity.bridges.

    Attributes:
        tables: Partitioned tables that consumers name. The trigger covers partitions that are attached to them later.
        by_run: Whether `run` installed the trigger and therefore removes it again.
    """

    slot: str
    everything: bool
    schemas: tuple[str, ...]
    tables: tuple[str, ...]
    own_schema: str
    by_run: bool = False

    def covers(self, other: Scope) -> bool:
        return self.own_schema == other.own_schema and (
            self.everything
            or (
                not other.everything
                and set(other.schemas) <= set(self.schemas)
                and set(other.tables) <= set(self.tables)
            )
        )


def wanted_scope(config: Config, connection: Connection) -> Scope | None:
    """Return the scope that the trigger must cover.

    The result is None if no table that is created later can be published with updates or deletes.
    """
    patterns = sorted({p for c in config.consumers if _WRITES & set(c.operations) for p in whole(c.tables)})
    schemas = tuple(p[:-2] for p in patterns if p.endswith(".*") and p != "*.*")
    named = [t for p in patterns if not p.endswith(".*") for t in find_tables(connection, p, config.store.schema_)]
    tables = tuple(table.topic for table in named if table.kind == "p" and not table.partition)
    everything = "*.*" in patterns
    if not (everything or schemas or tables):
        return None
    return Scope(config.source.slot, everything, schemas, tables, config.store.schema_)


def installed_scope(connection: Connection, slot: str) -> Scope | None:
    """Return the scope that the trigger covers for this slot.

    The result is None if the trigger is missing, switched off or of another version, or does not know the slot.
    """
    with source_errors():
        row = connection.execute(
            "select obj_description(to_regnamespace(%s), 'pg_namespace') = any (%s) and 2 = (select count(*) from"
            " pg_event_trigger where evtname like 'cdcbridge\\_identity\\_%%' and evtenabled = 'A')",
            (IDENTITY_SCHEMA, _VERSIONS),
        ).fetchone()
        if row != (True,):
            return None
        try:
            found = connection.execute(
                "select slot, everything, schemas, tables, own_schema, by_run from cdcbridge_identity.bridges"
                " where slot = %s",
                (slot,),
            ).fetchone()
        except psycopg.errors.UndefinedTable:
            return None  # the last bridge removed it after the previous statement
    return Scope(found[0], found[1], tuple(found[2]), tuple(found[3]), *found[4:]) if found else None


def install_sql(scope: Scope) -> str:
    """Return the SQL that installs the trigger, or updates it to cover this scope."""
    text = (resources.files("cdcbridge") / "sql" / "source" / "identity.sql").read_text()
    values = sql.SQL(", ").join(
        sql.Literal(list(value) if isinstance(value, tuple) else value) for value in astuple(scope)
    )
    row = sql.SQL(
        "insert into cdcbridge_identity.bridges values ({}) on conflict (slot) do update set everything ="
        " excluded.everything, schemas = excluded.schemas, tables = excluded.tables, own_schema = excluded.own_schema,"
        " by_run = excluded.by_run;"
    ).format(values)
    return f"{text}\n{row.as_string()}"


def ensure(config: Config, connection: Connection, keep: Keep | None = None) -> bool:
    """Install, update or remove the trigger as `source.event_trigger` requires. Change nothing on a standby.

    A trigger that was installed by hand is never removed.

    Args:
        config: The configuration with the consumers.
        connection: A session on the source.
        keep: Called before the removal with the tables that have their replica identity from the trigger. Without this
            function, nothing is removed.

    Returns:
        Whether the trigger was installed or updated.

    Raises:
        OperatorNeeded: The role may not install the trigger.
    """
    if _read_only(connection):
        return False
    installed = installed_scope(connection, config.source.slot)
    wanted = wanted_scope(config, connection) if config.source.event_trigger else None
    if wanted is not None:
        if (
            installed is not None
            and installed.covers(wanted)
            and (not installed.by_run or wanted == _by_hand(installed))
        ):
            return False
        with _alone(connection):
            connection.execute(install_sql(replace(wanted, by_run=installed is None or installed.by_run)).encode())
        log.info("event_trigger.installed", schemas=["*"] if wanted.everything else list(wanted.schemas))
        return True
    if installed is None or not installed.by_run or keep is None:
        return False
    try:
        keep(given(connection))
        remove(connection, config.source.slot)
    except CdcbridgeError as error:
        log.warning("event_trigger.not_removed", error=str(error))
        return False
    log.info("event_trigger.removed")
    return False


def given(connection: Connection) -> list[tuple[int, str]]:
    """List the tables that got REPLICA IDENTITY FULL from the trigger.

    Each entry is the OID of a table, and its pg_class.relreplident from before.
    """
    with source_errors():
        if connection.execute("select to_regclass('cdcbridge_identity.changed')").fetchone() == (None,):
            return []
        return connection.execute(
            "select relation::int8, coalesce(to_jsonb(c) ->> 'before', 'd') from cdcbridge_identity.changed c"
        ).fetchall()


def remove(connection: Connection, slot: str) -> None:
    """Delete the row of one bridge, and drop the trigger when the last row is deleted."""
    with _alone(connection):
        connection.execute("delete from cdcbridge_identity.bridges where slot = %s", (slot,))
        if connection.execute("select from cdcbridge_identity.bridges").fetchone() is None:
            connection.execute("drop event trigger if exists cdcbridge_identity_command")
            connection.execute("drop event trigger if exists cdcbridge_identity_drop")
            connection.execute("drop schema cdcbridge_identity cascade")


def mend(connection: Connection) -> None:
    """Let the trigger's function check all tables once. Change nothing on a standby.

    A table may have been created by a transaction that is older than the trigger.
    """
    if not _read_only(connection):
        with source_errors():
            connection.execute("select cdcbridge_identity.mend(null)")


def problems(config: Config, connection: Connection, plugin: str) -> Iterator[Problem]:
    """Yield a problem if tables that are created later would have no replica identity."""
    wanted = wanted_scope(config, connection)
    if wanted is None:
        return
    installed = installed_scope(connection, config.source.slot)
    if installed is not None and installed.covers(wanted):
        return
    superuser, standby = _superuser(connection), _read_only(connection)
    if config.source.event_trigger:
        if standby or not superuser:
            reason = "the source is a standby" if standby else "this role is no superuser"
            yield Problem(
                "event_trigger",
                "error",
                "source.event_trigger",
                f"the event trigger is not installed, or not for all tables that the consumers take, and {reason}",
                f"-- As a superuser, on the primary.\n{install_sql(wanted)}",
            )
        return
    takers = [
        c for c in config.consumers if _WRITES & set(c.operations) and any(p.endswith(".*") for p in whole(c.tables))
    ]
    if not takers:
        return
    patterns = ", ".join(sorted({pattern for c in takers for pattern in whole(c.tables) if pattern.endswith(".*")}))
    may = "" if superuser else " (installing the trigger needs a superuser)"
    yield Problem(
        "wildcard_identity",
        "warning",
        patterns,
        f"consumer {', '.join(c.name for c in takers)} takes updates and deletes of every table in {patterns}:"
        f" {_LATER[plugin]} a table created there later without a primary key. Set"
        f" source.event_trigger to true{may}, or give each new table a primary key or REPLICA IDENTITY FULL",
        install_sql(wanted),
    )


def _by_hand(scope: Scope) -> Scope:
    return replace(scope, by_run=False)


@contextlib.contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Open a transaction in which no other session installs or removes the trigger.

    Several bridges of one database share the schema. CREATE ... IF NOT EXISTS fails if another session runs the same
    statement at that moment. The removal by the last bridge must not overlap with the installation by another bridge.
    """
    with source_errors(), connection.transaction():
        connection.execute("set local lock_timeout = '2s'")
        connection.execute("select pg_advisory_xact_lock(hashtext(%s))", (IDENTITY_SCHEMA,))
        yield


def _superuser(connection: Connection) -> bool:
    with source_errors():
        return connection.execute("select rolsuper from pg_roles where rolname = current_user").fetchone() == (True,)


def _read_only(connection: Connection) -> bool:
    with source_errors():
        return connection.execute("select pg_is_in_recovery()").fetchone() == (True,)
