"""Publish to a stream of RabbitMQ.

Never has more than one frame of a lane on its way, so that a refused frame is not followed by a later one.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

from rstream import AMQPMessage, Properties, schema
from rstream.exceptions import (
    AccessRefused,
    AuthenticationFailure,
    ClientError,
    LeaderNotAvailable,
    SASLAuthenticationFailureLoopback,
    SASLError,
    ServerError,
    StreamDoesNotExist,
    VirtualHostAccessFailure,
)

from cdcbridge.config.sink import RabbitmqSink
from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import Failure, Lane, Outgoing, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import hold_back
from cdcbridge.sinks.targets.rabbitmq_stream_connection import StreamConnection
from cdcbridge.sinks.targets.rabbitmq_url import LOGIN_HINT, address_of, telling

_REDIRECTS: Final = 3  # between the nodes of a cluster
_NO_DATA: Final = b"\x00\x53\x75\xa0\x00"  # an empty data section, which AMQP 1.0 requires and rstream leaves out


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
                self._connection = StreamConnection(address, self._stream)
                await self._connection.open()
                leader = await self._connection.leader()
                if leader is None:
                    await self._connection.declare(self._reference)
                    return
                await self._connection.close()
                address = address._replace(host=leader.host, port=leader.port)
        raise TargetAway(f"the nodes of RabbitMQ at {address} name each other as leader of the stream {self._stream}")

    async def position(self) -> int | None:
        """Return the last publishing id of the lane that the stream has."""
        if self._lane is None:
            return None
        async with self._telling():
            return await self._opened.sequence(self._reference)

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Publish the messages, and wait for the confirms."""
        largest = self._opened.largest
        contents = [_content(message) for message in batch]
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
                    schema.Message(next(self._numbers) if self._lane is None else message.seq, None, contents[index])
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
            except (ServerError, ClientError) as error:
                raise self._meaning(error) from error

    def _meaning(self, error: ServerError | ClientError) -> CdcbridgeError:
        """Return the error of a target. The errors of rstream are classes without words."""
        text = f"RabbitMQ at {address_of(self._sink)} answered for the stream {self._stream}"
        match error:
            case StreamDoesNotExist():
                command = f"rabbitmqadmin declare queue name={self._stream} durable=true"
                hint = f"""{command} arguments='{{"x-queue-type": "stream"}}'"""
                return Unusable(f"{text}: the stream does not exist", hint=hint)
            case AuthenticationFailure() | SASLError():
                return Unusable(f"{text}: user or password is wrong", hint=LOGIN_HINT)
            case SASLAuthenticationFailureLoopback():
                reason = "this user may connect from the server's own machine alone"
                return Unusable(f"{text}: {reason}", hint=LOGIN_HINT)
            case VirtualHostAccessFailure():
                reason = "the virtual host does not exist, or is not open to this user"
                return Unusable(f"{text}: {reason}", hint=LOGIN_HINT)
            case AccessRefused():
                command = f"rabbitmqctl set_permissions {address_of(self._sink).user}"
                hint = f"{command} '' '^{self._stream}$' '^{self._stream}$'"
                return Unusable(f"{text}: access refused", hint=hint)
            case LeaderNotAvailable():
                return TargetAway(f"{text}: the stream has no leader at present")
        return TargetAway(f"{text}: {type(error).__name__}")


def _content(message: Outgoing) -> bytes:
    """Return a message as AMQP 1.0, which is the form of messages in streams."""
    headers = dict(message.headers)
    properties = Properties(message_id=message.id, content_type=headers.pop("content-type", None))
    if message.key is not None:
        headers["cdcbridge-key"] = message.key
    content = bytes(AMQPMessage(properties=properties, application_properties=headers, body=message.body))
    return content if message.body else content + _NO_DATA
