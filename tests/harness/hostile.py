"""Settings and an environment under which nothing may change, and the tests' own sessions made independent of them.

`CDCBRIDGE_TEST_HOSTILE=1 pytest` (`make test-hostile`) starts every test server with SERVER, and gives ENVIRONMENT to the
program under test.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, Final

import psycopg

from cdcbridge.demo import embedded

SWITCH: Final = "CDCBRIDGE_TEST_HOSTILE"
SERVER: Final = {
    "client_encoding": "LATIN1",
    "timezone": "America/New_York",
    "datestyle": "German",
    "intervalstyle": "sql_standard",
    "extra_float_digits": "0",
    "bytea_output": "escape",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "statement_timeout": "5s",
    "lock_timeout": "1s",
    "row_security": "on",
}
# What a test of sessions alone can bear, in addition.
WORSE: Final = {
    **SERVER,
    "default_transaction_deferrable": "on",
    "statement_timeout": "1s",
    "lock_timeout": "100ms",
    "idle_session_timeout": "2s",
    "idle_in_transaction_session_timeout": "200ms",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "xmloption": "document",
    "search_path": "pg_temp",
    "synchronous_commit": "off",
    "client_min_messages": "error",
    "exit_on_error": "on",
}
PRIVILEGED: Final = {"session_replication_role": "replica", "track_activities": "off"}
ENVIRONMENT: Final = {"PGTZ": "Asia/Kathmandu", "PGDATESTYLE": "SQL, DMY", "PGCLIENTENCODING": "LATIN1"}

_OWN: Final = {
    "client_encoding": "UTF8", "timezone": "UTC", "datestyle": "ISO, MDY", "intervalstyle": "postgres",
    "extra_float_digits": "1", "bytea_output": "hex", "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off", "default_transaction_deferrable": "off", "statement_timeout": "0",
    "lock_timeout": "0", "idle_session_timeout": "0", "idle_in_transaction_session_timeout": "0",
    "quote_all_identifiers": "off", "standard_conforming_strings": "on", "array_nulls": "on",
    "transform_null_equals": "off", "xmloption": "content", "search_path": '"$user", public',
    "synchronous_commit": "on", "client_min_messages": "notice", "exit_on_error": "off",
}  # fmt: skip


def options(settings: Mapping[str, str]) -> str:
    """Settings as PGOPTIONS has them."""
    return " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items())


def environment(settings: Mapping[str, str], folder: Path) -> dict[str, str]:
    """ENVIRONMENT, with the settings as PGOPTIONS and in the service file that PGSERVICE names."""
    file = folder / "pg_service.conf"
    file.write_text(f"[hostile]\noptions={options(settings)}\nclient_encoding=LATIN1\n")
    file.chmod(0o644)
    return {**ENVIRONMENT, "PGOPTIONS": options(settings), "PGSERVICE": "hostile", "PGSERVICEFILE": str(file)}


def own_environment() -> dict[str, str]:
    """The environment of PostgreSQL's own programs, such as psql, which behave like the tests' sessions."""
    kept = {
        name: value for name, value in os.environ.items() if name not in {*ENVIRONMENT, "PGSERVICE", "PGSERVICEFILE"}
    }
    return {**kept, "PGOPTIONS": options(_OWN)}


def _is_own(caller: FrameType) -> bool:
    return str(caller.f_globals["__name__"]).startswith("tests")


def _without_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An empty value, so that libpq does not look at PGOPTIONS, which PgBouncer would refuse."""
    given = "options" in kwargs or any("options" in str(arg) for arg in args)
    return kwargs if given else {**kwargs, "options": ""}


def _statements(*given: object) -> bytes:
    """Set everything, except the client encoding and the search path where the connection's arguments name them."""
    kept = {name for name in ("client_encoding", "search_path") if name in repr(given)}
    settings = {name: f"'{value}'" for name, value in _OWN.items() if name not in kept}
    if "search_path" in settings:
        settings["search_path"] = '"$user", public'  # a list, not one name
    newer = "select set_config(n, '0', false) from unnest(array['transaction_timeout']) n"
    newer += " where current_setting(n, true) is not null"  # 17 and later
    return "; ".join([*(f"set {name} = {value}" for name, value in settings.items()), newer]).encode()


def _behave(connection: psycopg.Connection[Any], *given: object) -> None:
    cursor = connection.cursor(row_factory=psycopg.rows.tuple_row)
    try:
        backend = cursor.execute("select pg_backend_pid()").fetchone()
    except psycopg.errors.FeatureNotSupported:  # a standby has no serializable transactions
        connection.rollback()
        connection.execute("set default_transaction_isolation = 'read committed'")
        if not connection.autocommit:
            connection.commit()
        backend = cursor.execute("select pg_backend_pid()").fetchone()
    connection.rollback()
    if backend != (connection.info.backend_pid,):
        return  # a pooler's session is also used by others
    connection.execute(_statements(*given))
    if not connection.autocommit:
        connection.commit()


def connect(original: Callable[..., Any]) -> Callable[..., Any]:
    """psycopg.connect, with sessions for tests that behave; those of the program are left alone."""

    @wraps(original)
    def behaving(*args: Any, **kwargs: Any) -> Any:
        if not _is_own(sys._getframe(1)):
            return original(*args, **kwargs)
        connection = original(*args, **_without_options(args, kwargs))
        _behave(connection, args, kwargs)
        return connection

    return behaving


def connect_asynchronously(original: Any) -> Any:
    """The same of psycopg.AsyncConnection.connect, which makes a connection of the class that it is called on."""
    plain = original.__func__

    async def behave(pending: Any) -> Any:
        connection = await pending
        await connection.execute(_statements())
        if not connection.autocommit:
            await connection.commit()
        return connection

    def behaving(cls: type[psycopg.AsyncConnection[Any]], *args: Any, **kwargs: Any) -> Any:
        if not _is_own(sys._getframe(1)):
            return plain(cls, *args, **kwargs)
        return behave(plain(cls, *args, **_without_options(args, kwargs)))

    return classmethod(behaving)


def install_if_wanted() -> None:
    """Do so once in a process, where SWITCH is set."""
    if SWITCH not in os.environ or hasattr(psycopg.connect, "__wrapped__"):
        return
    folder = Path(tempfile.mkdtemp(prefix="cdcbridge-hostile-"))
    atexit.register(shutil.rmtree, folder)
    install(folder)


def install(folder: Path) -> None:
    """Make everything hostile but the tests' own sessions."""
    embedded._SETTINGS.update(SERVER)
    os.environ.update(environment(SERVER, folder))
    psycopg.connect = connect(psycopg.connect)
    psycopg.AsyncConnection.connect = connect_asynchronously(psycopg.AsyncConnection.connect)  # type: ignore[method-assign]
