"""Hide values of columns before a message leaves: `hash`, `null` or `last4`.

A hidden value is hidden in `record` and in `old`. The same value always has the same hash, so that rows can still be
joined by it. The module is pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import orjson

from cdcbridge.routing.logical_messages import members

_LENGTH: Final = 32  # hexadecimal characters of a hash, which are 128 bits


def masked(data: str, mask: Mapping[str, str]) -> str:
    """Return a message's `data` with hidden values.

    Args:
        data: The JSON text of `data`.
        mask: How the values of each column are hidden, by its name.
    """
    parts = {name: _row(text, mask) if name in ("record", "old") else text for name, text in members(data)}
    return json_object(parts)


def _row(text: str, mask: Mapping[str, str]) -> str:
    if not text.startswith("{"):
        return text
    return json_object({name: _hidden(value, mask[name]) if name in mask else value for name, value in members(text)})


def _hidden(value: str, how: str) -> str:
    if value == "null" or how == "null":
        return "null"
    text = orjson.loads(value) if value.startswith('"') else value
    if how == "last4":
        # A value of at most four characters would be shown as a whole.
        return orjson.dumps(text[-4:] if len(text) > 4 else "*" * len(text)).decode()
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]}"'


def json_object(parts: Mapping[str, str]) -> str:
    """Return a JSON object whose values are JSON texts already."""
    return "{" + ",".join(f"{orjson.dumps(name).decode()}:{value}" for name, value in parts.items()) + "}"
