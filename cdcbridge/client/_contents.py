"""Convert published data to JSON and received data to Python values, and check topics, keys and ids.

This module is pure. Never changes a value: it refuses each value that JSON or PostgreSQL cannot hold, and names the
value's place, for example `data['total']`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import orjson

from cdcbridge.errors import UsageError

ParseFloat: TypeAlias = Callable[[str], Any]
_NOT_ASCII: Final = re.compile(r"[^\x00-\x7f]+")


def json_text(data: Any, *, ascii_only: bool = False) -> str:
    """Return the data as JSON text.

    Args:
        data: Any value that orjson can write.
        ascii_only: Whether to escape all other characters, for a session whose client_encoding may not have them.

    Raises:
        UsageError: The data contains NaN or infinity, which orjson would write as null.
        TypeError: The data contains a value that orjson cannot write.
    """
    text = orjson.dumps(data).decode()
    if "null" in text:
        for place, value in _not_finite(data, "data"):
            raise UsageError(
                f"{place} is {value}, which JSON cannot contain", hint="Publish None, or the number as a string."
            )
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ascii_only else text


def parsed(text: str, parse_float: ParseFloat | None) -> Any:
    """Return JSON text as Python values.

    Args:
        text: A JSON document.
        parse_float: Function that makes numbers from their digits, for example `decimal.Decimal`, so that each number
            keeps its digits. orjson has no such option, and makes floats of integers with more than 64 bits.

    Raises:
        ValueError: The text cannot be read.
    """
    if parse_float is None:
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            return json.loads(text)  # accepts half of a surrogate pair

    def whole(digits: str) -> Any:
        try:
            return int(digits)
        except ValueError:  # Python refuses more than 4,300 digits
            return parse_float(digits)

    return json.loads(text, parse_float=parse_float, parse_int=whole)


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Yield each NaN or infinity in the value, with its place."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield place, value
    elif isinstance(value, enum.Enum):
        yield from _not_finite(value.value, place)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _not_finite(inner, f"{place}[{number}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _not_finite(getattr(value, field.name, None), f"{place}.{field.name}")


def refuse_bad_text(**arguments: str | None) -> None:
    """Raise UsageError for an argument with NUL or half of a surrogate pair, which PostgreSQL's text cannot hold."""
    for name, value in arguments.items():
        if value is None or (value.isascii() and "\0" not in value):
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{name} is {value!r}: half of a surrogate pair is not a character") from None
        if "\0" in value:
            raise UsageError(f"{name} is {value!r}: PostgreSQL's text cannot hold NUL")
