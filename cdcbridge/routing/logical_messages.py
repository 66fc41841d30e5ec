"""Read the messages that applications write into the WAL with pg_logical_emit_message.

A message has a key, data and sometimes a time. Any application may write anything there. Therefore content that cannot
be read is reported as malformed, and never raises an error. The module is pure.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Final

import orjson

from cdcbridge.changes.keys import key_text

TOPIC_PREFIX: Final = "cdcbridge:"
_MEMBERS: Final = frozenset({"key", "data", "deliver_at"})
_TOKEN: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|[^\s",:{}\[\]]+')


@dataclass(frozen=True)
class Published:
    """A message that an application wrote into the WAL.

    Attributes:
        key: The message's key, or None.
        record: The message's data as JSON text. If the message is malformed: its whole content, as a JSON string.
        malformed: Why the message cannot be read. None: nothing is wrong with it.
        deliver_at: The time before which it must not be delivered, in ISO 8601. None: at once.
    """

    key: str | None
    record: bytes
    malformed: str | None = None
    deliver_at: str | None = None  # in ISO 8601

    @cached_property
    def data(self) -> bytes:
        """The message's `data` as JSON text.

        For a malformed message it has the reason, too, because a stream has no dead letters and reads the log as it is.
        """
        why = b"" if self.malformed is None else b',"malformed":' + orjson.dumps(self.malformed)
        return b'{"op":"message","record":%b,"old":null,"unchanged":[]%b}' % (self.record, why)

    @property
    def size(self) -> int:
        """The number of bytes of its `data`."""
        return len(self.data)

    def own_key(self, columns: Sequence[str]) -> str | None:
        """Return the key that these members of the message's data make, as columns of a row would."""
        if not self.record.startswith(b"{"):
            return None
        return key_text({name: orjson.Fragment(value) for name, value in members(self.record.decode())}, columns)


def read_published(content: bytes) -> Published:
    """Read a message such as `{"key": "42", "data": {"total": 99}}`.

    The key may be a text, a number or null, and `data` is any JSON value. A third member `deliver_at` may be null, or a
    time such as "2026-05-01T10:00:00Z".
    """
    try:
        parsed = _parsed(content)
    except orjson.JSONDecodeError as error:
        return _malformed(content, f"not JSON: {error.msg}")
    if not isinstance(parsed, dict) or "data" not in parsed or not parsed.keys() <= _MEMBERS:
        return _malformed(content, 'expected {"key": ..., "data": ..., "deliver_at": ...}')
    parts = dict(members(content.decode()))
    # A newline is legal only between tokens, so spaces can replace it: the message then fits on one line.
    parts["data"] = parts["data"].replace("\n", " ").replace("\r", " ")
    key = parsed.get("key")
    if isinstance(key, bool | dict | list):
        return _malformed(content, "the key is not a text, a number or null")
    if isinstance(key, str) and not _is_text(key):
        return _malformed(content, "the key has \\u0000 or half of a surrogate pair, which PostgreSQL cannot hold")
    try:
        deliver_at = _time(parsed.get("deliver_at"))
    except ValueError:
        return _malformed(content, "deliver_at is not a time with its zone, such as 2026-05-01T10:00:00Z")
    text = key if key is None or isinstance(key, str) else parts["key"]
    return Published(text, parts["data"].encode(), deliver_at=deliver_at)


def read_json(content: bytes) -> tuple[bytes, str | None]:
    """Return content that is any JSON value on one line, and why it cannot be read or None."""
    try:
        _parsed(content)
    except orjson.JSONDecodeError as error:
        return b"", f"not JSON: {error.msg}"
    return content.strip().replace(b"\n", b" ").replace(b"\r", b" "), None


def _time(value: object) -> str | None:
    """Return a member's time.

    Raise ValueError if it is no text or no time, or names no time zone.
    """
    if value is None:
        return None
    found = datetime.fromisoformat(value) if isinstance(value, str) else None
    if found is None or found.utcoffset() is None:
        raise ValueError(f"no time: {value!r}")
    return found.isoformat()


def _parsed(content: bytes) -> object:
    """Parse the content.

    PostgreSQL accepts some content that orjson refuses, such as 1e400. Python's parser reads that.

    Raises:
        JSONDecodeError: The content is not JSON. The class is orjson's.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        with contextlib.suppress(ValueError, RecursionError):
            return _JSON.decode(content.decode())
        raise


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_JSON: Final = json.JSONDecoder(parse_constant=_refuse, parse_int=str, parse_float=str)


def _is_text(value: str) -> bool:
    """Return whether PostgreSQL can hold the text."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _malformed(content: bytes, reason: str) -> Published:
    # Escapes replace characters, because the store's encoding may not have U+FFFD.
    return Published(None, json.dumps(content.decode(errors="replace")).encode(), reason)


def members(text: str) -> Iterator[tuple[str, str]]:
    """Yield the members of a JSON object as (name, value).

    A value is the text that was written, because data must not pass through a Python number.
    """
    position = _past_space(text, text.index("{") + 1)
    while text[position] != "}":
        end = _value_end(text, position)
        name = text[position:end]
        with contextlib.suppress(orjson.JSONDecodeError):
            name = orjson.loads(name)
        start = _past_space(text, text.index(":", end) + 1)
        end = _value_end(text, start)
        yield name, text[start:end]
        position = _past_space(text, end)
        if text[position] == ",":
            position = _past_space(text, position + 1)


def elements(text: str) -> Iterator[str]:
    """Yield the elements of a JSON array, each as the text that was written."""
    position = _past_space(text, text.index("[") + 1)
    while text[position] != "]":
        end = _value_end(text, position)
        yield text[position:end]
        position = _past_space(text, end)
        if text[position] == ",":
            position = _past_space(text, position + 1)


def _value_end(text: str, start: int) -> int:
    """Return the place where the value that begins at `start` ends.

    The function counts braces and brackets, because a parser would fail on 1,000 nested lists.
    """
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += (token[0] in "{[") - (token[0] in "}]")
        if depth == 0:
            return token.end()
    raise ValueError("not JSON")


def _past_space(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position
