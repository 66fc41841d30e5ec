"""Read and write durations and sizes as people do, for example `30s` and `10GB`.

This module is pure. Never reads a duration that has no unit.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from cdcbridge.words import as_given

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES: Final = {"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_NUMBER_UNIT: Final = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)", re.ASCII)
_LONGEST: Final = 36500 * 86400.0  # seconds; PostgreSQL can add as much to a time without an overflow


def parse_duration(value: Any) -> float:
    """Return a duration in seconds: `'500ms'` → 0.5.

    Raises:
        ValueError: The value is not a duration, or is longer than 36,500 days. The message names the value.
    """
    match = _NUMBER_UNIT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in _SECONDS:
        raise ValueError(f"{as_given(value)} is not a duration. Write a number and one of ms, s, m, h, d, as in 30s")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _LONGEST:
        raise ValueError(f"{as_given(value)} is longer than {format_duration(_LONGEST)}")
    return seconds


def parse_size(value: Any) -> int:
    """Return a size in bytes, with the units of PostgreSQL: `'1kB'` → 1024.

    An integer is a number of bytes.

    Raises:
        ValueError: The value is not a size. The message names the value.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _NUMBER_UNIT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in _BYTES:
        raise ValueError(f"{as_given(value)} is not a size. Write a number and one of B, kB, MB, GB, TB, as in 10GB")
    return int(float(match[1]) * _BYTES[match[2]])


def format_duration(seconds: float) -> str:
    """Return a duration in the largest unit that divides it: 0.5 → `'500ms'`, 5400 → `'90m'`."""
    for unit in ("d", "h", "m", "s"):
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds / _SECONDS[unit])}{unit}"
    return f"{round(seconds * 1000)}ms"


def format_size(size: int) -> str:
    """Return a size in the largest unit that divides it: 1536 → `'1536B'`, 2097152 → `'2MB'`."""
    for unit in ("TB", "GB", "MB", "kB"):
        if size >= _BYTES[unit] and size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"


def human_size(size: float) -> str:
    """Return a size in bytes for people: 1536 → `'1.5 kB'`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def human_duration(seconds: float) -> str:
    """Return a duration in seconds for people: 0.25 → `'250 ms'`, 93784 → `'1d 2h'`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, lower in (("d", "h"), ("h", "m"), ("m", "s")):
        if seconds >= _SECONDS[unit]:
            whole, rest = divmod(int(seconds), int(_SECONDS[unit]))
            return f"{whole}{unit} {rest // int(_SECONDS[lower])}{lower}"
    return f"{seconds:.0f} s"


# For the JSON schema: the texts that parse_duration() and parse_size() accept.
DURATION_PATTERN: Final = r"^\s*[0-9]{1,15}(\.[0-9]{1,15})?\s*(ms|s|m|h|d)\s*$"
SIZE_PATTERN: Final = r"^\s*[0-9]{1,15}(\.[0-9]{1,15})?\s*(B|kB|MB|GB|TB)\s*$"
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}, mode="validation"),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, when_used="json"),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": SIZE_PATTERN}]}, mode="validation"
    ),
]
