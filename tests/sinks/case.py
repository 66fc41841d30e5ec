"""What the conformance suite needs to know about one type of sink."""

from __future__ import annotations

import collections
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple


class Received(NamedTuple):
    """A message as another program finds it in the target."""

    id: str
    key: str | None
    body: bytes
    destination: str


class Case(ABC):
    """One type of sink with a fresh destination on a real server.

    Attributes:
        type: The value of `sink.type`.
        exactly_once: Whether each message is there once in mode `stream`, whatever is killed.
        server: A broker of tests.harness.brokers with kill(), restart(), pause() and resume(), or None for a file.
    """

    type: ClassVar[str]
    exactly_once: ClassVar[bool]
    server: Any

    @abstractmethod
    def sink(self) -> dict[str, Any]:
        """Return the YAML of `sink` with this case's destination, reached through `proxy` if one was given."""

    @abstractmethod
    def received(self) -> list[Received]:
        """Return all messages of the destination in its order, the same each time it is called."""

    def settle(self) -> None:  # noqa: B027 - most servers need nothing
        """Let the server make the destination durable, before a test kills it."""

    @abstractmethod
    def close(self) -> None:
        """Remove the destination."""


def by_key(messages: Sequence[tuple[str, str | None]]) -> dict[str | None, list[str]]:
    """The ids of each key in the order of their first appearance."""
    found: dict[str | None, dict[str, None]] = collections.defaultdict(dict)
    for one, key in messages:
        found[key].setdefault(one)
    return {key: list(ids) for key, ids in found.items()}
