"""Convert PostgreSQL's text output of a value to the JSON value that `to_jsonb` gives for it.

The text must be from a session with DateStyle ISO, IntervalStyle postgres, TimeZone UTC and bytea_output hex. Composite
types stay text. This module is pure: a function of the caller looks up the types that are not built in. Never turns a
decimal number into a Python float.

Source: PostgreSQL manual, "JSON Functions and Operators" (to_jsonb), and the output of a server.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import orjson

from cdcbridge.changes.events import Converter, JsonValue

BOOL, BYTEA, INT8, INT2, INT4, OID = 16, 17, 20, 21, 23, 26
JSON, FLOAT4, FLOAT8, NUMERIC, JSONB = 114, 700, 701, 1700, 3802
DATE, TIMESTAMP, TIMESTAMPTZ = 1082, 1114, 1184
INT2VECTOR, OIDVECTOR = 22, 30
INTEGERS: Final = frozenset({INT2, INT4, INT8})
FLOATING: Final = frozenset({FLOAT4, FLOAT8, NUMERIC})

# Built-in array type → its element type, for input without a catalogue: all arrays in pg_type except the vectors.
# Arrays whose elements are plain text for to_jsonb must also become lists.
ARRAYS: Final = {
    1000: 16, 1001: 17, 1002: 18, 1003: 19, 1016: 20, 1005: 21, 1006: 22, 1007: 23, 1008: 24, 1009: 25, 1028: 26,
    1010: 27, 1011: 28, 1012: 29, 1013: 30, 199: 114, 143: 142, 1017: 600, 1018: 601, 1019: 602, 1020: 603,
    1027: 604, 629: 628, 1021: 700, 1022: 701, 719: 718, 791: 790, 1040: 829, 1041: 869, 651: 650, 775: 774,
    1014: 1042, 1015: 1043, 1182: 1082, 1183: 1083, 1115: 1114, 1185: 1184, 1187: 1186, 1270: 1266, 1561: 1560,
    1563: 1562, 1231: 1700, 2201: 1790, 2951: 2950, 3221: 3220, 3643: 3614, 3645: 3615, 3807: 3802, 4073: 4072,
    3905: 3904, 3907: 3906, 3909: 3908, 3911: 3910, 3913: 3912, 3927: 3926, 6150: 4451, 6151: 4532, 6152: 4533,
    6153: 4534, 6155: 4535, 6157: 4536, 271: 5069, 2949: 2970,
    2207: 2202, 2208: 2203, 2209: 2204, 2210: 2205, 2211: 2206, 3735: 3734, 3770: 3769, 4090: 4089, 4097: 4096,
    1034: 1033, 3644: 3642, 4192: 4191, 5039: 5038, 210: 71, 270: 75, 272: 81, 273: 83, 1263: 2275, 2287: 2249,
}  # fmt: skip
_BOX: Final = 603
_BUILT_IN_LIMIT: Final = 10_000  # PostgreSQL assigns smaller OIDs by hand ("System Catalog Initial Data")


@dataclass(slots=True, frozen=True)
class PgType:
    """The part of a row in pg_type that matters here.

    Attributes:
        base: The base type of a domain, else 0.
        element: The element type of an array, else 0.
        delimiter: The character between the elements of an array.
        name: The name of the type.
    """

    base: int = 0
    element: int = 0
    delimiter: str = ","
    name: str = ""


text: Final[Converter] = bytes.decode  # for most types: the text as a string


def boolean(value: bytes) -> JsonValue:
    """Convert `t` to True, and `f` to False."""
    return value == b"t"


def number(value: bytes) -> JsonValue:
    """Convert a number of type numeric or float to JSON text with the same digits.

    NaN and ±Infinity become strings, as in to_jsonb.
    """
    return orjson.Fragment(value) if value[-1] <= 57 else value.decode()  # 57 is "9"; N and y are above it


def raw_json(value: bytes) -> JsonValue:
    """Return json or jsonb as it is, but on one line.

    A newline can be replaced, because JSON allows newlines only between tokens.
    """
    if b"\n" in value or b"\r" in value:
        value = value.replace(b"\n", b" ").replace(b"\r", b" ")
    return orjson.Fragment(value)


def timestamp(stamp: str) -> JsonValue:
    """Convert `2024-02-29 12:00:00 BC` to `2024-02-29T12:00:00 BC`. `infinity` stays as it is."""
    return stamp.replace(" ", "T", 1)


def timestamptz(stamp: str) -> JsonValue:
    """Convert a timestamp as timestamp() does, and write the zone as `+00:00`, as in XML Schema."""
    stamp = stamp.replace(" ", "T", 1)
    if stamp[-3:] == "+00":
        return stamp + ":00"
    return stamp[:-3] + ":00 BC" if stamp.endswith("+00 BC") else stamp


def _decoded(convert: Callable[[str], JsonValue]) -> Converter:
    return lambda value: convert(value.decode())


def _vector(element: Converter) -> Converter:
    def convert(value: bytes) -> JsonValue:
        return [element(item) for item in value.split()]

    return convert


_SCALARS: Final[dict[int, Converter]] = {
    BOOL: boolean, INT2: int, INT4: int, INT8: int, FLOAT4: number, FLOAT8: number, NUMERIC: number,
    JSON: raw_json, JSONB: raw_json, TIMESTAMP: _decoded(timestamp), TIMESTAMPTZ: _decoded(timestamptz),
    INT2VECTOR: _vector(int), OIDVECTOR: _vector(text),
}  # fmt: skip

_UNESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_NOTHING: Final = object()
_UNREADABLE: Final = ("{", "}", '"')  # as delimiters these make an array's text ambiguous, also for PostgreSQL


@functools.cache
def _tokens(delimiter: bytes) -> re.Pattern[bytes]:
    """Return the pattern of a token in an array's text.

    A token is an opening brace, or an element with the delimiter or closing brace after it. The element is quoted,
    NULL, bare or missing.
    """
    mark = re.escape(delimiter)
    return re.compile(
        rb'(\{)|(?:"((?:[^"\\]|\\.)*)"|(NULL)(?=[}' + mark + rb'])|([^{}"\\' + mark + rb"]+))?([}" + mark + rb"])",
        re.DOTALL,
    )


def parse_array(value: bytes, element: Converter, delimiter: bytes = b",") -> list[JsonValue]:
    """Convert the text of an array, such as `{1,NULL,"a b"}`, to a list that is nested like the array.

    Bounds such as `[0:1]=` are dropped, as in to_jsonb. Source: PostgreSQL manual, "Array Input and Output Syntax".

    Args:
        value: The text of the array.
        element: The converter of its elements.
        delimiter: The character between two elements.

    Raises:
        ValueError: The text is not an array.
    """
    body = value[value.index(b"=") + 1 :] if value[:1] == b"[" else value
    stack: list[list[JsonValue]] = []
    position = 0
    done: list[JsonValue] | None = None  # the list that the last token closed
    for token in _tokens(delimiter).finditer(body):
        if token.start() != position or not (stack or token[1]):
            break
        position = token.end()
        if token[1]:
            stack.append([])
            continue
        item = _item(token, element)
        if item is not _NOTHING:
            stack[-1].append(item)
        elif done is None and (token[5] != b"}" or stack[-1]):
            break  # an element is missing
        done = None
        if token[5] == b"}":
            done = stack.pop()
            if not stack:
                break
            stack[-1].append(done)
    if done is None or stack or position != len(body):
        raise ValueError(f"not an array: {value[:80]!r}")
    return done


def _item(token: re.Match[bytes], element: Converter) -> JsonValue:
    """Return the value of an array's element, or _NOTHING if the token has no element."""
    _, quoted, null, bare, _ = token.groups()
    if bare is not None:
        return element(bare)
    if quoted is not None:
        return element(_UNESCAPE.sub(rb"\1", quoted))
    return None if null is not None else _NOTHING


def _array(element: Converter, delimiter: str) -> Converter:
    if delimiter in _UNREADABLE or not delimiter.isascii():
        return text
    mark = delimiter.encode()

    def convert(value: bytes) -> JsonValue:
        return parse_array(value, element, mark)

    return convert


class Types:
    """Converters by the OID of the type.

    Args:
        lookup: Returns the definition of a type that is not built in, or None if the type no longer exists.
    """

    def __init__(self, lookup: Callable[[int], PgType | None] = lambda _oid: None) -> None:
        self._lookup = lookup
        self._converters: dict[int, Converter] = dict(_SCALARS)

    def converter(self, oid: int) -> Converter:
        """Return the function that converts the text output of this type to a JSON value.

        Values of an unknown type stay text.
        """
        found = self._converters.get(oid)
        if found is None:
            found = self._converters[oid] = self._resolve(oid)
        return found

    def _resolve(self, oid: int) -> Converter:
        if oid in ARRAYS:
            element = ARRAYS[oid]
            return _array(self.converter(element), ";" if element == _BOX else ",")
        if oid < _BUILT_IN_LIMIT:
            return text
        found = self._lookup(oid)
        if found is None:
            return text
        if found.base:
            return self.converter(found.base)
        return _array(self.converter(found.element), found.delimiter) if found.element else text
