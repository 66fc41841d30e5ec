"""RabbitMQ, for the conformance suite: a stream, or an exchange with a queue."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

from rstream import (
    AMQPMessage,
    Consumer,
    ConsumerOffsetSpecification,
    MessageContext,
    OffsetType,
    Producer,
    amqp_decoder,
)
from rstream.exceptions import LeaderNotAvailable, StreamNotAvailable

from tests.harness.brokers.amqp import channel
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.harness.proxy import Proxy
from tests.harness.world import eventually
from tests.sinks.case import Case, Received


@contextmanager
def steady_rabbitmq(**options: Any) -> Iterator[RabbitMQ]:
    """Start a server that a test may kill at any time.

    RabbitMQ 3.10 forgets its streams if it is killed soon after it has made the first one, but not after a stop.

    Args:
        options: Those of the server.
    """
    with RabbitMQ(**options) as server:
        RabbitmqStreamCase(server, "first")
        server.restart()
        yield server


class RabbitmqStreamCase(Case):
    """A stream with the name of the case.

    Args:
        server: The server.
        name: The name of the stream.
        partitions: How many partitions the log has.
        proxy: A proxy in front of the server's port for streams.
        keys: Further keys of the sink.
    """

    type = "rabbitmq"
    exactly_once = True

    def __init__(
        self, server: RabbitMQ, name: str, *, partitions: int = 4, proxy: Proxy | None = None, **keys: Any
    ) -> None:
        self.server = server
        self.name = name
        self._proxy = proxy
        self._keys = keys
        asyncio.run(self._declare())

    def sink(self) -> dict[str, Any]:
        url = self.server.stream_url
        if self._proxy is not None:
            url = url.replace(f":{self.server.stream_port}/", f":{self._proxy.port}/")
        return {"type": "rabbitmq", "url": url, "stream": self.name, **self._keys}

    def received(self) -> list[Received]:
        found: list[Received] = []

        def reads() -> bool:
            with suppress(StreamNotAvailable, LeaderNotAvailable):  # at first, after a restart
                found.extend(asyncio.run(self._received()))
                return True
            return False

        eventually(reads, "the stream has a leader")
        return found

    def close(self) -> None:
        asyncio.run(self._delete())

    async def _declare(self) -> None:
        async with channel(self.server.url) as one:
            await one.queue_declare(self.name, durable=True, arguments={"x-queue-type": "stream"})

    async def _delete(self) -> None:
        async with channel(self.server.url) as one:
            await one.queue_delete(self.name)

    async def messages(self) -> list[AMQPMessage]:
        """Return all messages of the stream as another library reads them: up to an end mark, which it publishes."""
        found: list[AMQPMessage] = []
        complete = asyncio.Event()
        mark = uuid4().hex.encode()
        login = {"username": self.server.user, "password": self.server.password}

        def take(message: AMQPMessage, _: MessageContext) -> None:
            if message.application_properties is not None:
                found.append(message)
            elif bytes(message.body) == mark:
                complete.set()

        async with (
            Producer(self.server.host, self.server.stream_port, **login) as producer,
            Consumer(self.server.host, self.server.stream_port, **login) as consumer,
        ):
            await producer.send_wait(self.name, AMQPMessage(body=mark))
            await consumer.subscribe(
                self.name,
                take,
                decoder=amqp_decoder,
                offset_specification=ConsumerOffsetSpecification(OffsetType.FIRST),
            )
            async with asyncio.timeout(30):
                await complete.wait()
        return found

    async def _received(self) -> list[Received]:
        return [
            Received(
                _text(message.properties.message_id),
                _headers(message).get("cdcbridge-key"),
                bytes(message.body),
                self.name,
            )
            for message in await self.messages()
        ]


class RabbitmqExchangeCase(Case):
    """A queue with the name of the case, which takes everything of an exchange.

    Args:
        server: The server.
        name: The name of the queue and of the exchange.
        partitions: How many partitions the log has.
        proxy: A proxy in front of the server's port for AMQP.
        keys: Further keys of the sink.
    """

    type = "rabbitmq"
    exactly_once = False

    def __init__(
        self, server: RabbitMQ, name: str, *, partitions: int = 4, proxy: Proxy | None = None, **keys: Any
    ) -> None:
        self.server = server
        self.name = name
        self._proxy = proxy
        self._keys = keys
        asyncio.run(self._declare())

    def sink(self) -> dict[str, Any]:
        url = self.server.url
        if self._proxy is not None:
            url = url.replace(f":{self.server.port}/", f":{self._proxy.port}/")
        return {"type": "rabbitmq", "url": url, "exchange": self.name, "routing_key": "{topic}", **self._keys}

    def received(self) -> list[Received]:
        return asyncio.run(self._received())

    def settle(self) -> None:
        self.server.restart()  # RabbitMQ 3.10 forgets what was declared just before a kill

    def close(self) -> None:
        asyncio.run(self._delete())

    async def _declare(self) -> None:
        async with channel(self.server.url) as one:
            await one.exchange_declare(self.name, exchange_type="topic", durable=True)
            await one.queue_declare(self.name, durable=True)
            await one.queue_bind(self.name, self.name, "#")

    async def _delete(self) -> None:
        async with channel(self.server.url) as one:
            await one.queue_delete(self.name)
            await one.exchange_delete(self.name)

    async def _received(self) -> list[Received]:
        """Read without acking, so that the messages stay."""
        found = []
        async with channel(self.server.url) as one:
            while (message := await one.basic_get(self.name)).delivery_tag:
                headers = message.header.properties.headers or {}
                key = headers.get("cdcbridge-key")
                found.append(
                    Received(
                        str(message.header.properties.message_id),
                        None if key is None else str(key),
                        message.body,
                        str(message.routing_key),
                    )
                )
        return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _headers(message: AMQPMessage) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in (message.application_properties or {}).items()}
