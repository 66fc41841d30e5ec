"""Which output plugin there is on the source, may be used, and is. Part of the rim.

Probes with temporary slots, which go with their sessions; changes nothing else.
"""

from __future__ import annotations

import os
from typing import Final, Literal

import psycopg

from cdcbridge.database import Connection, connect_source
from cdcbridge.source.setting_lists import names

_PROBE_TIMEOUT: Final = "3s"
NUMBERS_AS_TEXT: Final = "numeric-data-types-as-string"


def supports_numbers_as_text(dsn: str) -> bool | None:
    """Whether wal2json knows numeric-data-types-as-string; None where there is no usable wal2json.

    Makes a temporary slot, which goes with the session.
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
    """What output_plugin_libraries allows; None on a server that has no such setting, empty where we may not read it.

    PostgreSQL 15.19 and its sisters brought it (CVE-2026-6471); by default it names pgoutput and test_decoding alone.
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
    """Whether the server makes a slot with this plugin. Makes a temporary one, which goes with the session.

    Unknown where the server did not get as far as the plugin, for example because all slots are taken.
    """
    try:
        with connect_source(dsn, "cdcbridge probe") as connection:
            connection.execute(f"set statement_timeout = '{_PROBE_TIMEOUT}'")
            connection.execute(
                "select pg_create_logical_replication_slot(%s, %s, true)", (f"cdcbridge_probe_{os.getpid()}", plugin)
            )
    except psycopg.errors.QueryCanceled:
        return "usable"  # past the loading of its library, it waited for transactions
    except psycopg.Error as error:
        if "output_plugin_libraries" in (error.diag.message_hint or ""):
            return "refused"
        # No such file, no library of this server, or a library that is no output plugin.
        return "missing" if (error.sqlstate or "").startswith(("58", "XX", "42883")) else "unknown"
    return "usable"


def without_streaming(options: dict[str, str]) -> dict[str, str]:
    """The same, but that transactions are sent when they have committed. The ordinals are the same either way."""
    kept = {name: value for name, value in options.items() if name != "streaming"}
    return {**kept, "proto_version": "1"} if "proto_version" in kept else kept


def plugin_options(plugin: str, publications: list[str], own_schema: str) -> dict[str, str]:
    """The options that the bridge gives the plugin at START_REPLICATION."""
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
        "filter-tables": f"{own_schema}.*",
        NUMBERS_AS_TEXT: "1",
    }
