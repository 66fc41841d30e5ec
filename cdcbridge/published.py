"""Messages that applications write into the WAL: what stands in pg_logical_emit_message → key and data. Pure.

Anybody may write anything there: what cannot be read is told, and never raised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from cdcbridge.encode import key_text

TOPIC_PREFIX: Final = "cdcbridge:"
_JSON = json.JSONDecoder()


@dataclass(slots=True, frozen=True)
class Published:
    """A message's key and its data as JSON text; or what is wrong with it, and then its content as a JSON text."""

    key: str | None
    record: bytes
    malformed: str | None = None

    def own_key(self, columns: Sequence[str]) -> str | None:
        """The key that these members of the data make, as columns of a row would."""
        data = json.loads(self.record, parse_float=str, parse_int=str)
        return key_text(data, columns) if isinstance(data, dict) else None


def read_published(content: bytes) -> Published:
    """`{"key": "42", "data": …}` → the message. The key may be a text, a number or null; data is any JSON value."""
    try:
        parsed = orjson.loads(content)  # strict, where Python's own parser takes NaN and the like
    except orjson.JSONDecodeError as error:
        return _malformed(content, f"not JSON: {error.msg}")
    if not isinstance(parsed, dict) or "data" not in parsed or not parsed.keys() <= {"key", "data"}:
        return _malformed(content, 'expected {"key": ..., "data": ...}')
    members = dict(_members(content.decode()))
    key = parsed.get("key")
    if isinstance(key, bool | dict | list):
        return _malformed(content, "the key is not a text, a number or null")
    return Published(key if key is None or isinstance(key, str) else members["key"], members["data"].encode())


def _malformed(content: bytes, reason: str) -> Published:
    # With escapes instead of characters: the store's encoding may lack U+FFFD.
    return Published(None, json.dumps(content.decode(errors="replace")).encode(), reason)


def _members(text: str) -> Iterator[tuple[str, str]]:
    """The members of a JSON object, each value as it is written: data is not to go through a Python number."""
    position = text.index("{") + 1
    while True:
        name, position = _JSON.raw_decode(text, _past_space(text, position))
        start = _past_space(text, text.index(":", position) + 1)
        _, end = _JSON.raw_decode(text, start)
        yield name, text[start:end]
        position = _past_space(text, end)
        if text[position] == "}":
            return
        position += 1


def _past_space(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position
