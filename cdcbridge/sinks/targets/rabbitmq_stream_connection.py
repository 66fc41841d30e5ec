"""A connection to a stream of RabbitMQ that publishes and waits for the confirms, through the library rstream.

The Client of rstream drops a frame silently if its connection has ended, so here every wait fails when the connection
ends. Its Producer also connects again by itself, at a time of its own choice, so it is not used. Never counts a message
as delivered without its confirm, never connects again by itself, and never sends a message twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from rstream import ServerError, schema
from rstream.client import Addr, Client

from cdcbridge.sinks.targets.rabbitmq_url import Address, context_of

F = TypeVar("F", bound=schema.Frame)
_PUBLISHER: Final = 0  # a connection has one
_UNLIMITED: Final = 1 << 30  # bytes of a frame
_FRAME: Final = 17  # bytes of a frame with messages before the first of them, and room to spare
_MESSAGE: Final = 12  # bytes before each message
_GOODBYE: Final = 0.5  # seconds

# rstream logs each error that it also raises.
logging.getLogger("rstream").addHandler(logging.NullHandler())


class _Text(str):
    """A text whose length is its number of bytes, because rstream announces len(text) bytes and sends UTF-8."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.encode())


class _Client(Client):
    """A client whose waits fail when its connection ends.

    Attributes:
        error: Why the connection has ended, or None.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(
            address.host,
            address.port,
            ssl_context=context_of(address),
            frame_max=_UNLIMITED,
            heartbeat=0,  # each wait for an answer has a limit of its own, and nothing else waits
            connection_name="cdcbridge",
        )
        self.error: ConnectionResetError | None = None
        self._unconfirmed: dict[asyncio.Future[Any], set[int]] = {}  # the publishing ids of each wait

    async def start(self) -> None:
        """Connect. From then on, whatever ends the reading of frames ends all waits."""
        await super().start()
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # which wait_for(), inside start(), can swallow in Python 3.11
        self._tasks["listener"].add_done_callback(lambda _: self.end("the connection was closed"))
        self.add_handler(schema.PublishConfirm, self._confirm)
        self.add_handler(schema.PublishError, self._refuse)
        self.add_handler(schema.MetadataUpdate, lambda _: self.end("the stream was removed, or has another leader now"))
        closed = "RabbitMQ closed the connection"
        # Under the name of rstream's own handler, which fails.
        self.add_handler(schema.Close, lambda frame: self.end(f"{closed}: {frame.reason}"), "_on_close")

    def wait_frame(
        self, frame_cls: type[F], corr_id: int | None = None, timeout: int | None = None
    ) -> asyncio.Future[F]:
        """Return the future of an answer. The callers limit the time, because rstream would do it with wait_for()."""
        del timeout
        future = self._future()
        self._waiters[frame_cls.key, corr_id] = future
        return future

    def wait_confirms(self, identities: Sequence[int]) -> asyncio.Future[Any]:
        """Return a future that is done when the messages with these publishing ids are confirmed."""
        future = self._future()
        self._unconfirmed[future] = set(identities)
        future.add_done_callback(lambda one: self._unconfirmed.pop(one, None))
        return future

    def _future(self) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.error is not None:
            _fail(future, self.error)
        return future

    def _confirm(self, frame: schema.PublishConfirm) -> None:
        for future, left in self._unconfirmed.items():
            left.difference_update(frame.publishing_ids)
            if not left and not future.done():
                future.set_result(None)

    def _refuse(self, frame: schema.PublishError) -> None:
        for one in frame.errors:
            for future, left in self._unconfirmed.items():
                if one.publishing_id in left:
                    _fail(future, ServerError.from_code(one.response_code)())

    def end(self, reason: str) -> None:
        """Disconnect, and let all waits fail, those that begin later as well."""
        if self.error is None:
            self.error = ConnectionResetError(reason)
            self.abort()
            for future in [*self._waiters.values(), *self._unconfirmed]:
                _fail(future, self.error)

    async def query_publisher_sequence(self, stream: str, reference: str) -> int:
        """Return the last publishing id of a publisher, or 0. The method of rstream also returns 0 for an error."""
        request = schema.QueryPublisherSequence(self._corr_id_seq.next(), publisher_ref=reference, stream=stream)
        return (await self.sync_request(request, schema.QueryPublisherSequenceResponse)).sequence

    def abort(self) -> None:
        """Disconnect at once."""
        if self._conn is not None and self._conn._writer is not None:  # noqa: SLF001
            self._conn._writer.transport.abort()  # noqa: SLF001

    async def close(self) -> None:
        """Say good-bye, and disconnect within a second. The method of rstream takes longer, and leaves sockets open."""
        timer = asyncio.get_running_loop().call_later(_GOODBYE, self.abort)
        try:
            if self.is_started:
                request = schema.Close(self._corr_id_seq.next(), code=1, reason="OK")
                with contextlib.suppress(OSError, ServerError):
                    await self.sync_request(request, schema.CloseResponse)
        finally:
            timer.cancel()
            self.abort()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            if self._conn is not None:
                with contextlib.suppress(OSError):
                    await self._conn.close()


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # nobody may wait for it any more


class StreamConnection:
    """A connection to a stream.

    Args:
        address: The server.
        stream: The stream.

    Raises:
        Unusable: A file of `tls` cannot be read.
    """

    def __init__(self, address: Address, stream: str) -> None:
        self._address = address
        self._stream = _Text(stream)
        self._client = _Client(address)

    async def open(self) -> None:
        """Connect and log in.

        Raises:
            OSError: The server cannot be reached.
            ServerError: The server refuses the user or the virtual host.
        """
        await self._client.start()
        await self._client.authenticate(_Text(self._address.vhost), self._address.user, self._address.password)

    async def leader(self) -> Addr | None:
        """Return the leader of the stream as the server names it, or None if this connection is to it.

        Raises:
            ServerError: The stream does not exist, or is not available.
            LeaderNotAvailable: The stream has no leader at present.
        """
        leader, _ = await self._client.query_leader_and_replicas(self._stream)
        own = self._client.server_properties or {}
        here = (own.get("advertised_host", self._address.host), own.get("advertised_port", str(self._address.port)))
        return None if (leader.host, str(leader.port)) == here else Addr(leader.host, leader.port)

    async def declare(self, reference: str) -> None:
        """Become a publisher of the stream.

        Args:
            reference: The name by which the server remembers the last publishing id, or '' for none.
        """
        await self._client.declare_publisher(self._stream, reference, _PUBLISHER)

    async def sequence(self, reference: str) -> int:
        """Return the last publishing id of a publisher that the stream has, or 0."""
        return await self._client.query_publisher_sequence(self._stream, reference)

    @property
    def largest(self) -> int:
        """The largest message that the server takes, in bytes."""
        return (self._client.frame_max or _UNLIMITED) - _FRAME - _MESSAGE

    async def publish(self, messages: Sequence[schema.Message]) -> None:
        """Send messages in as many frames as they need, each after the confirms of the one before it.

        Args:
            messages: The messages, each with its publishing id, and with at most `largest` bytes.

        Raises:
            ConnectionError: The connection ended before all confirms were there.
            ServerError: The stream refused a message.
        """
        first, size = 0, 0
        for index, message in enumerate(messages):
            added = _MESSAGE + len(message.data)
            if size + added > self.largest + _MESSAGE:
                await self._publish(messages[first:index])
                first, size = index, 0
            size += added
        await self._publish(messages[first:])

    async def _publish(self, messages: Sequence[schema.Message]) -> None:
        if messages:
            confirmed = self._client.wait_confirms([message.publishing_id for message in messages])
            try:
                await self._client.send_publish_frame(schema.Publish(_PUBLISHER, list(messages)))
                await confirmed
            finally:
                confirmed.cancel()

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()
