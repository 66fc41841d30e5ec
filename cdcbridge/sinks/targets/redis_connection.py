"""A connection to Redis that sends many commands in one piece and reads their answers.

redis-py (https://redis.readthedocs.io) reads the URL, encrypts the connection, logs in, selects the database, packs
single commands, and parses the answers with hiredis. Its client is not used, for three reasons:

- Its pipelines spend 8 to 20 microseconds on each command. So redis_entries.py packs the batches.
- It connects again by itself. The new connection would not watch the key of a lane, so that a displaced process could
  deliver again.
- It sends the bytes that wait before it closes a connection. So close() aborts the connection.

Never connects again, never sends a command twice, and never sends anything after close().
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Collection
from typing import Any, Final
from urllib.parse import urlsplit

from redis import RedisError
from redis.asyncio.connection import Connection as Wire
from redis.asyncio.connection import SSLConnection, parse_url
from redis.exceptions import ResponseError

from cdcbridge.config.sink_base import Tls
from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import TargetAway, Unusable
from cdcbridge.sinks.targets.redis_errors import URL_HINT, meaning, said
from cdcbridge.sinks.targets.tls import client_context, untrusted

_READ_SIZE: Final = 1 << 17  # bytes; the answers to a batch of 10,000, so that none waits when the connection ends
Command = bytes | tuple[str | int, ...]  # packed, or its words


class Cut(ConnectionError):
    """The connection ended before all answers were there.

    Attributes:
        replies: The answers that arrived.
    """

    def __init__(self, replies: list[Any]) -> None:
        last = f" after {said(replies[-1])}" if replies and isinstance(replies[-1], RedisError) else ""
        super().__init__(f"the connection was closed{last}")
        self.replies = replies


def options(url: str) -> dict[str, Any]:
    """Return the arguments of the library's connection that a URL contains.

    The library alone would take an unreadable number for database 0. It would also take settings from a query, for
    example `?ssl_cert_reqs=none`.

    Args:
        url: For example `rediss://user:password@host:6380/0` or `unix:///run/redis.sock`.

    Raises:
        Unusable: The URL is not one of Redis.
    """
    try:
        parts = urlsplit(url)
        if parts.query or parts.fragment or (parts.scheme == "unix" and not parts.path):
            raise ValueError
        if parts.scheme != "unix":
            int(parts.path.strip("/") or 0)
        return dict(parse_url(url))
    except ValueError:  # whose message could contain the password
        raise Unusable("the URL of the sink is not one of redis://, rediss:// and unix://", hint=URL_HINT) from None


def place_of(url: str) -> str:
    """Return the address in a URL, without user and password."""
    given = options(url)
    return str(given.get("path") or f"{given.get('host', 'localhost')}:{given.get('port', 6379)}")


class Connection:
    """A connection that has logged in. Connection.open() makes one.

    Attributes:
        host: The name or the IP address of the server. '' for a Unix socket.
        port: The port of the server.
        place: The address of the server, for messages.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._transport: asyncio.Transport | None = None
        self.host: str = getattr(wire, "host", "")
        self.port: int = getattr(wire, "port", 0)
        self.place = f"{self.host}:{self.port}" if self.host else str(getattr(wire, "path", ""))

    @classmethod
    async def open(cls, url: str, tls: Tls | None, node: tuple[str, int] | None = None) -> Connection:
        """Connect and log in.

        Args:
            url: The URL of the server.
            tls: Certificates for rediss://.
            node: Host and port of another node of the cluster. The rest of the URL is the same there.

        Raises:
            TargetAway: The server cannot be reached, or is not ready.
            Unusable: The server refuses the user or the database, or a certificate cannot be read.
        """
        given = options(url)
        kind = given.pop("connection_class", Wire)
        if node is not None:
            given |= {"host": node[0], "port": node[1]}
            kind = Wire if given.pop("path", None) else kind
        # RESP2, because Redis 5 knows nothing else. The caller limits the time, and the library tries once by default.
        given |= {"protocol": 2, "driver_info": None, "socket_read_size": _READ_SIZE}
        wire = kind(**given, socket_timeout=None, socket_connect_timeout=None)
        if isinstance(wire, SSLConnection):
            wire.ssl_context.context = client_context(tls)
        made = cls(wire)
        try:
            await wire.connect()
            made._transport = wire._writer.transport  # noqa: SLF001 - nothing public aborts a connection
            (answer,) = await made.ask([("PING",)])
            if isinstance(answer, RedisError):
                raise made.meaning(answer)
        except RedisError as error:
            await made.close()
            raise made._failure(error) from error
        except BaseException:
            await made.close()
            raise
        return made

    def meaning(self, answer: RedisError) -> CdcbridgeError:
        """Return the error that an answer means for a whole batch."""
        return meaning(answer, self.place, self._wire.username or "default")

    def _failure(self, error: RedisError) -> CdcbridgeError:
        """Return the error for a connection that could not be made."""
        if isinstance(error.__cause__, RedisError):  # the library wraps what a Unix socket answers
            error = error.__cause__
        if error.status_code is not None or isinstance(error, ResponseError):
            return self.meaning(error)
        if isinstance(error.__context__, ssl.SSLCertVerificationError):
            return untrusted(f"Redis at {self.place}", error.__context__)
        return TargetAway(f"Redis at {self.place} cannot be reached: {error}")

    async def ask(self, commands: Collection[Command]) -> list[Any]:
        """Send commands in one piece, and return their answers. An error is an answer of the class RedisError.

        Raises:
            Cut: The connection ended first.
            TargetAway: The server is not ready, for example because it loads its data.
            Unusable: The server no longer accepts the user.
        """
        if not self._wire.is_connected:  # the library would connect again
            raise Cut([])
        pack = self._wire.pack_command
        data = b"".join([one if isinstance(one, bytes) else b"".join(pack(*one)) for one in commands])
        # The answers are read meanwhile: they may say why the server ends the connection in the middle of a batch.
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._answers(len(commands)))
            with contextlib.suppress(RedisError):
                await self._wire.send_packed_command(data)
        replies, error = reading.result()
        if error is None:
            return replies
        raise Cut(replies) if error.status_code is None else self.meaning(error)

    async def _answers(self, number: int) -> tuple[list[Any], RedisError | None]:
        """Read answers, and return them with the error that ended the connection."""
        replies: list[Any] = []
        read = self._wire.read_response
        while len(replies) < number:
            try:
                replies.append(await read(disable_decoding=True))
            except ResponseError as error:
                replies.append(error)
            except RedisError as error:
                return replies, error
        return replies, None

    async def close(self) -> None:
        """Disconnect at once, and wait until the connection is gone. Bytes that were not sent yet are dropped."""
        if self._transport is not None:
            self._transport.abort()
        await self._wire.disconnect()
