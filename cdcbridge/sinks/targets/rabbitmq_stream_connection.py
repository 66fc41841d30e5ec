"""A connection of RabbitMQ's stream protocol that publishes and waits for the confirms.

Source: https://github.com/rabbitmq/rabbitmq-server/blob/main/deps/rabbitmq_stream/docs/PROTOCOL.adoc. The library
rstream drops a frame silently if its connection has ended, and its callers then wait in vain, so it is not used. Never
connects again by itself, and never sends a message twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, cast

from cdcbridge.sinks.target import TargetAway
from cdcbridge.sinks.targets.rabbitmq_url import Address, context_of

_DECLARE_PUBLISHER: Final = 1
_PUBLISH: Final = 2
_CONFIRM: Final = 3
_ERROR: Final = 4
_QUERY_SEQUENCE: Final = 5
_METADATA: Final = 15
_METADATA_UPDATE: Final = 16
_PEER_PROPERTIES: Final = 17
_HANDSHAKE: Final = 18
_AUTHENTICATE: Final = 19
_TUNE: Final = 20
_OPEN: Final = 21
_CLOSE: Final = 22
_ANSWER: Final = 0x8000
_OK: Final = 1
_PUBLISHER: Final = 0  # a connection has one
_FRAME: Final = 17  # bytes of a frame with messages before the first of them, and room to spare
_MESSAGE: Final = 12  # bytes before each message
_ANSWERS: Final = {
    2: "the stream does not exist",
    6: "the stream is not available",
    8: "user or password is wrong",
    9: "user or password is wrong",
    11: "this user may connect from the server's own machine alone",
    12: "the virtual host does not exist, or is not open to this user",
    14: "the frame is too large",
    15: "internal error",
    16: "access refused",
    17: "precondition failed",
    18: "the publisher does not exist",
}


class StreamError(Exception):
    """RabbitMQ answered with an error code.

    Attributes:
        code: The code, for example 2.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"{_ANSWERS.get(code, 'error')} (code {code})")
        self.code = code


class _Fields:
    """Reads the fields of a frame."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f">{kind}", self._data, self._at)
        self._at += struct.calcsize(kind)
        return int(value)

    def text(self) -> str:
        size = max(0, self.number("h"))
        self._at += size
        return self._data[self._at - size : self._at].decode()


class _Unconfirmed:
    """Messages that were sent together and are not all confirmed yet."""

    __slots__ = ("future", "left")

    def __init__(self, left: int) -> None:
        self.left = left
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Leader(NamedTuple):
    """The node that takes the messages of a stream, as the server names it."""

    host: str
    port: int


class _StreamFrames(asyncio.Protocol):
    """Takes frames apart, and gives each to the call that waits for it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reason = "the connection was closed"
        self.answers: dict[int, asyncio.Future[bytes]] = {}  # by correlation
        self.tuned: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self.waiting: dict[int, _Unconfirmed] = {}  # by publishing id
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while len(self._buffer) >= at + 4:
            (size,) = struct.unpack_from(">I", self._buffer, at)
            if len(self._buffer) < at + 4 + size:
                break
            self._frame(bytes(self._buffer[at + 4 : at + 4 + size]))
            at += 4 + size
        del self._buffer[:at]

    def _frame(self, data: bytes) -> None:
        (kind,) = struct.unpack_from(">H", data)
        if kind == _CONFIRM:
            (number,) = struct.unpack_from(">I", data, 5)
            self._confirm(struct.unpack_from(f">{number}Q", data, 9))
        elif kind & _ANSWER:
            (correlation,) = struct.unpack_from(">I", data, 4)
            if (answer := self.answers.pop(correlation, None)) is not None and not answer.done():
                answer.set_result(data[8:])
        elif kind == _TUNE and not self.tuned.done():
            self.tuned.set_result(struct.unpack_from(">II", data, 4))
        elif kind == _ERROR:
            (number,) = struct.unpack_from(">I", data, 5)
            for identity, code in struct.iter_unpack(">QH", data[9 : 9 + 10 * number]):
                self._refuse(identity, StreamError(code))
        elif kind == _METADATA_UPDATE:
            self.end("the stream was removed, or has another leader now")
        elif kind == _CLOSE:
            reader = _Fields(data[8:])
            reader.number("H")
            self.end(f"RabbitMQ closed the connection: {reader.text()}")

    def _confirm(self, identities: Sequence[int]) -> None:
        for identity in identities:
            one = self.waiting.pop(identity, None)
            if one is not None:
                one.left -= 1
                if one.left == 0 and not one.future.done():
                    one.future.set_result(None)

    def _refuse(self, identity: int, error: StreamError) -> None:
        one = self.waiting.pop(identity, None)
        if one is not None and not one.future.done():
            one.future.set_exception(error)

    def end(self, reason: str) -> None:
        """Disconnect, and let all waiting calls fail with a reason."""
        self.reason = reason
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.reason = f"the connection was closed: {error}"
        lost = ConnectionResetError(self.reason)
        futures: list[asyncio.Future[Any]] = [
            *self.answers.values(),
            self.tuned,
            *(one.future for one in self.waiting.values()),
        ]
        self.waiting.clear()
        for future in futures:
            if not future.done():
                future.set_exception(lost)
                future.exception()  # nobody may wait for it any more
        if not self.ended.done():
            self.ended.set_result(None)


class StreamConnection:
    """A connection that has logged in. StreamConnection.open() makes one.

    Attributes:
        address: The server.
        largest: The largest message that the server takes, in bytes.
        frame_max: The largest frame that the server takes, in bytes.
    """

    def __init__(self, address: Address, frames: _StreamFrames) -> None:
        self.address = address
        self.frame_max = 0
        self.largest = 0
        self._frames = frames
        self._correlation = 0
        self._own = Leader(address.host, address.port)

    @classmethod
    async def open(cls, address: Address) -> StreamConnection:
        """Connect and log in.

        Raises:
            OSError: The server cannot be reached.
            StreamError: The server refuses the user or the virtual host.
        """
        loop = asyncio.get_running_loop()
        context = context_of(address)
        _, frames = await loop.create_connection(_StreamFrames, address.host, address.port, ssl=context)
        connection = cls(address, frames)
        try:
            await connection._log_in()
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _log_in(self) -> None:
        properties = {"product": "cdcbridge", "connection_name": "cdcbridge"}
        await self._ask(_PEER_PROPERTIES, _table(properties))
        await self._ask(_HANDSHAKE, b"")
        login = f"\0{self.address.user}\0{self.address.password}".encode()
        await self._ask(_AUTHENTICATE, _text("PLAIN") + struct.pack(">I", len(login)) + login)
        self.frame_max, _ = await self._frames.tuned
        self.frame_max = self.frame_max or 1 << 30
        self.largest = self.frame_max - _FRAME - _MESSAGE
        # Without heartbeats. Each wait for an answer has a limit of its own, and nothing else waits.
        self._send(_TUNE, struct.pack(">II", self.frame_max, 0))
        answer = await self._ask(_OPEN, _text(self.address.vhost))
        found = {answer.text(): answer.text() for _ in range(answer.number("I"))}
        if "advertised_host" in found and "advertised_port" in found:
            self._own = Leader(found["advertised_host"], int(found["advertised_port"]))

    async def leader(self, stream: str) -> Leader | None:
        """Return the leader of a stream, or None if this connection is to it.

        Raises:
            StreamError: The stream does not exist, or has no leader at present.
        """
        answer = await self._ask(_METADATA, struct.pack(">I", 1) + _text(stream), coded=False)
        nodes = {}
        for _ in range(answer.number("I")):
            reference = answer.number("H")
            nodes[reference] = Leader(answer.text(), answer.number("I"))
        answer.number("I")
        answer.text()
        if (code := answer.number("H")) != _OK:
            raise StreamError(code)
        leader = nodes.get(answer.number("H"))
        if leader is None:
            raise TargetAway(f"the stream {stream} of RabbitMQ has no leader at present")
        return None if leader == self._own else leader

    async def declare(self, stream: str, reference: str) -> None:
        """Become a publisher of a stream.

        Args:
            stream: The stream.
            reference: The name by which the server remembers the last publishing id, or '' for none.
        """
        await self._ask(_DECLARE_PUBLISHER, struct.pack(">B", _PUBLISHER) + _text(reference) + _text(stream))

    async def sequence(self, stream: str, reference: str) -> int:
        """Return the last publishing id of a publisher that the stream has, or 0."""
        return (await self._ask(_QUERY_SEQUENCE, _text(reference) + _text(stream))).number("Q")

    async def publish(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Send messages in as many frames as they need, each after the confirms of the one before it.

        Args:
            messages: A publishing id and the content of each message, which has at most `largest` bytes.

        Raises:
            ConnectionError: The connection ended before all confirms were there.
            StreamError: The stream refused a message.
        """
        first = 0
        size = _FRAME
        for index, (_, content) in enumerate(messages):
            added = _MESSAGE + len(content)
            if index > first and size + added > self.frame_max:
                await self._publish(messages[first:index])
                first, size = index, _FRAME
            size += added
        if messages:
            await self._publish(messages[first:])

    async def _publish(self, messages: Sequence[tuple[int, bytes]]) -> None:
        pack, length = struct.Struct(">QI").pack, len
        waiting = _Unconfirmed(length(messages))
        self._frames.waiting.update((identity, waiting) for identity, _ in messages)
        parts = [struct.pack(">BI", _PUBLISHER, length(messages))]
        for identity, content in messages:
            parts += (pack(identity, length(content)), content)
        try:
            self._send(_PUBLISH, b"".join(parts))
            await waiting.future
        finally:
            for identity, _ in messages:
                self._frames.waiting.pop(identity, None)

    async def _ask(self, kind: int, data: bytes, *, coded: bool = True) -> _Fields:
        """Send a request, and return its answer after the response code.

        Raises:
            StreamError: The code is an error.
        """
        self._correlation += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._frames.answers[self._correlation] = future
        self._send(kind, struct.pack(">I", self._correlation) + data)
        answer = _Fields(await future)
        if coded and (code := answer.number("H")) != _OK:
            raise StreamError(code)
        return answer

    def _send(self, kind: int, data: bytes) -> None:
        if self._frames.transport is None or self._frames.ended.done():
            raise ConnectionResetError(self._frames.reason)
        self._frames.transport.write(struct.pack(">IHH", len(data) + 4, kind, 1) + data)

    def abort(self) -> None:
        """Disconnect at once."""
        if self._frames.transport is not None:
            self._frames.transport.abort()

    async def close(self) -> None:
        """Say good-bye, and disconnect within a second."""
        with contextlib.suppress(TimeoutError, OSError, StreamError):
            async with asyncio.timeout(0.5):
                await self._ask(_CLOSE, struct.pack(">H", _OK) + _text("OK"))
        self.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await self._frames.ended


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">h", len(data)) + data


def _table(values: dict[str, str]) -> bytes:
    return struct.pack(">I", len(values)) + b"".join(_text(name) + _text(value) for name, value in values.items())
