"""A connection of AMQP 0.9.1 that publishes batches and collects their confirms, through the library aiormq.

Never connects again by itself, and never sends a message twice.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from typing import Any, Final

from aiormq import Connection, spec
from aiormq.abc import AbstractChannel
from aiormq.connection import TransportFactory
from yarl import URL

from cdcbridge.sinks.target import Outgoing
from cdcbridge.sinks.targets.rabbitmq_url import Address, context_of

_PERSISTENT: Final = 2
_CLIENT: Final[dict[str, Any]] = {"product": "cdcbridge", "connection_name": "cdcbridge"}
_GOODBYE: Final = 0.5  # seconds
_TURNS: Final = 10  # of the event loop, in which the last tasks of aiormq end after its close()

# aiormq logs each error that it also raises.
logging.getLogger("aiormq").addHandler(logging.NullHandler())


class _Transport(TransportFactory):
    """Connects, raises the errors of the system, and keeps the transport so that it can be aborted."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        self._transport: asyncio.WriteTransport | None = None

    async def create(self, url: URL, **_: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(url.host, url.port, ssl=self._context)
        self._transport = writer.transport
        return reader, writer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class AmqpConnection:
    """A connection with one channel that confirms.

    Args:
        address: The server.

    Raises:
        Unusable: A file of `tls` cannot be read.
    """

    def __init__(self, address: Address) -> None:
        self._transport = _Transport(context_of(address))
        url = URL.build(
            scheme="amqps" if address.secure else "amqp",
            user=address.user,
            password=address.password,
            host=address.host,
            port=address.port,
            path=f"/{address.vhost}",
        )
        self._connection = Connection(url, transport_factory=self._transport, client_properties=_CLIENT)
        self._channel: AbstractChannel | None = None

    async def open(self, exchange: str) -> None:
        """Connect, log in, and see that the exchange exists.

        Args:
            exchange: The exchange. '' is the default exchange, which always exists.

        Raises:
            OSError: The server cannot be reached.
            AMQPError: The server refuses the user, the virtual host or the exchange.
        """
        await self._connection.connect()
        self._channel = await self._connection.channel()
        if exchange:
            await self._channel.exchange_declare(exchange, passive=True)

    @property
    def ended(self) -> bool:
        """True if the channel or the connection has ended."""
        return self._channel is None or self._channel.is_closed

    @property
    def error(self) -> Exception:
        """The reason why the channel or the connection has ended."""
        found = self._channel.closing.exception() if self._channel is not None and self._channel.is_closed else None
        # After close(), it is a CancelledError, although nobody cancelled the caller.
        return found if isinstance(found, Exception) else ConnectionResetError("the connection was closed")

    async def blocked(self) -> bool:
        """Return whether RabbitMQ reported that it takes no messages at present (connection.blocked)."""
        if self._channel is None:
            return False
        try:
            async with asyncio.timeout(0):
                await self._connection.ready()  # returns at once if the connection is not blocked
        except TimeoutError:
            return True
        return False

    async def publish(self, exchange: str, messages: Sequence[Outgoing]) -> list[object]:
        """Publish messages together, and wait for the answer to each.

        Args:
            exchange: The exchange.
            messages: The messages.

        Returns:
            The answer to each message: an Ack if RabbitMQ has confirmed it, a PublishError if no queue takes it, a
            DeliveryError if RabbitMQ refused it, and anything else if the channel ended before the confirm.
        """
        if self._channel is None:
            raise self.error
        publish = self._channel.basic_publish
        return await asyncio.gather(
            *(
                publish(
                    message.body or b"",
                    exchange=exchange,
                    routing_key=message.destination,
                    properties=_properties(message),
                    mandatory=True,
                )
                for message in messages
            ),
            return_exceptions=True,
        )

    async def close(self) -> None:
        """Say good-bye, and disconnect within a second."""
        timer = asyncio.get_running_loop().call_later(_GOODBYE, self._transport.abort)
        try:
            await self._connection.close()
            for _ in range(_TURNS):
                await asyncio.sleep(0)
        finally:
            timer.cancel()
            self._transport.abort()


def _properties(message: Outgoing) -> spec.Basic.Properties:
    headers: dict[str, Any] = {name: value for name, value in message.headers.items() if name != "content-type"}
    if message.key is not None:
        headers["cdcbridge-key"] = message.key
    return spec.Basic.Properties(
        content_type=message.headers.get("content-type"),
        headers=headers,
        delivery_mode=_PERSISTENT,
        message_id=message.id,
    )
