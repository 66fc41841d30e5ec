"""A connection to Redis that sends many commands in one piece and reads their answers.

redis-py spends 8 to 20 microseconds on each command of a pipeline, and this module 2, so that a batch is not slowed
down by its client. Never connects again by itself, and never sends a command twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Collection
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote, urlsplit

import hiredis

from cdcbridge.config.sink_base import Tls
from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import TargetAway, Unusable
from cdcbridge.sinks.targets.tls import client_context, untrusted

URL_HINT: Final = "Correct `url` of the consumer's `sink`, for example redis://user:password@host:6379/0."


class ErrorAnswer(hiredis.ReplyError):
    """An error that Redis answered to one command, for example `OOM command not allowed`."""

    @property
    def code(self) -> str:
        """The first word of the answer, for example OOM."""
        return str(self).partition(" ")[0]


class Cut(ConnectionError):
    """The connection ended before all answers were there.

    Attributes:
        replies: The answers that arrived.
    """

    def __init__(self, replies: list[Any]) -> None:
        last = f" after {replies[-1]}" if replies and isinstance(replies[-1], ErrorAnswer) else ""
        super().__init__(f"the connection was closed{last}")
        self.replies = replies


class Place(NamedTuple):
    """The address of a server, and how to log in.

    Attributes:
        host: The name or the IP address. A path: a Unix socket.
        port: The port.
        user: The user, or '' for the default user.
        password: The password, or '' for none.
        database: The number of the database.
        tls: True for rediss://.
    """

    host: str
    port: int
    user: str
    password: str
    database: int
    tls: bool

    def __str__(self) -> str:
        """Return the address alone, for messages."""
        return self.host if self.host.startswith("/") else f"{self.host}:{self.port}"


def place_of(url: str) -> Place:
    """Read the URL of a server.

    Args:
        url: For example `rediss://user:password@host:6380/0` or `unix:///run/redis.sock`.

    Raises:
        Unusable: The URL is not one of Redis.
    """
    try:
        parts = urlsplit(url)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if parts.scheme == "unix" and parts.path and not parts.query:
            return Place(unquote(parts.path), 0, user, password, 0, tls=False)
        if parts.scheme not in {"redis", "rediss"} or parts.query or parts.fragment:
            raise ValueError
        database = int(parts.path.strip("/") or 0)
        return Place(parts.hostname or "localhost", parts.port or 6379, user, password, database,
                     tls=parts.scheme == "rediss")  # fmt: skip
    except ValueError:  # whose message could contain the password
        raise Unusable("the URL of the sink is not one of redis://, rediss:// and unix://", hint=URL_HINT) from None


def word(text: str | int) -> bytes:
    """Return one word of a command in the form in which it is sent."""
    data = str(text).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


def packed(*words: str | int) -> bytes:
    """Return a command in the form in which it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(map(word, words))


class _Answers(asyncio.Protocol):
    """Collects the answers of one call of ask() at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = hiredis.Reader(replyError=ErrorAnswer)
        self._replies: list[Any] = []
        self._wanted = 0
        self._waiter: asyncio.Future[list[Any]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        gets, append = self._parser.gets, self._replies.append
        self._parser.feed(data)
        while (reply := gets()) is not False:
            append(reply)
        if self._waiter is not None and not self._waiter.done() and len(self._replies) >= self._wanted:
            self._waiter.set_result(self._replies)

    def connection_lost(self, _: Exception | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(Cut(self._replies))
        if not self.ended.done():
            self.ended.set_result(None)

    async def ask(self, data: bytes, wanted: int) -> list[Any]:
        if self.transport is None or self.ended.done():
            raise Cut([])
        self._replies, self._wanted = [], wanted
        self._waiter = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return await self._waiter


class Connection:
    """A connection that has logged in. Connection.open() makes one.

    Attributes:
        place: The server.
    """

    def __init__(self, place: Place, answers: _Answers) -> None:
        self.place = place
        self._answers = answers

    @classmethod
    async def open(cls, place: Place, tls: Tls | None) -> Connection:
        """Connect and log in.

        Raises:
            OSError: The server cannot be reached.
            TargetAway: The server is not ready.
            Unusable: The server refuses the user or the database, or a certificate cannot be read.
        """
        loop = asyncio.get_running_loop()
        if place.host.startswith("/"):
            _, answers = await loop.create_unix_connection(_Answers, place.host)
        else:
            context = client_context(tls) if place.tls else None
            try:
                _, answers = await loop.create_connection(_Answers, place.host, place.port, ssl=context)
            except ssl.SSLCertVerificationError as error:
                raise untrusted(f"Redis at {place}", error) from error
        connection = cls(place, answers)
        try:
            await connection._log_in()
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _log_in(self) -> None:
        commands = [packed("PING")]
        if self.place.database:
            commands.insert(0, packed("SELECT", self.place.database))
        if self.place.password:
            user = (self.place.user,) if self.place.user else ()
            commands.insert(0, packed("AUTH", *user, self.place.password))
        for reply in await self.ask(commands):
            if isinstance(reply, ErrorAnswer):
                raise meaning(reply, self.place)

    async def ask(self, commands: Collection[bytes]) -> list[Any]:
        """Send commands in one piece, and return their answers. An error is an answer of the class ErrorAnswer.

        Args:
            commands: Packed commands.

        Raises:
            Cut: The connection ended first.
        """
        return await self._answers.ask(b"".join(commands), len(commands))

    def abort(self) -> None:
        """Disconnect at once."""
        if self._answers.transport is not None:
            self._answers.transport.abort()

    async def close(self) -> None:
        """Disconnect, and wait until the connection is gone."""
        self.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._answers.ended


# The server is in a state that ends without anybody touching the configuration. With a hint where a person can help.
_AWAY: Final = {
    "LOADING": None,
    "BUSY": "A script blocks Redis. `redis-cli SCRIPT KILL` ends it.",
    "MASTERDOWN": None,
    "CLUSTERDOWN": None,
    "TRYAGAIN": None,
    "ASK": None,
    "OOM": "Raise `maxmemory` of Redis, or let `maxlen` of the sink limit the stream.",
    "READONLY": "This server is a replica. Let `url` of the sink name the primary.",
    "MISCONF": "Redis cannot write to its disk, see its log.",
    "NOREPLICAS": "Redis has fewer replicas than `min-replicas-to-write`.",
}
_LOGIN: Final = ("NOAUTH", "WRONGPASS", "ERR invalid password", "ERR Client sent AUTH", "ERR AUTH ")


def meaning(answer: ErrorAnswer, place: Place) -> CdcbridgeError:
    """Return the error that an answer of Redis means for a whole batch.

    Args:
        answer: The answer.
        place: The server that gave it.
    """
    text = f"Redis at {place} answered: {answer}"
    if answer.code in _AWAY:
        return TargetAway(text, hint=_AWAY[answer.code])
    if str(answer).startswith(_LOGIN):
        return Unusable(text, hint="Correct user and password in `url` of the consumer's `sink`.")
    if answer.code == "NOPERM":
        return Unusable(
            text,
            hint=f"redis-cli ACL SETUSER {place.user or 'default'} +@stream +@transaction +append +get +set +type "
            "+wait '~STREAM*' '~cdcbridge:*'",
        )
    if answer.code in {"MOVED", "CROSSSLOT"}:
        return Unusable(
            text,
            hint="In Redis Cluster, let `stream` of the sink have no placeholder but {partition}, "
            "for example shop:{partition} in mode stream, or shop in the modes fifo and queue.",
        )
    if str(answer).startswith("ERR DB index"):
        return Unusable(text, hint=URL_HINT)
    if answer.code == "WRONGTYPE":
        return Unusable(text, hint="Choose another `stream` for the sink, or remove the key from Redis.")
    if str(answer).startswith("ERR unknown command"):
        return Unusable(text, hint="The sink needs Redis 5.0 or newer, or Valkey.")
    return TargetAway(text)
