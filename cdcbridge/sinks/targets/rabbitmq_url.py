"""The address of a RabbitMQ server, as the configuration has it, and the meaning of its errors.

Never connects.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from cdcbridge.config.sink import RabbitmqSink
from cdcbridge.config.sink_base import Tls
from cdcbridge.sinks.target import TargetAway, Unusable
from cdcbridge.sinks.targets.tls import client_context, untrusted

LOGIN_HINT: Final = "Correct user, password and virtual host in `url` of the consumer's `sink`."
_PORTS: Final = {"amqp": 5672, "amqps": 5671, "rabbitmq-stream": 5552, "rabbitmq-stream+tls": 5551}
_SECURE: Final = ("amqps", "rabbitmq-stream+tls")


class Address(NamedTuple):
    """A server, and how to log in.

    Attributes:
        host: The name or the IP address.
        port: The port.
        user: The user.
        password: The password.
        vhost: The virtual host, for example `/`.
        secure: True if the connection is encrypted.
        tls: The files for an encrypted connection.
    """

    host: str
    port: int
    user: str
    password: str
    vhost: str
    secure: bool
    tls: Tls | None

    def __str__(self) -> str:
        """Return host and port alone, for messages."""
        return f"{self.host}:{self.port}"


def address_of(sink: RabbitmqSink) -> Address:
    """Read the URL of a sink.

    Raises:
        Unusable: The URL has another scheme than the sink needs, or cannot be read.
    """
    schemes = ("amqp", "amqps") if sink.stream is None else ("rabbitmq-stream", "rabbitmq-stream+tls")
    try:
        parts = urlsplit(sink.url.get_secret_value())
        if parts.scheme not in schemes or parts.query or parts.fragment:
            raise ValueError
        return Address(
            parts.hostname or "localhost",
            parts.port or _PORTS[parts.scheme],
            unquote(parts.username or "guest"),
            unquote(parts.password or "guest"),
            unquote(parts.path[1:]) or "/",
            parts.scheme in _SECURE,
            sink.tls,
        )
    except ValueError:  # whose message could contain the password
        what = "an exchange" if sink.stream is None else "a stream"
        raise Unusable(
            f"the URL of a sink with {what} begins with {schemes[0]}:// or {schemes[1]}://, and has no parameters",
            hint=f"Correct `url` of the consumer's `sink`, for example {schemes[0]}://user:password@host/vhost.",
        ) from None


def context_of(address: Address) -> ssl.SSLContext | None:
    """Return how the connection is encrypted, or None if it is not."""
    return client_context(address.tls) if address.secure else None


@asynccontextmanager
async def telling(address: Address, seconds: float) -> AsyncIterator[None]:
    """Turn the errors of a connection into those of a target, within a time limit.

    Args:
        address: The server.
        seconds: The limit.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TargetAway(
            f"RabbitMQ at {address} did not answer within {seconds:g} s",
            hint="If RabbitMQ is short of memory or disk, it takes no messages: rabbitmq-diagnostics alarms",
        ) from None
    except ssl.SSLCertVerificationError as error:
        raise untrusted(f"RabbitMQ at {address}", error) from error
    except OSError as error:
        raise TargetAway(f"RabbitMQ at {address} cannot be reached: {error}") from error
