"""Read facts about the source outside the stream, and create its slot. This module never alters a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from cdcbridge.database import Connection, connect_source, source_errors
from cdcbridge.database.blockers import BlockerWatch
from cdcbridge.errors import NotLeader
from cdcbridge.lsn import parse_lsn


@dataclass(slots=True, frozen=True)
class Slot:
    """A row of pg_replication_slots."""

    name: str
    plugin: str
    database: str
    active_pid: int | None
    wal_status: str
    restart_lsn: int | None
    confirmed_flush_lsn: int | None
    invalidation: str | None = None
    safe_wal_size: int | None = None  # bytes until max_slot_wal_keep_size, None without that limit
    inactive_seconds: float | None = None  # None while it is active, and before PostgreSQL 17
    failover: bool | None = None  # None before PostgreSQL 17


def slots(connection: Connection, name: str | None = None) -> list[Slot]:
    """Return the logical slots of the cluster, or only the one of that name."""
    with source_errors():
        version = connection.info.server_version
        newer = "null, null, null"
        if version >= 170000:
            newer = "invalidation_reason, extract(epoch from clock_timestamp() - inactive_since)::float8, failover"
        rows = connection.execute(
            f"select slot_name, plugin, database, active_pid, wal_status, restart_lsn::text,"  # noqa: S608
            f" confirmed_flush_lsn::text, safe_wal_size, {newer} from pg_replication_slots"
            " where slot_type = 'logical' and (%s::text is null or slot_name = %s) order by slot_name",
            (name, name),
        ).fetchall()
    return [Slot(r[0], r[1], r[2], r[3], r[4], _lsn(r[5]), _lsn(r[6]), r[8], r[7], r[9], r[10]) for r in rows]


def refuse_in_use(connection: Connection, name: str) -> None:
    """Raise NotLeader while a session reads from the slot, because the slot cannot be dropped then.

    The error names the session.
    """
    with source_errors():
        row = connection.execute(
            "select s.active_pid, coalesce(nullif(a.application_name, ''), 'unknown client'),"
            " coalesce(' at ' || host(a.client_addr), '') from pg_replication_slots s"
            " left join pg_stat_activity a on a.pid = s.active_pid where s.slot_name = %s and s.active_pid is not null",
            (name,),
        ).fetchone()
    if row is None:
        return
    pid, client, address = row
    who = "a bridge is running" if client.startswith("cdcbridge") else "another client reads it"
    raise NotLeader(
        f"the slot {name} is in use by pid {pid} ({client}{address}): {who}",
        hint="Stop it first. `cdcbridge slot list` shows the readers of each slot.",
    )


def _lsn(text: str | None) -> int | None:
    return None if text is None else parse_lsn(text)


class Identity(NamedTuple):
    """The identity of a database. A renamed database keeps its OID."""

    system_identifier: str
    database: str
    database_oid: int


def identify(connection: Connection) -> Identity:
    """Return the identity of the session's database."""
    query = (
        "select s.system_identifier::text, d.datname::text, d.oid::int8 from pg_control_system() s"
        " join pg_database d on d.datname = current_database()"
    )
    with source_errors():
        row = connection.execute(query).fetchone()
    return Identity(*row) if row else Identity("", "", 0)


def in_recovery(connection: Connection) -> bool:
    """Return whether the source is a standby."""
    with source_errors():
        return connection.execute("select pg_is_in_recovery()").fetchone() == (True,)


def current_lsn(connection: Connection) -> int:
    """Return the LSN up to which the WAL is written now, or on a standby is replayed."""
    with source_errors():
        row = connection.execute(
            "select (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end)::text"
        ).fetchone()
    return parse_lsn(row[0]) if row else 0


def create_slot(dsn: str, name: str, plugin: str, *, failover: bool, waiting: Callable[[str], None]) -> int:
    """Create the slot, and return its first position.

    Creation waits for all open transactions that write. Source: PostgreSQL manual, "Replication Slots".

    Args:
        dsn: The connection string of the source.
        name: The name of the slot.
        plugin: The output plugin.
        failover: Whether standbys keep the slot too, which needs a server that can do so (SourceFacts.may_fail_over).
        waiting: Called with a text that names these transactions, or on a standby the step to take on the primary.
    """
    with (
        connect_source(dsn, "cdcbridge slot") as creator,
        watch_creation(dsn, creator.info.backend_pid, waiting),
        source_errors(),
    ):
        more = ", failover => true" if failover else ""
        row = creator.execute(
            f"select lsn::text from pg_create_logical_replication_slot(%s, %s{more})".encode(),  # noqa: S608
            (name, plugin),
        ).fetchone()
    return parse_lsn(row[0]) if row else 0


@contextlib.contextmanager
def watch_creation(dsn: str, pid: int, waiting: Callable[[str], None]) -> Iterator[None]:
    """Report the open transactions for which a session waits while it creates a slot.

    Args:
        dsn: The connection string of the source.
        pid: The server process that creates the slot.
        waiting: Called with a text that names these transactions, or on a standby the step to take on the primary.
    """
    told: list[int] = []
    with connect_source(dsn, "cdcbridge slot watch") as watcher:
        standby = in_recovery(watcher)

        def found(pids: list[int], named: str) -> None:
            nonlocal told
            if pids and pids != told:
                told = pids
                waiting(named)
            elif standby and not told and not pids:
                told = [0]
                waiting("the primary, to log its running transactions: select pg_log_standby_snapshot() there")

        with BlockerWatch("slot-watch", watcher, lambda: pid, _BLOCKERS, found, interval=1.0):
            yield


_BLOCKERS: Final = """
    select array_agg(a.pid order by a.pid),
           string_agg(format('pid %%s (%%s, %%s, open for %%s)', a.pid, a.usename, a.state,
                             date_trunc('second', clock_timestamp() - a.xact_start)), '; ' order by a.pid)
    from unnest(pg_blocking_pids(%s)) b (pid) join pg_stat_activity a using (pid)
"""
