"""Find the receipts in the input of ack, nack and extend: alone on a line, or in the lines of `receive`.

Takes the member `receipt` without parsing the rest, because a message's data may be any JSON. Lines that a tool such as
jq has reformatted are accepted as well: `{"seq": 1, "receipt": "1.7"}`, on one line or on several, or `"1.7"`. Never
connects to a database.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

import orjson

from cdcbridge.errors import UsageError

_TOKEN: Final = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}\[\]]', re.DOTALL)
_SHOWN: Final = 80


def read_receipts(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the receipts in these lines.

    Raises:
        UsageError: A line is no receipt, or an object has no receipt or no end. The message shows the line.
    """
    document = _Object()
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if document.depth == 0:
            if not text:
                continue
            if text[:1] != b"{":
                yield _alone(text, number)
                continue
            document = _Object(number, text)
        document.take(text)
        if document.depth == 0:
            yield document.receipt()
    if document.depth:
        raise document.error("an object without its closing brace")


def _alone(text: bytes, number: int) -> str:
    if text[:1] == b'"' or text == b"null":
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError:
            found = None
        if not isinstance(found, str):
            raise UsageError(f"stdin: line {number}: not a receipt: {_shown(text)}")
        return found
    return text.decode(errors="replace")


def _shown(text: bytes) -> str:
    return text[:_SHOWN].decode(errors="replace")


class _Object:
    """A JSON object that is read line by line, and its receipt.

    Attributes:
        depth: The number of brackets that are still open. 0 once the object has ended.
    """

    def __init__(self, number: int = 0, first: bytes = b"") -> None:
        self.depth = 0
        self._number = number
        self._first = first
        self._found: bytes | None = None
        self._named = False  # the name of the member has been read, and its value is the next token

    def take(self, line: bytes) -> None:
        """Read the next line of the object."""
        for token in _TOKEN.finditer(line):
            text, colon = token.groups()
            if text is None:
                self._named = False
                self.depth += 1 if token[0] in b"{[" else -1
            elif self.depth == 1 and colon:
                self._named = text == b'"receipt"'
            elif self._named:
                self._found, self._named = text, False

    def receipt(self) -> str:
        """Return the receipt, after the object has ended."""
        if self._found is None:
            raise self.error("an object without a receipt")
        try:
            return str(orjson.loads(self._found))
        except orjson.JSONDecodeError:
            raise self.error("a receipt that is not a text") from None

    def error(self, what: str) -> UsageError:
        """Return an error with this text, the line number and the first line of the object."""
        return UsageError(f"stdin: line {self._number}: not a line of `receive`: {what}: {_shown(self._first)}")
