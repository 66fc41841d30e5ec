"""Find out which output plugins the source has and permits, and give the options for a plugin.

Probes create temporary slots, which end with their sessions. This module never changes anything else.
"""

from __future__ import annotations

import os
from typing import Final, Literal

import psycopg

from cdcbridge.database import Connection, connect_source
from cdcbridge.schemas import both
from cdcbridge.source.setting_lists import names

_PROBE_TIMEOUT: Final = "3s"
NUMBERS_AS_TEXT: Final = "numeric-data-types-as-string"


def supports_numbers_as_text(dsn: str) -> bool | None:
    """Return whether wal2json knows the option numeric-data-types-as-string.

    The result is None if there is no usable wal2json. The test creates a temporary slot, which ends with its session.
    """
    name = f"cdcbridge_probe_{os.getpid()}"
    try:
        with connect_source(dsn, "cdcbridge probe") as connection:
            connection.execute(f"set statement_timeout = '{_PROBE_TIMEOUT}'")
            connection.execute("select pg_create_logical_replication_slot(%s, 'wal2json', true)", (name,))
            try:
                connection.execute(
                    "select count(*) from pg_logical_slot_peek_changes(%s, null, 1, 'format-version', '2',"
                    " 'numeric-data-types-as-string', '1')",
                    (name,),
                )
            except psycopg.Error:
                return False
            return True
    except psycopg.Error:
        return None


def listed(connection: Connection) -> list[str] | None:
    """Return the plugins that the setting output_plugin_libraries allows.

    The result is None on a server that has no such setting, and empty if the role may not read it. PostgreSQL's minor
    releases since 15.19 have it (CVE-2026-6471). By default it contains only pgoutput and test_decoding.
    """
    try:
        with connection.transaction():
            row = connection.execute("select current_setting('output_plugin_libraries', true)").fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return []
    if row is None or row[0] is None:
        return None
    return names(row[0])


def probe(dsn: str, plugin: str) -> Literal["usable", "refused", "missing", "unknown"]:
    """Return whether the server creates a slot with this plugin.

    The test creates a temporary slot, which ends with its session. The result is `unknown` if the server failed before
    it loaded the plugin, for example because all slots are in use.
    """
    try:
        with connect_source(dsn, "cdcbridge probe") as connection:
            connection.execute(f"set statement_timeout = '{_PROBE_TIMEOUT}'")
            connection.execute(
                "select pg_create_logical_replication_slot(%s, %s, true)", (f"cdcbridge_probe_{os.getpid()}", plugin)
            )
    except psycopg.errors.QueryCanceled:
        return "usable"  # the library was loaded, and the server waited for open transactions
    except psycopg.Error as error:
        if "output_plugin_libraries" in (error.diag.message_hint or ""):
            return "refused"
        # The file does not exist, or is not a library for this server, or the library is not an output plugin.
        return "missing" if (error.sqlstate or "").startswith(("58", "XX", "42883")) else "unknown"
    return "usable"


def without_streaming(options: dict[str, str]) -> dict[str, str]:
    """Return the same options, except that the server sends each transaction only after it has committed.

    The ordinals are the same either way.
    """
    kept = {name: value for name, value in options.items() if name != "streaming"}
    return {**kept, "proto_version": "1"} if "proto_version" in kept else kept


def plugin_options(plugin: str, publications: list[str], own_schema: str) -> dict[str, str]:
    """Return the options that the bridge gives the plugin at START_REPLICATION."""
    if plugin == "pgoutput":
        names = ",".join(f'"{name}"' for name in publications)
        return {"proto_version": "2", "streaming": "on", "publication_names": names, "messages": "true"}
    return {
        "format-version": "2",
        "include-xids": "1",
        "include-timestamp": "1",
        "include-lsn": "1",
        "include-types": "0",
        "include-type-oids": "1",
        "include-pk": "1",
        "filter-tables": ",".join(f"{schema}.*" for schema in both(own_schema)),
        NUMBERS_AS_TEXT: "1",
    }
