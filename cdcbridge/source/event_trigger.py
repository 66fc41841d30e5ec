"""The event trigger that gives new tables a replica identity: installed, compared and removed. Part of the rim.

A wildcard publishes tables that do not exist yet. PostgreSQL refuses an UPDATE of one without a primary key, so the
trigger gives it REPLICA IDENTITY FULL in the transaction that creates it. The SQL is sql/source/identity.sql.
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
# The first one does its work as well. It records no identity from before.
_VERSIONS: Final = ["cdcbridge event trigger 1", "cdcbridge event trigger 2"]
_LATER: Final = {
    "pgoutput": "PostgreSQL will refuse to change or delete rows of",
    "wal2json": "wal2json will drop the updates and deletes of",
}
Keep: TypeAlias = Callable[[list[tuple[int, str]]], None]
log = structlog.get_logger()


@dataclass(slots=True, frozen=True)
class Scope:
    """What the trigger looks after for one bridge: a row of cdcbridge_identity.bridges.

    tables: partitioned tables that are named, for the sake of partitions that are attached later.
    by_run: `run` has installed it, and removes it again.
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
    """Work out what the trigger must look after, or None where no later table can be published with updates."""
    patterns = sorted({p for c in config.consumers if _WRITES & set(c.operations) for p in whole(c.tables)})
    schemas = tuple(p[:-2] for p in patterns if p.endswith(".*") and p != "*.*")
    named = [t for p in patterns if not p.endswith(".*") for t in find_tables(connection, p, config.store.schema_)]
    tables = tuple(table.topic for table in named if table.kind == "p" and not table.partition)
    everything = "*.*" in patterns
    if not (everything or schemas or tables):
        return None
    return Scope(config.source.slot, everything, schemas, tables, config.store.schema_)


def installed_scope(connection: Connection, slot: str) -> Scope | None:
    """Read what the trigger looks after for this slot. None where it is missing, switched off or of another version."""
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
            return None  # the last bridge has removed it since the statement before
    return Scope(found[0], found[1], tuple(found[2]), tuple(found[3]), *found[4:]) if found else None


def install_sql(scope: Scope) -> str:
    """Write the SQL that installs the trigger, or brings it into step."""
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
    """Install or remove the trigger, as `source.event_trigger` says; whether it was installed anew.

    One that was installed by hand stays. Raises OperatorNeeded where the role may not install it.

    keep: called with the tables that have their identity from the trigger, before it is removed. Without it, nothing is
        removed.
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
    """List the tables that got REPLICA IDENTITY FULL from the trigger: their OID, and pg_class.relreplident before."""
    with source_errors():
        if connection.execute("select to_regclass('cdcbridge_identity.changed')").fetchone() == (None,):
            return []
        return connection.execute(
            "select relation::int8, coalesce(to_jsonb(c) ->> 'before', 'd') from cdcbridge_identity.changed c"
        ).fetchall()


def remove(connection: Connection, slot: str) -> None:
    """Take a bridge's row away, and the trigger with the last one."""
    with _alone(connection):
        connection.execute("delete from cdcbridge_identity.bridges where slot = %s", (slot,))
        if connection.execute("select from cdcbridge_identity.bridges").fetchone() is None:
            connection.execute("drop event trigger if exists cdcbridge_identity_command")
            connection.execute("drop event trigger if exists cdcbridge_identity_drop")
            connection.execute("drop schema cdcbridge_identity cascade")


def mend(connection: Connection) -> None:
    """Look at all tables once: one may have been created by a transaction that was older than the trigger."""
    if not _read_only(connection):
        with source_errors():
            connection.execute("select cdcbridge_identity.mend(null)")


def problems(config: Config, connection: Connection, plugin: str) -> Iterator[Problem]:
    """Tell which tables that are created later would have no replica identity."""
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
                f"the event trigger is not installed, or not for all that the consumers take, and {reason}",
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
    """One transaction, in which no other session installs or removes anything.

    Several bridges of one database share the schema. CREATE ... IF NOT EXISTS fails beside another session's, and the
    removal by the last bridge must not meet the installation by another one.
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
