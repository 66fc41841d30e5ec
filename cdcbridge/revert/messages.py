"""Read messages of the log for a revert, and compare the values of columns.

A value stays the JSON text that it is in the log, because a number could lose digits in Python. The module is pure and
never chooses a change to undo.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, TypeAlias

import orjson

from cdcbridge.routing.logical_messages import members

TextRow: TypeAlias = dict[str, str]
CHANGES: Final = ("insert", "update", "delete")
_NULL: Final = "null"


@dataclass(slots=True, frozen=True)
class Recorded:
    """A message of the log.

    Attributes:
        seq: Its place in the log.
        topic: Its topic, for example `public.orders`.
        key: The log's key of the row after the change, or None.
        old_key: The log's key of the row before an update that changed the key, else None.
        op: Its operation, for example `update`.
        record: The row after the change as JSON texts by column. For a delete, the row before it as far as it is known.
        old: The row before an update, as far as the WAL carried it.
        unchanged: The columns whose values the WAL did not carry.
        commit_lsn: The commit LSN of its transaction, or None.
        appended: When it was appended to the log.
    """

    seq: int
    topic: str
    key: str | None
    old_key: str | None
    op: str
    record: TextRow | None
    old: TextRow | None
    unchanged: tuple[str, ...]
    commit_lsn: str | None
    appended: datetime


def read_message(
    seq: int,
    topic: str,
    key: str | None,
    old_key: str | None,
    data: str,
    commit_lsn: str | None,
    appended: datetime,
) -> Recorded:
    """Make a message from a row of the table messages, whose `data` is JSON text."""
    parts = dict(members(data))
    return Recorded(
        seq,
        topic,
        key,
        old_key,
        str(orjson.loads(parts["op"])),
        text_row(parts["record"]),
        text_row(parts["old"]),
        tuple(orjson.loads(parts["unchanged"])),
        commit_lsn,
        appended,
    )


def text_row(text: str) -> TextRow | None:
    """Return the members of a JSON object as JSON texts, or None for another value."""
    return dict(members(text)) if text.startswith("{") else None


def same(one: str, other: str) -> bool:
    """Return whether two JSON texts have the same value.

    Numbers are compared as numbers: 1.50 is 1.5. The order of an object's members counts.
    """
    return one == other or canonical(one) == canonical(other)


def differs(before: str, after: str, *, rounded: bool) -> bool:
    """Return whether a change gave a column another value.

    The digits of a number count, because 1.50 and 1.5 are two texts in a column of type numeric. Plugins write one
    float in several ways, for example 1e+06 and 1000000.0.

    Args:
        before: The value before the change, as JSON text.
        after: The value after it.
        rounded: Whether the column has floats.
    """
    if before == after:
        return False
    if rounded or (before[:1] == '"' and after[:1] == '"'):
        return not same(before, after)
    return True


def canonical(text: str) -> Hashable:
    """Return a value that is equal for two JSON texts of the same value.

    A text that Python cannot read stays as it is.
    """
    try:
        return _hashable(json.loads(text, parse_int=Decimal, parse_float=Decimal, object_pairs_hook=_members))
    except (ValueError, RecursionError, ArithmeticError):
        return text


def _members(pairs: list[tuple[str, Any]]) -> tuple[Any, ...]:
    return "object", *((name, _hashable(value)) for name, value in pairs)


def _hashable(value: Any) -> Hashable:
    """Return a list as a tuple, and a truth value as no number: for Python, true equals 1."""
    if isinstance(value, list):
        return "array", *map(_hashable, value)
    return ("truth", value) if isinstance(value, bool) else value


def as_value(text: str) -> str | None:
    """Return the text of a scalar as PostgreSQL reads it: `"a"` becomes a, `1.50` stays, and `null` becomes None."""
    if text == _NULL:
        return None
    return str(orjson.loads(text)) if text.startswith('"') else text
