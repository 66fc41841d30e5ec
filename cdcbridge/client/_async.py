"""The client of queue and fifo consumers, asynchronous.

`_sync.py` is made from this file by `make client`: change this one.

A claim is committed asynchronously (losing it in a crash only delivers again), an ack never. Never decides what a
failure means: back-off and dead letters are the server's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Literal, Self

import orjson

from cdcbridge.client._common import Delivery, QueueStatements, row_delivery
from cdcbridge.client._sessions_async import AsyncSessions, Connection
from cdcbridge.client._tasks import Handler, sleep
from cdcbridge.client._worker_async import AsyncWorker
from cdcbridge.database import store_errors
from cdcbridge.errors import StoreUnavailable

log: Final = logging.getLogger("cdcbridge.client")


class AsyncMessage(Delivery):
    """One delivery. As a context manager it acks on leaving, or gives back where its block raised."""

    __slots__ = ("_queue",)

    def __init__(self, row: tuple[Any, ...], queue: AsyncQueue) -> None:
        super().__init__(*row)
        self._queue = queue

    async def ack(self) -> bool:
        """Finish it. False where the delivery is not ours any more."""
        return await self._queue.ack([self]) == 1

    async def nack(self, *, delay: float | None = None, reason: str | None = None, dead: bool = False) -> bool:
        """Give it back, by default after the consumer's back-off; or kill it. False where it is not ours any more."""
        return await self._queue.nack([self], delay=delay, reason=reason, dead=dead) == 1

    async def extend(self, seconds: float) -> bool:
        """Keep it for so long from now. False where it is not ours any more."""
        return await self._queue.extend([self], seconds) == 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.settled is not None:
            return
        if error is not None:
            await self.nack(reason=f"{type(error).__name__}: {error}"[:500])
        elif not await self.ack():
            log.warning("message %s of %s was handled, but its delivery had expired", self.seq, self._queue.consumer)


class AsyncQueue(AsyncSessions):
    """A consumer's queue. Made by connect(); a context manager."""

    sql: QueueStatements

    def __init__(self, dsn: str, consumer: str, schema: str, poll_interval: float | None) -> None:
        super().__init__(dsn, consumer, poll_interval)
        self.sql = QueueStatements(schema)

    @classmethod
    async def connect(
        cls, dsn: str, consumer: str, *, schema: str = "cdcbridge", poll_interval: float | None = None
    ) -> Self:
        """Open a consumer's queue in the store `dsn`. Raises UsageError where there is no such consumer,
        StoreUnavailable where the store cannot be reached.

        `poll_interval`: look so often (seconds) instead of listening; chosen by itself behind a connection pooler.
        """
        queue = cls(dsn, consumer, schema, poll_interval)
        await queue._reader_session()
        return queue

    # receiving

    async def receive(
        self, max_messages: int = 10, *, wait: float = 0, visibility_timeout: float | None = None
    ) -> list[AsyncMessage]:
        """Up to `max_messages` deliveries, each invisible to others for `visibility_timeout` seconds (default: the
        consumer's). Waits up to `wait` seconds for the first one; a lost session is made anew meanwhile.

        Raises StoreUnavailable where the store is still away when the time is over.
        """
        deadline = time.monotonic() + wait
        return await self._until(deadline, lambda: self._receive(max_messages, visibility_timeout))

    async def _receive(self, max_messages: int, visibility_timeout: float | None) -> list[AsyncMessage]:
        connection = await self._reader_session()
        rows = await self._rows(connection, self.sql.receive, (self.consumer, max_messages, visibility_timeout))
        return [AsyncMessage(row_delivery(row, time.monotonic()), self) for row in rows]

    async def messages(
        self, *, wait: float = 20, max_messages: int = 10, stop_when_empty: bool = False
    ) -> AsyncGenerator[AsyncMessage, None]:
        """Messages, one after the other, until stop() or close(); `stop_when_empty`: until a poll of `wait` seconds
        brings none. Fetches `max_messages` at a time, and keeps those that wait their turn from expiring. What was
        fetched and not yielded is given back at the end.
        """
        waiting: list[AsyncMessage] = []
        failed = False  # the last one went back, and those of its key with it
        try:
            while not self.stopped:
                waiting = list(reversed(await self.receive_or_pause(max_messages, wait)))
                if not waiting and stop_when_empty:
                    return
                while waiting and not self.stopped:
                    if failed or waiting[-1].half_over:
                        waiting = await self._still_ours(waiting)
                        failed = False
                        continue
                    message = waiting.pop()
                    yield message
                    failed = self.mode == "fifo" and message.settled == "nacked"
        finally:
            if waiting and not self.closed:
                with suppress(StoreUnavailable):
                    await self.extend(waiting, 0)

    async def _still_ours(self, messages: list[AsyncMessage]) -> list[AsyncMessage]:
        """Those that have not expired or gone back, with their timeout anew."""
        seconds = max((message.visibility for message in messages), default=0)
        if await self.extend(messages, seconds) == len(messages):
            return messages
        return [message for message in messages if await message.extend(seconds)]

    async def receive_or_pause(self, max_messages: int, wait: float) -> list[AsyncMessage]:
        """receive(), where a store that is away is waited for."""
        try:
            return await self.receive(max_messages, wait=wait)
        except StoreUnavailable as error:
            log.warning("%s; trying again", error)
            await sleep(min(wait, 1.0))
            return []

    # settling

    async def ack(self, messages: Iterable[AsyncMessage], *, connection: Connection | None = None) -> int:
        """Finish deliveries; how many were still ours.

        `connection`: in the caller's transaction, and strict: raises StaleReceipt where one is not ours any more, so
        that the effect rolls back with it.
        """
        chosen = list(messages)
        receipts = [message.receipt for message in chosen]
        if connection is None:
            done = await self._settle(self.sql.ack, (self.consumer, receipts, False))
        else:
            with store_errors():
                cursor = await connection.execute(self.sql.ack, (self.consumer, receipts, True))
                row = await cursor.fetchone()
            done = row[0] if row else 0
        self._mark(chosen, "acked")
        return done

    async def nack(
        self,
        messages: Iterable[AsyncMessage],
        *,
        delay: float | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> int:
        """Give deliveries back: visible again after `delay` seconds, or by the consumer's back-off; `dead`: no more."""
        chosen = list(messages)
        receipts = [message.receipt for message in chosen]
        done = await self._settle(self.sql.nack, (self.consumer, receipts, delay, reason, dead))
        self._mark(chosen, "nacked")
        return done

    async def extend(self, messages: Iterable[AsyncMessage], seconds: float) -> int:
        """Keep deliveries invisible for so many seconds from now; how many were still ours. 0 gives them back."""
        chosen = list(messages)
        done = await self._settle(self.sql.extend, (self.consumer, [m.receipt for m in chosen], seconds))
        if done == len(chosen):
            for message in chosen:
                message.prolonged(seconds)
        return done

    async def publish(
        self,
        topic: str,
        data: Any,
        *,
        key: str | None = None,
        delay: float | None = None,
        dedup_id: str | None = None,
        connection: Connection | None = None,
    ) -> int:
        """Publish a message to the consumers of a topic, in the caller's transaction where `connection` is given; its
        seq. `data` is anything that orjson writes.
        """
        values = (topic, key, orjson.dumps(data).decode(), delay, dedup_id)
        if connection is None:
            return await self._write(self.sql.publish, values)  # once: it would stand there twice
        with store_errors():
            row = await (await connection.execute(self.sql.publish, values)).fetchone()
        return row[0] if row else 0

    # workers

    def worker(
        self, *, concurrency: int = 1, wait: float = 20, grace: float = 30
    ) -> Callable[[Handler[AsyncMessage]], AsyncWorker]:
        """Decorate what handles a message: its run() handles so many at a time, until stop(), SIGTERM or SIGINT.

        A message is acked when its handler returns, and given back with the consumer's back-off when it raises. Long
        work is extended by itself. Messages of one key that came together are handled one after the other. On a
        signal, handlers get `grace` seconds to end.
        """

        def decorate(handler: Handler[AsyncMessage]) -> AsyncWorker:
            return AsyncWorker(self, handler, concurrency, wait, grace)

        return decorate

    def _mark(self, messages: list[AsyncMessage], state: Literal["acked", "nacked"]) -> None:
        for message in messages:
            message.settled = message.settled or state
