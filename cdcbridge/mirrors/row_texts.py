"""Take the JSON text of a row apart: its key as the log writes it, and the columns in which two rows differ.

Values are compared as they are written, because data must not pass through a Python number. The module is pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from cdcbridge.routing.logical_messages import members


def row_key(row: str, key: Sequence[str]) -> str:
    """Return the key of a row: the text of one column, or a JSON array of the texts of several, as in the log."""
    found = dict(members(row))
    texts = [_text(found.get(name, "null")) for name in key]
    return texts[0] or "" if len(texts) == 1 else orjson.dumps(texts).decode()


def identity(key: str, columns: Sequence[str]) -> str:
    """Return a key as a JSON object: `7` becomes `{"id":"7"}`."""
    values = [key] if len(columns) == 1 else orjson.loads(key)
    return orjson.dumps(dict(zip(columns, values, strict=True))).decode()


def differing(first: str, second: str) -> tuple[str, ...]:
    """Return the names of the columns that only one of two rows has, or whose values differ."""
    one, other = dict(members(first)), dict(members(second))
    return tuple(name for name in {**one, **other} if one.get(name) != other.get(name))


def array(rows: Sequence[str]) -> str:
    """Return rows as one JSON array."""
    return f"[{','.join(rows)}]"


def _text(value: str) -> str | None:
    if value == "null":
        return None
    return str(orjson.loads(value)) if value.startswith('"') else value
