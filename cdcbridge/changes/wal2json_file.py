"""Decode wal2json's output from a file, in format 1 or 2, with any options and any line breaks.

This module is pure: its input is text, and its output is decoded rows. A position or key that the input does not
contain is None. Never rounds a number: one that a double cannot represent keeps its digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cdcbridge.changes.events import JsonValue, Row
from cdcbridge.changes.keys import key_text
from cdcbridge.changes.pgtypes import BOOL, BYTEA, FLOATING, INTEGERS, OID, Types, number, text
from cdcbridge.errors import DecodeError
from cdcbridge.lsn import parse_lsn

_PLUGIN: Final = "wal2json"
# A number with a point or an exponent, or one that may be too long for 64 bits, is read as a string that starts with
# one NUL. A string that starts with NUL already gets one more. No text of PostgreSQL starts so.
_NUMBERS = re.compile(rb'"(?:[^"\\]|\\.)*"|(-?\d+(?:\.\d+(?:[eE][+-]?\d+)?|[eE][+-]?\d+)|-?\d{18,})', re.DOTALL)
_STRINGS_AND_BRACES = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)
_TYPE_OIDS: Final = {
    "boolean": 16, "bytea": 17, '"char"': 18, "name": 19, "bigint": 20, "smallint": 21, "int2vector": 22,
    "integer": 23, "text": 25, "oid": 26, "oidvector": 30, "json": 114, "real": 700, "double precision": 701,
    "character": 1042, "character varying": 1043, "date": 1082, "time without time zone": 1083,
    "timestamp without time zone": 1114, "timestamp with time zone": 1184, "numeric": 1700, "uuid": 2950, "jsonb": 3802,
}  # fmt: skip
_ARRAY_OIDS: Final = {
    16: 1000, 17: 1001, 20: 1016, 21: 1005, 23: 1007, 25: 1009, 26: 1028, 114: 199, 700: 1021, 701: 1022, 1042: 1014,
    1043: 1015, 1082: 1182, 1083: 1183, 1114: 1115, 1184: 1185, 1700: 1231, 2950: 2951, 3802: 3807,
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class Decoded:
    """One row of the input, as `cdcbridge decode` prints it."""

    topic: str
    key: str | None
    op: str
    record: JsonValue
    old: Row | None
    commit_lsn: str | None
    ordinal: int | None


def decode_file(lines: Iterable[bytes]) -> Iterator[Decoded]:
    """Yield the changes in wal2json's output.

    Raises:
        DecodeError: The input is not wal2json's output. Its offset is a byte in the input.
    """
    state = _Transaction()
    for offset, document in _documents(lines):
        try:
            parsed = orjson.loads(_NUMBERS.sub(_marked, document))
            if not isinstance(parsed, dict):
                raise TypeError("a document that is no object")
            if "change" in parsed:
                yield from _format_1(parsed)
            elif "action" in parsed:
                yield from _format_2(parsed, state)
            elif parsed.get("kind") != "message":
                raise ValueError("neither a transaction of format 1 nor a message of format 2")
        except orjson.JSONDecodeError as error:
            reason = f"not JSON: {error.msg}"
            if b'"type":"' in document:
                reason += ". If a type name needs quotes, wal2json writes invalid JSON: use include-types=0"
            raise DecodeError(_PLUGIN, reason, offset=offset + error.pos) from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DecodeError(_PLUGIN, f"{type(error).__name__}: {error}", offset=offset) from error


def _documents(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, text) of each JSON document.

    A document is a line, or as many lines as its braces need to close.
    """
    parts: list[bytes] = []
    depth = start = offset = 0
    for line in lines:
        if not parts and not line.strip():
            offset += len(line)
            continue
        if not parts:
            start = offset
        parts.append(line)
        offset += len(line)
        for token in _STRINGS_AND_BRACES.findall(line):
            depth += (token == b"{") - (token == b"}")
        if depth <= 0:
            yield start, b"".join(parts).strip()
            parts, depth = [], 0
    if parts:
        raise DecodeError(_PLUGIN, "the input ends inside a document", offset=offset)


def _marked(match: re.Match[bytes]) -> bytes:
    found = match[1]
    if found is None:
        return b'"\\u0000' + match[0][1:] if match[0].startswith(b'"\\u0000') else match[0]
    return b'"\\u0000' + found + b'"'


@dataclass(slots=True)
class _Transaction:
    """The transaction of format 2 to which the next rows belong.

    The B message starts the transaction, and the C message ends it. `ordinal` is None outside of a transaction.
    """

    commit_lsn: str | None = None
    ordinal: int | None = None


_OPERATIONS: Final = {"I": "insert", "U": "update", "D": "delete", "T": "truncate"}


def _format_2(parsed: dict[str, Any], state: _Transaction) -> Iterator[Decoded]:
    action = parsed["action"]
    if action == "B":
        state.commit_lsn, state.ordinal = parsed.get("lsn"), 0
        if state.commit_lsn is not None:
            parse_lsn(state.commit_lsn)
        return
    if action == "C":
        state.commit_lsn = state.ordinal = None
        return
    if action == "M" and not parsed["transactional"]:
        return
    ordinal = state.ordinal
    if ordinal is not None:
        state.ordinal = ordinal + 1
    if action == "M":
        return
    operation = _OPERATIONS.get(action)
    if operation is None:
        raise ValueError(f"unknown action {action!r}")
    key_columns = [column["name"] for column in parsed.get("pk", ())]
    yield _decoded(
        parsed.get("schema"),
        parsed["table"],
        operation,
        [_column(c) for c in parsed.get("columns", ())],
        [_column(c) for c in parsed.get("identity", ())],
        key_columns,
        state.commit_lsn,
        ordinal,
    )


def _format_1(parsed: dict[str, Any]) -> Iterator[Decoded]:
    for ordinal, change in enumerate(parsed["change"]):
        kind = change["kind"]
        if kind == "message":
            continue
        if kind not in ("insert", "update", "delete"):
            raise ValueError(f"unknown kind {kind!r}")
        old = change.get("oldkeys", {})
        yield _decoded(
            change.get("schema"),
            change["table"],
            kind,
            _columns(change, "columnnames", "columntypes", "columntypeoids", "columnvalues"),
            _columns(old, "keynames", "keytypes", "keytypeoids", "keyvalues") if old else [],
            change.get("pk", {}).get("pknames", []),
            None,
            ordinal,
        )


Column = tuple[str, str | None, int | None, Any]  # its name, the name and the OID of its type, its value


def _column(column: dict[str, Any]) -> Column:
    return column["name"], column.get("type"), column.get("typeoid"), column["value"]


def _columns(change: dict[str, Any], names: str, types: str, oids: str, values: str) -> list[Column]:
    count = len(change.get(names, ()))
    given = change.get(values, [])
    if len(given) != count:
        raise ValueError(f"{count} {names} and {len(given)} {values}")
    type_names = change.get(types) or [None] * count
    type_oids = change.get(oids) or [None] * count
    return list(zip(change.get(names, ()), type_names, type_oids, given, strict=True))


def _decoded(
    schema: str | None,
    table: str,
    operation: str,
    columns: list[Column],
    identity: list[Column],
    key_columns: list[str],
    commit_lsn: str | None,
    ordinal: int | None,
) -> Decoded:
    topic = table if schema is None else f"{schema}.{table}"
    old = {name: _value(kind, oid, value) for name, kind, oid, value in identity}
    new = {name: _value(kind, oid, value) for name, kind, oid, value in columns}
    record = {"delete": old, "truncate": None}.get(operation, new)
    key = key_text(record, key_columns or ([name for name, *_ in identity] if len(old) < max(len(new), 2) else None))
    kept: Row | None = None
    if operation == "update":
        raw = {name: value for name, _, _, value in columns}
        full = len(old) >= len(new) > 1
        if full or any(value != raw.get(name, value) for name, _, _, value in identity):
            kept = old
    return Decoded(topic, key, operation, record, kept, commit_lsn, ordinal)


_TYPES: Final = Types()


def _value(type_name: str | None, oid: int | None, value: Any) -> JsonValue:
    """Convert a value of the input to JSON, by its type's OID, or else by the name of its type.

    Without an OID and a known name, the value stays as it is.
    """
    if value is None:
        return None
    value = _unmarked(value)
    if isinstance(value, orjson.Fragment):
        return str(value.contents) if oid == OID else value
    if oid is None and type_name is not None:
        oid = _oid(type_name)
    if oid is None:
        return value
    oid &= 0xFFFFFFFF
    if oid in FLOATING or oid in INTEGERS:
        return number(value.encode()) if isinstance(value, str) and value else value
    if oid == OID:
        return str(value)
    if oid == BYTEA:
        return value if value.startswith("\\x") else "\\x" + value
    if oid == BOOL:
        return value
    convert = _TYPES.converter(oid)
    return value if convert is text or not isinstance(value, str) else convert(value.encode())


def _unmarked(value: Any) -> Any:
    """Return a value as the input has it, or as a Fragment if it is a number that a double would change.

    An array or object raises TypeError.
    """
    if isinstance(value, list | dict):
        raise TypeError("a value that is an array or an object, which wal2json gives as a string")
    if isinstance(value, str) and value[:1] == "\0":
        return value[1:] if value[1:2] == "\0" else orjson.Fragment(value[1:])
    return value


def _oid(type_name: str) -> int | None:
    base = re.sub(r"\(.*?\)", "", type_name).strip()
    if base.endswith("[]"):
        element = _TYPE_OIDS.get(base[:-2])
        return None if element is None else _ARRAY_OIDS.get(element)
    return _TYPE_OIDS.get(base)
