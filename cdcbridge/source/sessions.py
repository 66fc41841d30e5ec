"""Check that the servers grant the sessions that `run` needs, and that these sessions see every row.

A bridge needs ordinary sessions on the source and on the store, and one replication session. A snapshot also needs a
session that row-level security does not restrict. For example, PgBouncer in front of the source is reported here before
anything is written.
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

# A partitioned table without a key is read one partition at a time, and each partition has its own policies.
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
_HBA: Final = "pg_hba.conf"  # part of the server's message in every language


def unreachable(error: CdcbridgeError, where: str, connection_of: str) -> Problem | None:
    """Return the problem if the server or a pooler refused the session, or None if a retry may help.

    Args:
        error: The error of the failed connection.
        where: The key of the DSN, for example `source.dsn`.
        connection_of: The part of cdcbridge that needs the session, for example `bridge`. The fix names it.
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
        " three). Then: select pg_reload_conf();"
    )


def replication_problems(config: Config, facts: SourceFacts, connection: Connection) -> list[Problem]:
    """Try to open a replication session on the source, and return the reason if that fails.

    Nothing is tried while a session streams from the slot, because that session proves that replication works.
    """
    if facts.slot is not None and facts.slot.active_pid is not None:
        return []
    try:
        ReplicationStream(config.source_dsn, patient=True).close()
    except (BehindPooler, SourceUnavailable, OperatorNeeded) as error:
        return [_without_replication(connection, error)]
    return []


def open_stream(config: Config, *, patient: bool) -> ReplicationStream:
    """Open the bridge's replication session.

    Raises:
        CheckFailed: The server allows no replication sessions.
        SourceUnavailable: All replication sessions are in use. One may belong to a bridge that was killed, and is free
            soon.
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
    """Return the problem if all WAL senders of the server are in use, or None.

    A bridge that was restarted waits for a free one.
    """
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
        f"alter system set max_wal_senders = {limit + 5}; -- as a superuser. Then restart the server. Or end a client"
        " of pg_stat_replication that is not needed",
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

    The consumers in `filled` already had their snapshot and do not need another one.
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
    """Return the error if this role may not see all rows of the table.

    The result is None if the role sees all rows, or if there is no such table.
    """
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
    """Raise OperatorNeeded if the role would not see all rows of the table."""
    error = row_security(reader, schema, name)
    if error is not None:
        raise error
