"""Compute the key of a row, and the partition of a key.

This module is pure. Never looks up the definition of a table.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import orjson

from cdcbridge.changes.events import JsonValue, Row


def key_text(record: Row | None, columns: Sequence[str] | None) -> str | None:
    """Return the key of a row as text, or None if the row has none.

    The key of one column is the text of `record ->> column`. The key of several columns is a compact JSON array of such
    texts.
    """
    if not columns or record is None:
        return None
    if len(columns) == 1:
        value = record.get(columns[0])
        return str(value) if type(value) is int else _as_text(value)
    texts = [_as_text(record.get(column)) for column in columns]
    return orjson.dumps(texts).decode() if any(text is not None for text in texts) else None


def key_columns(primary_key: Sequence[str], identity: Sequence[str], *, full: bool) -> tuple[str, ...] | None:
    """Return the columns of the log's key, or None.

    An insert, an update, a delete and a backfill's read of one row must have the same key. The key is therefore the
    primary key if each change carries it. Otherwise the columns of the replica identity's index are the key. For
    example, a table has the primary key (id) and `replica identity using index` on (email). Its deletes carry no id, so
    its key is (email).

    Args:
        primary_key: The primary key's columns in key order. Empty if there is none.
        identity: The columns of the replica identity's index in key order. Empty if there is none.
        full: The replica identity is FULL.
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
    """Return a JSON document as `->>` does: `"a"` becomes a, and `null` becomes None.

    A string that PostgreSQL cannot represent as text, such as one with a NUL, stays JSON.
    """
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
    """Return the partition of a key, or 0 without a key.

    The partition is the CRC-32 of the key (ISO 3309, as in zlib), modulo the number of partitions.

    Args:
        key: The key in UTF-8, or None.
        partitions: The number of partitions.
    """
    return zlib.crc32(key) % partitions if key is not None else 0
