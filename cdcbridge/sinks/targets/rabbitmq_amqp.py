"""A connection of AMQP 0.9.1 that publishes batches and collects their confirms.

Source: https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, section 4, and https://www.rabbitmq.com/docs/confirms.
aio-pika spends 160 microseconds on a message and leaves tasks when it is closed, this module 10 and none. Never
connects again by itself, and never sends a message twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Sequence
from typing import Any, Final, cast

from pamqp import body, commands, frame, header
from pamqp.heartbeat import Heartbeat

from cdcbridge.sinks.target import Outgoing
from cdcbridge.sinks.targets.rabbitmq_url import Address, context_of

_CHANNEL: Final = 1
_METHOD, _HEADER, _BODY = 1, 2, 3
_END: Final = b"\xce"
_FRAME: Final = 8  # bytes of a frame beside its content
_BASIC: Final = 60
_PUBLISH, _ACK, _NACK = 40, 80, 120
_MANDATORY: Final = 1
_PERSISTENT: Final = 2
_PROPERTIES: Final = 0x3080  # headers, delivery mode and message id
_CONTENT_TYPE: Final = 0x8000
_GREETING: Final = b"AMQP\x00\x00\x09\x01"


class AmqpError(Exception):
    """RabbitMQ closed the channel or the connection.

    Attributes:
        code: The code, for example 404.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Wave:
    """Messages that were published together.

    Attributes:
        open: The indexes of the messages that are not confirmed.
        nacked: The indexes of the messages that RabbitMQ refused.
        returned: The indexes of the messages that no queue takes.
        error: The reason why no further confirm will arrive, or None.
    """

    def __init__(self, first: int, messages: Sequence[Outgoing]) -> None:
        self.open = set(range(len(messages)))
        self.nacked: set[int] = set()
        self.returned: set[int] = set()
        self.error: Exception | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._first = first
        self._next = first  # the lowest tag that may be open
        self._ids = {message.id: index for index, message in enumerate(messages)}

    def settle(self, tag: int, *, multiple: bool, refused: bool) -> None:
        """Take a confirm: for one message, or for all up to a tag."""
        tags = range(self._next if multiple else tag, tag + 1)
        if multiple:
            self._next = max(self._next, tag + 1)
        settled = self.open & {one - self._first for one in tags}
        self.open -= settled
        if refused:
            self.nacked |= settled
        if not self.open:
            self.end()

    def returns(self, identity: str | None) -> None:
        """Take a message back. Its confirm follows."""
        if identity in self._ids:
            self.returned.add(self._ids[identity])

    def end(self, error: Exception | None = None) -> None:
        """Stop waiting."""
        if not self.done.done():
            self.error = error
            self.done.set_result(None)


class _AmqpFrames(asyncio.Protocol):
    """Takes frames apart. Answers to requests arrive in the order of the requests."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.wave: Wave | None = None
        self.blocked = ""  # why RabbitMQ reads nothing at present
        self.error: Exception = ConnectionResetError("the connection was closed")
        self._answer: asyncio.Future[Any] | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        at = 0
        while len(data) >= at + 7:
            kind, _, size = struct.unpack_from(">BHI", data, at)
            end = at + size + _FRAME
            if len(data) < end:
                break
            self._frame(kind, data[at:end])
            at = end
        self._buffer = data[at:]

    def _frame(self, kind: int, data: bytes) -> None:
        if kind == _METHOD:
            group, method = struct.unpack_from(">HH", data, 7)
            if group == _BASIC and method in {_ACK, _NACK} and self.wave is not None:
                tag, bits = struct.unpack_from(">QB", data, 11)
                self.wave.settle(tag, multiple=bool(bits & 1), refused=method == _NACK)
                return
        self._other(frame.unmarshal(data)[2])

    def _other(self, found: Any) -> None:
        match found:
            case header.ContentHeader():  # of a message that is returned
                if self.wave is not None:
                    self.wave.returns(found.properties.message_id)
            case commands.Channel.Close() | commands.Connection.Close():
                self._close(AmqpError(found.reply_code or 0, found.reply_text))
            case commands.Connection.Blocked():
                self.blocked = found.reason
            case commands.Connection.Unblocked():
                self.blocked = ""
            case body.ContentBody() | Heartbeat() | commands.Basic.Return():
                pass
            case _ if self._answer is not None and not self._answer.done():
                self._answer.set_result(found)

    def _close(self, error: Exception) -> None:
        self.error = error
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.error = ConnectionResetError(f"the connection was closed: {error}")
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self.error)
        if self.wave is not None:
            self.wave.end(self.error)
        if not self.ended.done():
            self.ended.set_result(None)

    async def ask(self, data: bytes) -> Any:
        """Send a request, and return its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self.send(data)
        return await self._answer

    def send(self, data: bytes) -> None:
        if self.transport is None or self.ended.done():
            raise self.error
        self.transport.write(data)


class AmqpConnection:
    """A connection with one channel that confirms. AmqpConnection.open() makes one."""

    def __init__(self, frames: _AmqpFrames) -> None:
        self._frames = frames
        self._frame_max = 0
        self._tag = 1  # of the next message

    @classmethod
    async def open(cls, address: Address, exchange: str) -> AmqpConnection:
        """Connect, log in, and see that the exchange exists.

        Raises:
            OSError: The server cannot be reached.
            AmqpError: The server refuses the user, the virtual host or the exchange.
        """
        loop = asyncio.get_running_loop()
        _, frames = await loop.create_connection(_AmqpFrames, address.host, address.port, ssl=context_of(address))
        connection = cls(frames)
        try:
            await connection._log_in(address)
            await connection._ask(commands.Channel.Open())
            await connection._ask(commands.Confirm.Select())
            if exchange:
                await connection._ask(commands.Exchange.Declare(exchange=exchange, passive=True))
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _log_in(self, address: Address) -> None:
        await self._frames.ask(_GREETING)
        tune = await self._ask(
            commands.Connection.StartOk(
                client_properties={
                    "product": "cdcbridge",
                    "connection_name": "cdcbridge",
                    "capabilities": {
                        "authentication_failure_close": True,
                        "connection.blocked": True,
                        "basic.nack": True,
                        "publisher_confirms": True,
                    },
                },
                mechanism="PLAIN",
                response=f"\0{address.user}\0{address.password}",
                locale="en_US",
            ),
            0,
        )
        self._frame_max = tune.frame_max or 1 << 17
        # Without heartbeats. Each wait for an answer has a limit of its own, and nothing else waits.
        self._frames.send(frame.marshal(commands.Connection.TuneOk(tune.channel_max, self._frame_max, heartbeat=0), 0))
        await self._ask(commands.Connection.Open(virtual_host=address.vhost), 0)

    async def _ask(self, request: Any, channel: int = _CHANNEL) -> Any:
        return await self._frames.ask(frame.marshal(request, channel))

    @property
    def ended(self) -> bool:
        """True if the connection has ended."""
        return self._frames.ended.done()

    @property
    def blocked(self) -> str:
        """Why RabbitMQ takes no messages at present, for example `low on disk`, or ''."""
        return self._frames.blocked

    async def publish(self, exchange: str, messages: Sequence[Outgoing]) -> Wave:
        """Publish messages at once, and wait until each is confirmed, or the connection ends."""
        wave = self._frames.wave = Wave(self._tag, messages)
        self._tag += len(messages)
        try:
            self._frames.send(b"".join(self._packed(exchange, messages)))
            if messages:
                await wave.done
        finally:
            self._frames.wave = None
        return wave

    def _packed(self, exchange: str, messages: Sequence[Outgoing]) -> list[bytes]:
        most = self._frame_max - _FRAME
        shared: dict[str, bytes] = {}  # frames and texts that many messages have
        found = []
        for message in messages:
            if message.destination not in shared:
                words = _short(exchange) + _short(message.destination)
                method = struct.pack(">HHH", _BASIC, _PUBLISH, 0) + words + struct.pack(">B", _MANDATORY)
                shared[message.destination] = _framed(_METHOD, method)
            content = message.body or b""
            found.append(shared[message.destination])
            found.append(_framed(_HEADER, struct.pack(">HHQ", _BASIC, 0, len(content)) + _properties(message)))
            found += [_framed(_BODY, content[at : at + most]) for at in range(0, len(content), most)]
        return found

    def abort(self) -> None:
        """Disconnect at once."""
        if self._frames.transport is not None:
            self._frames.transport.abort()

    async def close(self) -> None:
        """Say good-bye, and disconnect within a second."""
        if not self.ended:
            with contextlib.suppress(TimeoutError, OSError, AmqpError):
                async with asyncio.timeout(0.5):
                    await self._ask(commands.Connection.Close(200, "OK", 0, 0), 0)
        self.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await self._frames.ended


def _properties(message: Outgoing) -> bytes:
    """Return the properties of a message as its content header has them."""
    kind = ""
    table = bytearray()
    for name, value in message.headers.items():
        if name == "content-type":
            kind = value
        else:
            table += _short(name) + _long(value)
    if message.key is not None:
        table += _short("cdcbridge-key") + _long(message.key)
    flags = _PROPERTIES | (_CONTENT_TYPE if kind else 0)
    return b"".join(
        (
            struct.pack(">H", flags),
            _short(kind) if kind else b"",
            struct.pack(">I", len(table)),
            table,
            struct.pack(">B", _PERSISTENT),
            _short(message.id),
        )
    )


def _short(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">B", len(data)) + data


def _long(text: str) -> bytes:
    data = text.encode()
    return b"S" + struct.pack(">I", len(data)) + data


def _framed(kind: int, content: bytes) -> bytes:
    return struct.pack(">BHI", kind, _CHANNEL, len(content)) + content + _END
