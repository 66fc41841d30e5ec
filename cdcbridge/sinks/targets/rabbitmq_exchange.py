"""Publish to an exchange of RabbitMQ.

Never publishes a message of a key before RabbitMQ has confirmed the one before it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

from aiormq import spec
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelClosed,
    ChannelNotFoundEntity,
    ConnectionClosed,
    ConnectionNotAllowed,
    DeliveryError,
    InvalidFrameError,
    ProbableAuthenticationError,
    PublishError,
)

from cdcbridge.config.sink import RabbitmqSink
from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import Failure, Outgoing, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import hold_back
from cdcbridge.sinks.targets.rabbitmq_amqp import AmqpConnection
from cdcbridge.sinks.targets.rabbitmq_url import LOGIN_HINT, address_of, telling

_LONGEST_KEY: Final = 255  # bytes of a routing key
_TOO_LARGE: Final = re.compile(r"message size \d+ is larger than configured max size (\d+)")


class ExchangePublisher:
    """Publishes to the sink's exchange, with one connection for each batch that is delivered at the same time.

    Args:
        sink: The sink, which has an exchange.
    """

    def __init__(self, sink: RabbitmqSink) -> None:
        self._sink = sink
        self._exchange = sink.exchange or ""
        self._free: list[AmqpConnection] = []
        self._all: set[AmqpConnection] = set()

    async def open(self) -> None:
        """Connect, and see that the exchange exists."""
        async with self._connection():
            pass

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Publish the messages in rounds: in each, the first message of every key that has some left."""
        failures = {
            index: Failure(f"the routing key has {size} bytes, and RabbitMQ takes {_LONGEST_KEY}", for_good=True)
            for index, message in enumerate(batch)
            if (size := len(message.destination.encode())) > _LONGEST_KEY
        }
        hold_back(batch, failures, in_order=False)
        left = [index for index in range(len(batch)) if index not in failures]
        while left:
            now = _firsts(batch, left)
            done = await self._publish(batch, now, failures)
            hold_back(batch, failures, in_order=False)
            left = [index for index in left if index not in done and index not in failures]
        return failures

    async def _publish(self, batch: Sequence[Outgoing], now: list[int], failures: dict[int, Failure]) -> set[int]:
        """Publish messages at once, and return those that were confirmed. The caller sends the others again.

        They are only others if RabbitMQ closed the channel because one message is too large. That one fails.
        """
        async with self._connection() as connection:
            answers = await connection.publish(self._exchange, [batch[index] for index in now])
            open_ = []
            for index, answer in zip(now, answers, strict=True):
                match answer:
                    case spec.Basic.Ack():
                        pass
                    case PublishError():
                        failures[index] = self._unroutable(batch[index].destination)
                    case DeliveryError():
                        reason = "RabbitMQ refused the message (basic.nack), for example because a queue is full"
                        failures[index] = Failure(reason)
                    case Exception() if not connection.ended:
                        raise answer
                    case _:  # the channel has ended
                        open_.append(index)
            if open_:
                _find_too_large(batch, open_, connection.error, failures)
            return set(now).difference(open_)

    def _unroutable(self, key: str) -> Failure:
        command = f"rabbitmqadmin declare binding source={self._exchange} destination=QUEUE routing_key={key}"
        if not self._exchange:
            command = f"rabbitmqadmin declare queue name={key} durable=true"
        return Failure(
            f"RabbitMQ returned the message: no queue takes the routing key {key} of the exchange "
            f"{self._exchange or '(default)'}. If one should: {command}",
            for_good=True,
        )

    async def close(self) -> None:
        """Disconnect."""
        connections, self._free, self._all = self._all, [], set()
        for connection in connections:
            await connection.close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AmqpConnection]:
        """Lend a connection. After any error it is closed, because confirms may still be on their way."""
        address = address_of(self._sink)
        connection = self._free.pop() if self._free else None
        try:
            async with telling(address, self._sink.timeout):
                try:
                    if connection is None:
                        connection = AmqpConnection(address)
                        self._all.add(connection)
                        await connection.open(self._exchange)
                    yield connection
                except AMQPError as error:
                    raise self._meaning(error) from error
            if connection in self._all and not connection.ended:
                self._free.append(connection)
                connection = None
        except TargetAway as error:
            if connection is not None and await connection.blocked():
                raise TargetAway(
                    f"RabbitMQ at {address} takes no messages at present: it is short of memory or disk",
                    hint="rabbitmq-diagnostics alarms",
                ) from error
            raise
        finally:
            if connection is not None:
                self._all.discard(connection)
                await connection.close()

    def _meaning(self, error: AMQPError) -> CdcbridgeError:
        address = address_of(self._sink)
        text = f"RabbitMQ at {address} answered: {error.args[-1] if error.args else error!r}"
        match error:
            case ChannelNotFoundEntity():
                command = f"rabbitmqadmin declare exchange name={self._exchange} type=topic durable=true"
                return Unusable(text, hint=command)
            case InvalidFrameError() if "OpenOk" in str(error):  # the last answer of a login, which names no reason
                text = f"RabbitMQ at {address} refuses the virtual host {address.vhost}"
                return Unusable(f"{text}: it does not exist, or is not open to this user", hint=LOGIN_HINT)
            case AuthenticationError() | ProbableAuthenticationError() | ConnectionNotAllowed():
                return Unusable(text, hint=LOGIN_HINT)
            case ChannelAccessRefused():
                return Unusable(text, hint=f"rabbitmqctl set_permissions {address.user} '' '^{self._exchange}$' ''")
            case ConnectionClosed() | ChannelClosed():
                return TargetAway(text)
        return TargetAway(f"RabbitMQ at {address} cannot be reached: the connection was closed")


def _find_too_large(
    batch: Sequence[Outgoing], open_: Sequence[int], error: Exception, failures: dict[int, Failure]
) -> None:
    """Let the messages fail that are larger than RabbitMQ's limit, if this is why it closed the channel.

    Raises:
        Exception: It closed the channel, or the connection, for another reason.
    """
    found = _TOO_LARGE.search(str(error))
    large = [index for index in open_ if found and len(batch[index].body or b"") > int(found[1])]
    if not large:
        raise error
    reason = f"RabbitMQ answered: {error}; its setting is max_message_size"
    for index in large:
        failures[index] = Failure(reason, for_good=True)


def _firsts(batch: Sequence[Outgoing], indexes: Sequence[int]) -> list[int]:
    """Return the first message of each key, and all messages without a key."""
    seen: set[str] = set()
    found = []
    for index in indexes:
        key = batch[index].key
        if key is None or key not in seen:
            found.append(index)
            if key is not None:
                seen.add(key)
    return found
