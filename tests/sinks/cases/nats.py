"""A fresh stream of NATS JetStream."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, ClassVar

import nats
import orjson
from nats.js.errors import NotFoundError

from tests.harness.brokers.nats import Nats
from tests.sinks.case import Case, Received


class NatsCase(Case):
    """A stream whose subjects are `NAME.>`.

    Args:
        server: The server.
        name: The name of the stream, and the first part of its subjects.
        partitions: The partitions of the log.
        proxy: The port through which the sink reaches the server.
        config: Keys of the stream's configuration.
    """

    type: ClassVar[str] = "nats"
    exactly_once: ClassVar[bool] = True

    def __init__(
        self, server: Nats, name: str, *, partitions: int = 4, proxy: int | None = None, **config: Any
    ) -> None:
        self.server = server
        self.name = name
        self.url = server.url if proxy is None else f"nats://127.0.0.1:{proxy}"
        self.config = {"name": name, "subjects": [f"{name}.>"], "allow_atomic": True, **config}
        self.ask(f"STREAM.CREATE.{name}", self.config)

    def sink(self) -> dict[str, Any]:
        return {
            "type": "nats",
            "servers": [self.url],
            "stream": self.name,
            "subject": f"{self.name}.{{topic}}",
        }

    def ask(self, subject: str, content: dict[str, Any]) -> dict[str, Any]:
        """Send a request to JetStream."""
        return asyncio.run(self._ask(subject, content))

    def edit(self, **config: Any) -> None:
        """Change the configuration of the stream."""
        self.config |= config
        self.ask(f"STREAM.UPDATE.{self.name}", self.config)

    def received(self) -> list[Received]:
        return [
            Received(headers["cdcbridge-id"], _key(body), body, subject) for subject, headers, body in self.messages()
        ]

    def messages(self) -> list[tuple[str, dict[str, str], bytes]]:
        """Return subject, headers and content of all messages."""
        return asyncio.run(self._messages())

    def close(self) -> None:
        self.ask(f"STREAM.DELETE.{self.name}", {})

    async def _ask(self, subject: str, content: dict[str, Any]) -> dict[str, Any]:
        async with await nats.connect(self.server.url, allow_reconnect=False, **self.server.connection) as client:
            answer = await client.request(f"$JS.API.{subject}", orjson.dumps(content), timeout=30)
            found: dict[str, Any] = orjson.loads(answer.data)
            assert "error" not in found, found
            return found

    async def _messages(self) -> list[tuple[str, dict[str, str], bytes]]:
        async with await nats.connect(self.server.url, allow_reconnect=False, **self.server.connection) as client:
            stream = client.jetstream(timeout=30)
            state = (await stream.stream_info(self.name)).state

            async def get(number: int) -> list[tuple[str, dict[str, str], bytes]]:
                with contextlib.suppress(NotFoundError):
                    message = await stream.get_msg(self.name, number)
                    return [(message.subject or "", message.headers or {}, message.data or b"")]
                return []

            numbers = range(max(state.first_seq, 1), state.last_seq + 1)
            found = []
            for start in range(0, len(numbers), 500):
                found += await asyncio.gather(*map(get, numbers[start : start + 500]))
        return [message for messages in found for message in messages]


def _key(body: bytes) -> str | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        key = orjson.loads(body)["key"]
        return None if key is None else str(key)
    return None
