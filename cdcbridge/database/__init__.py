"""Open sessions on the source and on the store, and turn psycopg's exceptions into ours.

database/session.py lists the settings of a session. Never holds any state.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdcbridge.database import session
from cdcbridge.database.encodings import unusable, without_conversion
from cdcbridge.database.sqlstates import verdict
from cdcbridge.errors import (
    BehindPooler,
    CdcbridgeError,
    OperatorNeeded,
    SourceUnavailable,
    StaleReceipt,
    StoreUnavailable,
    TargetUnavailable,
    UsageError,
)
from cdcbridge.problem import refuse
from cdcbridge.schemas import both

Connection = psycopg.Connection[tuple[Any, ...]]

# A client that vanished without closing its connection keeps its locks and the slot until TCP gives up. A standby has
# to take over within five seconds, so both ends of a session must notice the loss within three. _KEEPALIVE is for our
# end, and BRIDGE_SESSION is for the server's end.
_KEEPALIVE: Final = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 2_000,
}
BRIDGE_SESSION: Final = {
    "tcp_keepalives_idle": "1",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": "2000",
    # If the bridge is stopped in the middle of an append, the server ends the session, which frees the fence.
    "idle_in_transaction_session_timeout": "3s",
}


def conninfo(
    dsn: str,
    application_name: str,
    settings: Mapping[str, str] | None = None,
    *,
    reads: bool = False,
    pooler: bool = False,
    **extra: Any,
) -> str:
    """Return the DSN with our keepalives as defaults, and with our session settings, which override its own.

    If the DSN names several hosts, the session is on the one that accepts writes, unless the DSN states another choice
    or `reads` is true. The result always contains `options`, so that PGOPTIONS and a service file add none.

    Args:
        dsn: The DSN of the configuration.
        application_name: The name of the session in pg_stat_activity, unless the DSN has one.
        settings: Settings of the session, in addition to session.SETTINGS.
        reads: The session only reads, so a standby is good enough.
        pooler: Send no `options` but those in the DSN, because a connection pooler refuses others.
        **extra: Parameters of libpq, which override those in the DSN.

    Raises:
        UsageError: The DSN cannot be parsed.
    """
    given = _parsed(dsn)
    options = "" if pooler else session.startup_options({**session.SETTINGS, **(settings or {})})
    merged: dict[str, Any] = {**_KEEPALIVE, "application_name": application_name, **given, **extra}
    merged["client_encoding"] = "UTF8"
    merged["options"] = f"{given.get('options') or ''} {options}".strip()
    several = "," in str(given.get("host", given.get("hostaddr", "")))
    if several and not reads and merged.get("target_session_attrs", "read-write") == "read-write":
        # `read-write` would refuse a primary with default_transaction_read_only on. Our sessions turn that setting off.
        merged["target_session_attrs"] = "primary"
    return make_conninfo(**merged)


def _parsed(dsn: str) -> dict[str, Any]:
    """Return the keywords and values of a DSN.

    A bad DSN raises UsageError. Its message quotes no value, because any of them may be a password.
    """
    try:
        return conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        raise UsageError(
            f"the DSN cannot be parsed: {_without_values(str(error))}",
            hint="postgresql://user:password@host:port/database, or host=… port=… user=… dbname=…. In a URL, special"
            " characters of a password are written as %40 and so on.",
        ) from None


def cut_off(connection: Connection) -> None:
    """End a session from another thread, so that the thread that waits in it gets an error at once."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def one_line(text: str) -> str:
    """Join the lines of a message of libpq."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


_LIBPQ: Final = re.compile(r'connection to server (?:at|on socket) "([^"]+)"(?: \([^)]*\))?(, port \d+)? failed: ')
_QUESTION: Final = re.compile(r";? ?\bIs the server running [^?]*\?")


def plain(text: str) -> str:
    """Return the reason of a failed connection without the words that libpq puts around it."""
    text = _LIBPQ.sub(r"no connection to \1\2: ", text)
    text = re.sub(r"^connection (failed|is bad): (?=no connection to)", "", text)
    return _QUESTION.sub("", re.sub(r": FATAL:\s+", ": ", text)).strip()


def _without_values(message: str) -> str:
    """Replace the quoted part of a message of libpq by `"…"`.

    libpq quotes the part of a DSN that it cannot parse, and that may be the password.
    """
    return re.sub(r'".*"', '"…"', message.strip(), flags=re.DOTALL)


def database_place(dsn: str) -> str:
    """Name the database of a DSN for people, without secrets: `db1.example.com/shop`, `db1:5433,db2:5433/shop`.

    A host that means this machine is replaced by the name of the machine.

    Raises:
        UsageError: The DSN cannot be parsed.
    """
    defaults = {option.keyword.decode(): (option.val or b"").decode() for option in pq.Conninfo.get_defaults()}
    given = {**defaults, **_parsed(dsn)}
    hosts = (str(given.get("host") or "") or str(given.get("hostaddr") or "")).split(",")
    ports = str(given.get("port") or "").split(",")
    names = []
    for number, host in enumerate(hosts):
        port = ports[number] if number < len(ports) else ports[-1]
        name = socket.gethostname() if host in ("", "localhost", "127.0.0.1", "::1") or host[0] in "/@" else host
        names.append(name if port in ("", "5432") else f"{name}:{port}")
    return f"{','.join(names)}/{given.get('dbname') or given.get('user') or ''}"


def connect_source(
    dsn: str, application_name: str = "cdcbridge", *, autocommit: bool = True, reads: bool = False
) -> Connection:
    """Open a session on the source, with the settings that every session has.

    Args:
        dsn: The DSN of the source.
        application_name: The name of the session in pg_stat_activity.
        autocommit: Run each statement as a transaction of its own.
        reads: The session only reads, so a standby is good enough.

    Raises:
        SourceUnavailable: The source cannot be reached.
        BehindPooler: The DSN leads to a connection pooler.
        OperatorNeeded: The role may not change a setting on which the session depends.
    """
    with source_errors():
        connection = _connect(conninfo(dsn, application_name, reads=reads), {}, "source")
        connection.autocommit = autocommit
        return connection


def connect_target(dsn: str, schema: str) -> Connection:
    """Open a session on the target of a mirror, with `schema` in its search_path.

    Args:
        dsn: The DSN of the target.
        schema: The schema of the mirror's own tables.

    Raises:
        TargetUnavailable: The target cannot be reached.
        BehindPooler: The DSN leads to a connection pooler.
        OperatorNeeded: The role may not change a setting on which the session depends.
    """
    with target_errors():
        path = sql.SQL("{}, pg_temp").format(sql.Identifier(schema)).as_string(None)
        return _connect(conninfo(dsn, "cdcbridge mirror"), {"search_path": path}, "target")


def connect_store(
    dsn: str,
    schema: str,
    application_name: str = "cdcbridge",
    settings: Mapping[str, str] | None = None,
    **extra: Any,
) -> Connection:
    """Open a session on the store, with the store's schema as its search_path.

    Args:
        dsn: The DSN of the store.
        schema: The schema of the store.
        application_name: The name of the session in pg_stat_activity.
        settings: Further settings of the session.
        **extra: Parameters of libpq.

    Raises:
        StoreUnavailable: The store cannot be reached.
        BehindPooler: The DSN leads to a connection pooler.
        OperatorNeeded: The role has no rights on the schema, or may not change a setting on which the session depends.
    """
    with store_errors():
        given = {**(settings or {}), "search_path": search_path(schema)}
        # The connection string has no search_path, because libpq would have to pass on its quotes. The first statement
        # sets the path.
        connection = _connect(conninfo(dsn, application_name, settings, **extra), given, "store")
        refuse_without_usage(connection, schema)
        return connection


def search_path(schema: str) -> str:
    """Return the search_path that finds the store's objects by their names, and temporary objects last."""
    return sql.SQL("{}, {}, pg_temp").format(*map(sql.Identifier, both(schema))).as_string(None)


def _connect(text: str, settings: Mapping[str, str], what: str) -> Connection:
    """Open a session that depends on no setting outside of the program.

    This function raises psycopg.Error, BehindPooler or OperatorNeeded.
    """
    settings = {**session.ORDINARY, **settings}
    try:
        connection = psycopg.connect(text, autocommit=True)
    except psycopg.OperationalError as error:
        if session.REFUSED_BY_POOLER in str(error):
            raise behind_pooler(what, one_line(str(error))) from error
        raise
    try:
        pid = connection.info.backend_pid
        row = connection.execute(session.pin(settings, pid)).fetchone()
        if row and row[0] != pid:
            raise behind_pooler(what, f"the server process of a session is {row[0]}, but the pooler calls it {pid}")
    except psycopg.errors.InsufficientPrivilege as error:
        raise _not_allowed(connection, settings, what) from error
    except BaseException:
        connection.close()
        raise
    return connection


def behind_pooler(what: str, reason: str) -> BehindPooler:
    """Return the error for a DSN that leads to a connection pooler.

    Args:
        what: `source` or `store`.
        reason: The sign by which the pooler was recognised.
    """
    return BehindPooler(
        f"{what}: a connection pooler such as PgBouncer is between the bridge and the server ({reason})",
        hint=f"Put the server's own host and port into {what}.dsn. Clients and SQL functions may use the pooler.",
    )


def _not_allowed(connection: Connection, settings: Mapping[str, str], what: str) -> OperatorNeeded:
    rows = connection.execute(session.differing(settings)).fetchall()
    connection.close()
    told = ", ".join(f"{name} is {value}, and must be {wanted}" for name, wanted, value, _ in rows)
    fixes = " ".join(f"alter role {role} set {name} = {wanted};" for name, wanted, _, role in rows)
    role = rows[0][3] if rows else connection.info.user
    return OperatorNeeded(
        f"{what}: the role {role} may not change a setting on which the session depends: {told}",
        hint=f"As a superuser: {fixes}",
    )


def refuse_without_usage(connection: Connection, schema: str) -> None:
    """Raise OperatorNeeded if the role has no rights on the schema, and close the connection.

    To such a role, the tables of the schema look as if they did not exist.
    """
    row = connection.execute(
        "select quote_ident(nspname), quote_ident(current_user) from pg_namespace"
        " where nspname = %s and not has_schema_privilege(oid, 'usage')",
        (schema,),
    ).fetchone()
    if row:
        connection.close()
        raise OperatorNeeded(
            f"the role {row[1]} may not use the store's schema {row[0]}",
            hint=f"As its owner: grant usage on schema {row[0]} to {row[1]}; -- for the consumers that name this role."
            " All other commands need the owner itself.",
        )


@contextmanager
def source_errors() -> Iterator[None]:
    """Turn psycopg's errors into ours, for work on the source."""
    with _errors(SourceUnavailable, "source"):
        yield


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn psycopg's errors into ours, for work on the store."""
    with _errors(StoreUnavailable, "store"):
        yield


@contextmanager
def target_errors() -> Iterator[None]:
    """Turn psycopg's errors into ours, for work on the target of a mirror."""
    with _errors(TargetUnavailable, "target"):
        yield


@contextmanager
def server_errors() -> Iterator[None]:
    """Turn psycopg's errors into ours, for work on both databases.

    This is for the outermost block. It handles the errors of statements that are in no other block.
    """
    with _errors(SourceUnavailable, "server"):
        yield


_HINTS: Final = {
    "25006": "The server takes no writes now: it is a standby, or about to be promoted. Name all servers in the DSN"
    " (host=db1,db2), or the one that takes writes.",
    "28": "Check the DSN, the password and pg_hba.conf.",
    "3D": "Check the DSN, the password and pg_hba.conf.",
    "42501": "`cdcbridge check` prints the grants that are missing.",
    "58": "The server's log names the file. Restore it, or restore the server from a backup.",
    "XX001": "Restore the table from a backup. PostgreSQL's amcheck and pg_checksums show the extent.",
    "XX002": "REINDEX the index, and let amcheck and pg_checksums show the extent.",
}


_OWNER: Final = "Connect as the store's owner (store.dsn). For a new store, `cdcbridge check` prints the grant."


def _no_right(found: re.Match[str]) -> str:
    return f"this role has no right {'on' if found[1] == 'for' else 'to'}"


@contextmanager
def _errors(unavailable: type[CdcbridgeError], what: str) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        if not error.sqlstate and (encoding := without_conversion(str(error))):
            refuse([unusable("source" if what == "source" else "store", encoding)])
        raise _ours(error, unavailable, what) from error


def _ours(error: psycopg.Error, unavailable: type[CdcbridgeError], what: str) -> CdcbridgeError:
    """Return our error for one of psycopg, according to the verdict of database/sqlstates.py on its code."""
    state = error.sqlstate or ""
    if state == "CB006":
        return StaleReceipt(str(error.diag.message_primary), hint=error.diag.message_hint)
    if state.startswith("CB"):
        return UsageError(str(error.diag.message_primary), hint=error.diag.message_hint)
    message = f"{what}: {plain(one_line(str(error)))}"
    if state == "42501":  # for example: permission denied to use replication slots
        message = re.sub(r"permission denied (for|to)\b", _no_right, message, count=1)
    hint = None
    if state == "42501":
        # The server gives a hint if no grant is missing, for example if a setting lists the objects that may be used.
        hint = error.diag.message_hint or (_OWNER if what == "store" else None)
    hint = hint or _HINTS.get(state) or _HINTS.get(state[:2]) or error.diag.message_hint
    # An error without a code is not from the server: the session is lost, or was closed.
    lost = not state and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    judged = verdict(state, error.diag.source_function or "")
    if lost or judged == "away":
        return unavailable(message, hint=hint)
    if judged == "operator":
        return OperatorNeeded(message, hint=hint)
    return CdcbridgeError(message, hint=hint)
