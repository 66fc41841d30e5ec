"""The settings on which a statement's result may depend, pinned in each session of the bridge. Part of the rim.

A setting can come from the server's file, the database, the role, PGOPTIONS, a service file, PGTZ or PGDATESTYLE.
Startup options beat the first five, but libpq sends PGTZ, PGDATESTYLE and PGCLIENTENCODING after them. A session
therefore sets everything once more with its first statement. For example, `alter role app set timezone = 'Asia/Tokyo'`
changes no timestamp that the bridge stores or compares.

Source: PostgreSQL manual, "Setting Parameters", "Client Connection Defaults" and libpq's "Environment Variables".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from psycopg import sql

# Every role may set these, and every supported server knows them.
SETTINGS: Final[Mapping[str, str]] = {
    # What values look like as text, and how text is read.
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
    # What a transaction sees. Row security raises an error where it would silently leave rows out.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "row_security": "off",
    # How long a statement may take. A place that needs a limit sets one for its own transaction.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    # How statements run, and how objects are stored.
    "jit": "off",
    "exit_on_error": "off",
    "client_min_messages": "notice",
    "default_table_access_method": "heap",
}
# A server may not know these, so they are no startup options.
_NEWER: Final[Mapping[str, str]] = {"idle_session_timeout": "0", "transaction_timeout": "0"}
# A role may not be allowed to set this one. Foreign keys and triggers do not act under another value.
ORDINARY: Final[Mapping[str, str]] = {"session_replication_role": "origin"}
# Asynchronous commits could forget a position that was confirmed. Every other value is at least as durable as `on`.
_DURABLE: Final[Mapping[str, str]] = {"synchronous_commit": "on"}
_PRIVILEGED: Final = frozenset({"session_replication_role", "track_activities"})

REFUSED_BY_POOLER: Final = "unsupported startup parameter"  # PgBouncer's words, in one language alone

_STATEMENT: Final = sql.SQL(
    "select pg_backend_pid(), count(set_config(s.name, s.value, {local})) from (values {rows}) s (name, value)"
    " where {condition} and current_setting(s.name, true) <> s.value"
    " and (s.name <> 'synchronous_commit' or current_setting(s.name) = 'off')"
)


def startup_options(settings: Mapping[str, str]) -> str:
    """The same settings as startup options, which hold before the first statement.

    An example is a hot standby, which refuses every statement of a session whose isolation level is serializable.
    """
    return " ".join(f"-c {name}={_escaped(value)}" for name, value in settings.items() if name not in _PRIVILEGED)


def _escaped(value: str) -> str:
    r"""A value in the server's syntax of options, where a blank ends one: `read committed` is `read\ committed`."""
    return re.sub(r"([ \\])", r"\\\1", value)


def pin(settings: Mapping[str, str], backend_pid: int) -> sql.Composed:
    """The first statement of a session: set everything, unless a connection pooler is between.

    The row's first column is the server process. It differs from `backend_pid` behind a pooler, where a setting would
    reach the sessions of other applications.
    """
    condition = sql.SQL("pg_backend_pid() = {}").format(sql.Literal(backend_pid))
    return _statement(settings, condition, local=False)


def pin_locally(settings: Mapping[str, str]) -> sql.Composed:
    """The same for one transaction alone, behind a pooler."""
    return _statement(settings, sql.SQL("true"), local=True)


def differing(settings: Mapping[str, str]) -> sql.Composed:
    """Name, wanted value, present value and role, for each differing setting that only a superuser may change."""
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
