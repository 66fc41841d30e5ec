"""Set every setting on which a statement's result may depend, in each session of the bridge.

The server's file, the database, the role, PGOPTIONS, a service file, PGTZ or PGDATESTYLE can define a setting. Startup
options beat the first five, but libpq sends PGTZ, PGDATESTYLE and PGCLIENTENCODING after them. A session therefore sets
everything once more with its first statement. For example, `alter role app set timezone = 'Asia/Tokyo'` changes no
timestamp that the bridge stores or compares. Never runs a statement itself.

Source: PostgreSQL manual, "Setting Parameters", "Client Connection Defaults" and libpq's "Environment Variables".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from psycopg import sql

# Every role may set these, and every supported server knows them.
SETTINGS: Final[Mapping[str, str]] = {
    # The format of values as text, and the way in which text is read.
    "client_encoding": "UTF8",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "xmloption": "content",
    "quote_all_identifiers": "off",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "search_path": "public",
    # The rows that a transaction sees. Under `off`, row security raises an error instead of silently hiding rows.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "row_security": "off",
    # The time that a statement may take. Code that needs a limit sets one for its own transaction.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    # The way in which statements run, and in which objects are stored.
    "jit": "off",
    "exit_on_error": "off",
    "client_min_messages": "notice",
    "default_table_access_method": "heap",
}
# Older servers do not know these, so they are not startup options.
_NEWER: Final[Mapping[str, str]] = {"idle_session_timeout": "0", "transaction_timeout": "0"}
# Some roles are not allowed to set this one. Under another value, foreign keys and triggers do not act.
ORDINARY: Final[Mapping[str, str]] = {"session_replication_role": "origin"}
# With `off`, a commit could be lost after its position was confirmed. Every other value is durable and stays.
_DURABLE: Final[Mapping[str, str]] = {"synchronous_commit": "on"}
_PRIVILEGED: Final = frozenset({"session_replication_role", "track_activities"})

REFUSED_BY_POOLER: Final = "unsupported startup parameter"  # PgBouncer's words, which are never translated

_STATEMENT: Final = sql.SQL(
    "select pg_backend_pid(), count(set_config(s.name, s.value, {local})) from (values {rows}) s (name, value)"
    " where {condition} and current_setting(s.name, true) <> s.value"
    " and (s.name <> 'synchronous_commit' or current_setting(s.name) = 'off')"
)


def startup_options(settings: Mapping[str, str]) -> str:
    """Return the same settings as startup options, which apply before the first statement.

    For example, a hot standby refuses every statement of a session whose isolation level is serializable. Settings that
    some roles may not change are left out.
    """
    return " ".join(f"-c {name}={_escaped(value)}" for name, value in settings.items() if name not in _PRIVILEGED)


def _escaped(value: str) -> str:
    r"""Escape a value for startup options, where a blank ends a value: `read committed` becomes `read\ committed`."""
    return re.sub(r"([ \\])", r"\\\1", value)


def pin(settings: Mapping[str, str], backend_pid: int) -> sql.Composed:
    """Return the first statement of a session, which sets everything unless a connection pooler is in between.

    The first column of the row is the server process. Through a pooler it differs from `backend_pid`. Then the
    statement sets nothing, because a setting would reach the sessions of other applications.

    Args:
        settings: Further settings, which override those of this module.
        backend_pid: The pid of the server process, as libpq received it when the session began.
    """
    condition = sql.SQL("pg_backend_pid() = {}").format(sql.Literal(backend_pid))
    return _statement(settings, condition, local=False)


def pin_locally(settings: Mapping[str, str]) -> sql.Composed:
    """Return the statement that sets everything for one transaction only, for sessions through a pooler."""
    return _statement(settings, sql.SQL("true"), local=True)


def differing(settings: Mapping[str, str]) -> sql.Composed:
    """Return the query for the settings that only a superuser may change and that have another value.

    Its columns are the name, the wanted value, the present value and the role.
    """
    return sql.SQL(
        "select s.name, s.value, current_setting(s.name), quote_ident(current_user) from (values {}) s (name, value)"
        " where current_setting(s.name) <> s.value"
    ).format(_rows({name: value for name, value in settings.items() if name in _PRIVILEGED}))


def _statement(settings: Mapping[str, str], condition: sql.Composable, *, local: bool) -> sql.Composed:
    rows = _rows({**SETTINGS, **_NEWER, **_DURABLE, **settings})
    return _STATEMENT.format(rows=rows, condition=condition, local=sql.SQL(str(local).lower()))


def _rows(settings: Mapping[str, str]) -> sql.Composed:
    pairs = (sql.SQL("({}, {})").format(sql.Literal(name), sql.Literal(value)) for name, value in settings.items())
    return sql.SQL(", ").join(pairs)
