"""Debezium's envelope: before, after, op, source and ts_ms, as its PostgreSQL connector writes them as JSON.

Source: Debezium's documentation, "Debezium connector for PostgreSQL", "Data change events". Values of columns have the
form that they have in the log. docs/SINKS.md lists the differences from Debezium's own events, and tests/debezium
compares the two. The module is pure.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Final

import orjson

from cdcbridge.lsn import parse_lsn
from cdcbridge.routing.logical_messages import members
from cdcbridge.sinks.formats import Content, headers_of, quoted
from cdcbridge.sinks.mask import json_object
from cdcbridge.sinks.message import SinkMessage

_OPS: Final = {"insert": "c", "update": "u", "delete": "d", "truncate": "t", "read": "r", "message": "m", "gap": "m"}
_WITHOUT_ROWS: Final = ("message", "gap")
# The headers with the other key of a row whose key changed.
NEW_KEY: Final = "__debezium.newkey"
OLD_KEY: Final = "__debezium.oldkey"
# The value of a column that the WAL did not carry, as in Debezium.
UNAVAILABLE: Final = '"__debezium_unavailable_value"'


class Debezium:
    """The format `debezium`.

    Args:
        name: The name of the source, which Debezium calls the topic prefix.
        database: The source's database.
        version: The version of cdcbridge.
    """

    def __init__(self, name: str, database: str, version: str) -> None:
        self._head = f'"version":{quoted(version)},"connector":"postgresql","name":{quoted(name)}'
        self._database = quoted(database)

    def __call__(self, message: SinkMessage) -> Content:
        """Return the envelope of a message."""
        parts = dict(members(message.data))
        now = time.time_ns()
        times = f'"ts_ms":{now // 1_000_000}' if message.op in _WITHOUT_ROWS else _times(now)
        body = f'{{{self._rows(message, parts)},"source":{self._source(message)},"transaction":null,'
        body += f'"op":"{_OPS.get(message.op, "m")}",{times}}}'
        return body.encode(), headers_of(message)

    def _rows(self, message: SinkMessage, parts: Mapping[str, str]) -> str:
        record, old = parts.get("record", "null"), parts.get("old", "null")
        if message.op in _WITHOUT_ROWS:
            content = base64.b64encode(record.encode()).decode()
            return f'"message":{{"prefix":{quoted(message.topic)},"content":"{content}"}}'
        if message.op == "delete":
            return f'"before":{record},"after":null'
        if (unchanged := parts.get("unchanged", "[]")) != "[]":
            record = _with_unavailable(record, unchanged)
        return f'"before":{old},"after":{record}'

    def _source(self, message: SinkMessage) -> str:
        schema, _, table = ("", "", "") if message.op in _WITHOUT_ROWS else message.topic.partition(".")
        committed = message.inserted_at if message.commit_time == "null" else message.commit_time
        lsn = "null" if message.commit_lsn is None else parse_lsn(message.commit_lsn)
        xid = "null" if message.xid is None else message.xid
        snapshot = "true" if message.op == "read" else "false"
        sequence = quoted("[null,null]" if message.commit_lsn is None else f'[null,"{lsn}"]')
        return (
            f'{{{self._head},{_times(_nanoseconds(committed))},"snapshot":"{snapshot}","db":{self._database},'
            f'"sequence":{sequence},"schema":{quoted(schema)},"table":{quoted(table)},"txId":{xid},"lsn":{lsn},'
            '"xmin":null,"origin":null,"origin_lsn":null}'
        )


def of_moved_row(message: SinkMessage) -> tuple[SinkMessage, SinkMessage]:
    """Return an update that changed the key as a delete under the old key and an insert under the new one.

    A topic that Kafka compacts would otherwise keep the old key for ever.
    """
    parts = dict(members(message.data))
    gone = {"op": '"delete"', "record": parts.get("old", "null"), "old": "null", "unchanged": "[]"}
    come = {**parts, "op": '"insert"', "old": "null"}
    end = message._replace(id=f"{message.id}/delete", op="delete", key=message.old_key, data=json_object(gone))
    begin = message._replace(op="insert", data=json_object(come))
    return end._replace(old_key=None), begin._replace(old_key=None)


def _with_unavailable(record: str, unchanged: str) -> str:
    """Return the row with Debezium's placeholder for each column that the WAL did not carry."""
    filled = ",".join(f"{quoted(name)}:{UNAVAILABLE}" for name in orjson.loads(unchanged))
    return f"{record.rstrip()[:-1]},{filled}}}" if _has_members(record) else f"{{{filled}}}"


def _has_members(record: str) -> bool:
    """Return whether the JSON object has members."""
    return next(iter(members(record)), None) is not None if record.startswith("{") else False


def _nanoseconds(text: str) -> int:
    return round(datetime.fromisoformat(text.strip('"')).timestamp() * 1_000_000) * 1000


def _times(nanoseconds: int) -> str:
    return f'"ts_ms":{nanoseconds // 1_000_000},"ts_us":{nanoseconds // 1000},"ts_ns":{nanoseconds}'
