"""Checks of the sessions that `run` needs: that the servers grant them, and that they see every row. Part of the rim.

A bridge needs ordinary sessions on both sides, one replication session, and for a snapshot a session that row-level
security does not restrict. For example, PgBouncer in front of the source is named here before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cdcbridge.config import Config, Consumer
from cdcbridge.database import Connection, connect_source, source_errors
from cdcbridge.errors import BehindPooler, CdcbridgeError, OperatorNeeded, SourceUnavailable
from cdcbridge.problem import Problem, refuse
from cdcbridge.source.facts import SourceFacts
from cdcbridge.source.replication import ReplicationStream
from cdcbridge.source.tables import tables_of

# A table without a key is read by its partitions, each with a policy of its own.
_RESTRICTED: Final = """
    select format('%%s.%%s', n.nspname, c.relname), quote_ident(current_user)
    from (select %(oid)s::oid as relid
          union
          select p.relid from pg_partition_tree(%(oid)s::oid::regclass) p where p.isleaf and not exists (
              select from pg_index i where i.indrelid = %(oid)s and i.indisvalid
                                      and (i.indisprimary or i.indisreplident))
    ) t join pg_class c on c.oid = t.relid join pg_namespace n on n.oid = c.relnamespace
    where row_security_active(c.oid) order by 1 limit 1
"""
_HBA: Final = "pg_hba.conf"  # in the server's message, whatever its language


def unreachable(error: CdcbridgeError, where: str, connection_of: str) -> Problem | None:
    """Name the problem of a session that the server or a pooler refused; None where a retry may help.

    `where` is the key of the DSN, for example `source.dsn`.
    """
    message = str(error).split(": ", 1)[-1]
    if isinstance(error, BehindPooler):
        return Problem("pooler", "error", where, message, error.hint or "")
    if _HBA in message:
        return Problem("pg_hba", "error", where, message, _entry(connection_of))
    return None


def _entry(what: str) -> str:
    return (
        f"Add a line for the {what} to pg_hba.conf: host DATABASE USER ADDRESS scram-sha-256 (the message names the"
        " three); then: select pg_reload_conf();"
    )


def replication_problems(config: Config, facts: SourceFacts, connection: Connection) -> list[Problem]:
    """Try a replication session on the source, and name the reason of a failure.

    A bridge that streams from the slot just now proves that it works, so nothing is tried then.
    """
    if facts.slot is not None and facts.slot.active_pid is not None:
        return []
    try:
        ReplicationStream(config.source_dsn, patient=True).close()
    except (BehindPooler, SourceUnavailable, OperatorNeeded) as error:
        return [_without_replication(connection, error)]
    return []


def open_stream(config: Config, *, patient: bool) -> ReplicationStream:
    """The bridge's replication session.

    Raises CheckFailed on a server that allows none, SourceUnavailable where all are taken just now: perhaps one belongs
    to a bridge that was killed, and is free soon.
    """
    try:
        return ReplicationStream(config.source_dsn, patient=patient)
    except SourceUnavailable as error:
        with connect_source(config.source_dsn, "cdcbridge setup") as connection:
            problem = senders_taken(connection)
            if problem is None:
                raise
            if connection.execute("show max_wal_senders").fetchone() == ("0",):
                refuse([problem])
        raise SourceUnavailable(f"source: {problem.message}", hint=problem.fix) from error


def senders_taken(connection: Connection) -> Problem | None:
    """Name the problem of a server whose WAL senders are all in use. A restarted bridge waits for one."""
    with source_errors():
        row = connection.execute(
            "select count(*), current_setting('max_wal_senders')::int from pg_stat_replication"
        ).fetchone()
    taken, limit = row or (0, 1)
    if taken < limit:
        return None
    return Problem(
        "no_wal_sender",
        "error",
        "source",
        f"all {limit} WAL senders of the server are in use (max_wal_senders), and the bridge needs one",
        f"alter system set max_wal_senders = {limit + 5}; -- as a superuser; and restart the server; or end a client of"
        " pg_stat_replication that nobody needs",
    )


def _without_replication(connection: Connection, error: CdcbridgeError) -> Problem:
    known = senders_taken(connection) or unreachable(error, "source.dsn", "bridge")
    if known is not None:
        return known
    message = f"no replication session can be opened: {str(error).removeprefix('source: ')}"
    fix = error.hint or "Try it: psql 'DSN replication=database' -c 'IDENTIFY_SYSTEM'"
    return Problem("replication_session", "error", "source", message, fix)


def snapshot_problems(config: Config, connection: Connection, filled: Iterable[str]) -> list[Problem]:
    """Find tables of which row-level security hides rows from a snapshot.

    `filled` are the consumers that have had their snapshot. They need no other.
    """
    waiting = [c for c in config.consumers if c.start == "snapshot" and c.name not in set(filled)]
    if not waiting:
        return []
    if config.source.read_dsn is None:
        return _restricted(config, connection, waiting)
    try:
        with connect_source(config.read_dsn, "cdcbridge check", reads=True) as reader:
            return _restricted(config, reader, waiting)
    except CdcbridgeError as error:
        known = unreachable(error, "source.read_dsn", "backfills")
        return [known] if known else []


def _restricted(config: Config, reader: Connection, consumers: Iterable[Consumer]) -> list[Problem]:
    found = []
    for consumer in consumers:
        for table in tables_of(reader, consumer.tables, config.store.schema_):
            error = row_security(reader, table.schema, table.name)
            if error is not None:
                message = f"consumer {consumer.name} has start: snapshot, and {error}"
                found.append(Problem("row_security", "error", table.topic, message, error.hint or ""))
    return found


def row_security(reader: Connection, schema: str, name: str) -> OperatorNeeded | None:
    """The error for a table some of whose rows this role may not see; None where it sees all, or there is no table."""
    with source_errors():
        oid = reader.execute(
            "select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = %s and c.relname = %s",
            (schema, name),
        ).fetchone()
        row = oid and reader.execute(_RESTRICTED, {"oid": oid[0]}).fetchone()
    if not row:
        return None
    return OperatorNeeded(
        f"row-level security of {row[0]} hides rows of it from the role {row[1]}: reading it would leave them out",
        hint=f"alter role {row[1]} bypassrls; -- as a superuser",
    )


def refuse_row_security(reader: Connection, schema: str, name: str) -> None:
    """Raises OperatorNeeded where the role would not see all rows of the table."""
    error = row_security(reader, schema, name)
    if error is not None:
        raise error
