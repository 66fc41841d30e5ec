"""Publish to a stream of RabbitMQ.

Never has more than one frame of a lane on its way, so that a refused frame is not followed by a later one.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

from cdcbridge.config.sink import RabbitmqSink
from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import Failure, Lane, Outgoing, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import hold_back
from cdcbridge.sinks.targets.rabbitmq_stream_connection import StreamConnection, StreamError
from cdcbridge.sinks.targets.rabbitmq_url import LOGIN_HINT, address_of, telling

_REDIRECTS: Final = 3  # between the nodes of a cluster
_NULL: Final = b"\x40"


class StreamPublisher:
    """A publisher of the sink's stream.

    Args:
        sink: The sink, which has a stream.
        lane: The lane, or None in the modes `fifo` and `queue`.
    """

    def __init__(self, sink: RabbitmqSink, lane: Lane | None) -> None:
        self._sink = sink
        self._stream = sink.stream or ""
        self._lane = lane
        self._reference = "" if lane is None else lane.name
        self._connection: StreamConnection | None = None
        self._numbers = itertools.count(1)  # publishing ids where there is no lane, which mean nothing

    async def open(self) -> None:
        """Connect to the leader of the stream, and become a publisher."""
        address = address_of(self._sink)
        async with self._telling():
            for _ in range(_REDIRECTS):
                self._connection = await StreamConnection.open(address)
                leader = await self._connection.leader(self._stream)
                if leader is None:
                    await self._connection.declare(self._stream, self._reference)
                    return
                await self._connection.close()
                address = address._replace(host=leader.host, port=leader.port)
        raise TargetAway(f"the nodes of RabbitMQ at {address} name each other as leader of the stream {self._stream}")

    async def position(self) -> int | None:
        """Return the last publishing id of the lane that the stream has."""
        if self._lane is None:
            return None
        async with self._telling():
            return await self._opened.sequence(self._stream, self._reference)

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Publish the messages, and wait for the confirms."""
        largest = self._opened.largest
        contents = _contents(batch)
        failures = {
            index: Failure(
                f"RabbitMQ takes messages of at most {largest} bytes in a stream (stream.frame_max), "
                f"and this one has {len(content)}",
                for_good=True,
            )
            for index, content in enumerate(contents)
            if len(content) > largest
        }
        hold_back(batch, failures, in_order=self._lane is not None)
        async with self._telling():
            await self._opened.publish(
                [
                    (next(self._numbers) if self._lane is None else message.seq, contents[index])
                    for index, message in enumerate(batch)
                    if index not in failures
                ]
            )
        return failures

    async def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    @property
    def _opened(self) -> StreamConnection:
        if self._connection is None:
            raise TargetAway("the connection to RabbitMQ is closed")
        return self._connection

    @asynccontextmanager
    async def _telling(self) -> AsyncIterator[None]:
        async with telling(address_of(self._sink), self._sink.timeout):
            try:
                yield
            except StreamError as error:
                raise self._meaning(error) from error

    def _meaning(self, error: StreamError) -> CdcbridgeError:
        text = f"RabbitMQ at {address_of(self._sink)} answered for the stream {self._stream}: {error}"
        if error.code == 2:
            stream = '{"x-queue-type": "stream"}'
            return Unusable(
                text, hint=f"rabbitmqadmin declare queue name={self._stream} durable=true arguments='{stream}'"
            )
        if error.code in {8, 9, 11, 12}:
            return Unusable(text, hint=LOGIN_HINT)
        if error.code == 16:
            user = address_of(self._sink).user
            return Unusable(text, hint=f"rabbitmqctl set_permissions {user} '' '^{self._stream}$' '^{self._stream}$'")
        return TargetAway(text)


def _contents(batch: Sequence[Outgoing]) -> list[bytes]:
    """Return the messages as AMQP 1.0, which is the form of messages in streams.

    Source: https://docs.oasis-open.org/amqp/core/v1.0/os/amqp-core-messaging-v1.0-os.html, section 3.2. A message has
    the sections properties (`message-id` and `content-type`), application-properties (the headers) and data.
    """
    shared: dict[str, bytes] = {}  # texts that many messages have
    found = []
    for message in batch:
        pairs = []
        headers = message.headers
        for name, value in headers.items():
            if name == "content-type":
                continue
            if name not in shared:
                shared[name] = _string(name)
            pairs.append(shared[name])
            if name in {"cdcbridge-id", "cdcbridge-seq"}:
                pairs.append(_string(value))
            else:
                if value not in shared:
                    shared[value] = _string(value)
                pairs.append(shared[value])
        if message.key is not None:
            pairs += (_string("cdcbridge-key"), _string(message.key))
        kind = headers.get("content-type")
        properties = [_string(message.id), *[_NULL] * 5, _NULL if kind is None else _symbol(kind)]
        body = message.body or b""
        found.append(
            b"".join(
                (
                    b"\x00\x53\x73", _compound(0xC0, properties),
                    b"\x00\x53\x74", _compound(0xC1, pairs),
                    b"\x00\x53\x75", struct.pack(">BI", 0xB0, len(body)), body,
                )
            )
        )  # fmt: skip
    return found


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">BB", 0xA1, len(data)) + data if len(data) < 256 else struct.pack(">BI", 0xB1, len(data)) + data


def _symbol(text: str) -> bytes:
    data = text.encode("ascii", "replace")[:255]
    return struct.pack(">BB", 0xA3, len(data)) + data


def _compound(short: int, parts: Sequence[bytes]) -> bytes:
    """Return a list (0xC0) or a map (0xC1) with its parts, in the short form or in the long one (16 more)."""
    data = b"".join(parts)
    if len(data) < 255 and len(parts) < 256:
        return struct.pack(">BBB", short, len(data) + 1, len(parts)) + data
    return struct.pack(">BII", short + 0x10, len(data) + 4, len(parts)) + data
