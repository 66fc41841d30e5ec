"""The key of a row, and its partition. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import orjson

from cdcbridge.changes.events import JsonValue, Row


def key_text(record: Row | None, columns: Sequence[str] | None) -> str | None:
    """The key: the text of one column as `record ->> column`, or a compact JSON array of several such texts."""
    if not columns or record is None:
        return None
    if len(columns) == 1:
        value = record.get(columns[0])
        return str(value) if type(value) is int else _as_text(value)
    texts = [_as_text(record.get(column)) for column in columns]
    return orjson.dumps(texts).decode() if any(text is not None for text in texts) else None


def key_columns(primary_key: Sequence[str], identity: Sequence[str], *, full: bool) -> tuple[str, ...] | None:
    """The columns of the log's key, so that an insert, an update, a delete and a read of one row have the same key.

    That is the primary key where each change carries it, else the columns of the replica identity's index, else None.
    For example, a table with the primary key (id) and `replica identity using index` on (email) has the key (email):
    its deletes carry no id.

    primary_key: its columns in key order; empty where there is none.
    identity: the columns of the replica identity's index in key order; empty where there is none.
    full: the replica identity is FULL.
    """
    if primary_key and (full or not identity or set(primary_key) <= set(identity)):
        return tuple(primary_key)
    return None if full else tuple(identity) or None


def _as_text(value: JsonValue) -> str | None:
    if value is None or type(value) is str:
        return value
    document = orjson.dumps(value).decode()
    return _text_of(document) if type(value) is orjson.Fragment else document


def _text_of(document: str) -> str | None:
    """A JSON document as `->>` gives it: `"a"` is a, `null` is None. What PostgreSQL has no text for stays JSON."""
    document = document.strip()
    if document == "null":
        return None
    if not document.startswith('"'):
        return document
    try:
        found = str(orjson.loads(document))
    except orjson.JSONDecodeError:
        return document
    return document if "\0" in found else found


def partition_of(key: bytes | None, partitions: int) -> int:
    """CRC-32 (ISO 3309, as zlib has it) of the key's UTF-8 bytes, modulo the number of partitions; 0 without a key."""
    return zlib.crc32(key) % partitions if key is not None else 0
