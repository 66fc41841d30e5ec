"""Turn values into texts for people: numbers, times, JSON, and the changes between two versions of a row.

This module is pure. Numbers in data keep every digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from cdcbridge.routing.logical_messages import members
from cdcbridge.units import human_duration, human_size

UNKNOWN: Final = "–"
SIZES: Final = (1.0, 1024.0, 1024.0**2, 1024.0**3, 1024.0**4)  # the units of size(), in bytes
DURATIONS: Final = (1.0, 60.0, 3600.0, 86400.0)  # the units of duration(), in seconds
_LONGEST: Final = 20_000  # characters of a message's data on a page


class ColumnChange(NamedTuple):
    """One column whose value differs. Its `before` or `after` is None if that version does not have the column."""

    column: str
    before: str | None
    after: str | None


def number(value: float | None) -> str:
    """Return a number with separators: 1234567 → "1,234,567"."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Return a rate per second, with one decimal if it is small: 0.25 → "0.3/s", 1234.5 → "1,234/s"."""
    return UNKNOWN if value is None else f"{value:,.{1 if 0 < value < 10 else 0}f}/s"


def size(value: float | None) -> str:
    """Return a size in bytes for people."""
    return UNKNOWN if value is None else human_size(value)


def duration(seconds: float | None) -> str:
    """Return a duration in seconds for people."""
    return UNKNOWN if seconds is None else human_duration(max(0.0, seconds))


def clock(value: datetime | None) -> str:
    """Return a time as in "12:04:05", or with its date if that is not today's."""
    if value is None:
        return UNKNOWN
    at = value.astimezone(UTC)
    same_day = at.date() == datetime.now(UTC).date()
    return f"{at:%H:%M:%S}" if same_day else f"{at:%Y-%m-%d %H:%M:%S}"


def indented(text: str) -> str:
    """Return a JSON text with line breaks and two spaces for each level. Its numbers and names stay as they are."""
    if len(text) > _LONGEST:
        return f"{text[:_LONGEST]}… ({len(text):,} characters)"
    return "".join(_pieces(text))


def changes(before: str | None, after: str | None) -> list[ColumnChange]:
    """Return the columns that differ between two versions of a row.

    Args:
        before: The JSON text of the earlier row, or None.
        after: The JSON text of the later row, or None.
    """
    old, new = _columns(before), _columns(after)
    return [
        ColumnChange(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)
    ]


def _columns(text: str | None) -> Mapping[str, str]:
    return dict(members(text)) if text is not None and text.lstrip().startswith("{") else {}


def _pieces(text: str) -> Iterator[str]:
    level, quoted, escaped, previous = 0, False, False, ""
    for character in text:
        if quoted:
            yield character
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
            previous = character
            continue
        if character.isspace():
            continue
        if previous and previous in "{[" and character not in "}]":
            yield "\n" + "  " * level
        if character == '"':
            quoted, escaped = True, False
        if character in "{[":
            level += 1
            yield character
        elif character in "}]":
            level -= 1
            yield character if previous in "{[" else "\n" + "  " * level + character
        elif character == ",":
            yield ",\n" + "  " * level
        else:
            yield ": " if character == ":" else character
        previous = character


def sentence(text: str) -> str:
    """Return a text with a capital letter at its beginning. The rest stays as it is."""
    return text[:1].upper() + text[1:]


def plural(value: int, what: str) -> str:
    """Return a number and a noun: (2, "message") → "2 messages", (2, "delivery") → "2 deliveries"."""
    if value != 1:
        what = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{value:,} {what}"


def filters() -> dict[str, Any]:
    """Return the filters of the templates, by name."""
    return {
        "number": number,
        "rate": rate,
        "size": size,
        "duration": duration,
        "clock": clock,
        "indented": indented,
        "plural": plural,
        "sentence": sentence,
    }
