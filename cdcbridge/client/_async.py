"""The client of queue and fifo consumers, asynchronous.

`_sync.py` is made from this file by `make client`: change this one.

Receives, publishes, and makes workers. A claim is committed asynchronously, since losing it in a crash only delivers
again. Never keeps a message that it fetched and did not hand out.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from datetime import datetime
from typing import Any, Final, Self

import psycopg

from cdcbridge.client._common import Seq, row_delivery, tie_mates
from cdcbridge.client._contents import ParseFloat, json_text, refuse_bad_text
from cdcbridge.client._limits import AWAY, PATIENCE, now, patient, refuse_bad_delay, refuse_bad_time
from cdcbridge.client._session_async import AsyncSession
from cdcbridge.client._sessions_async import Connection
from cdcbridge.client._settling_async import AsyncMessage, AsyncSettling
from cdcbridge.client._tasks import Closing, Handler, sleep
from cdcbridge.client._worker_async import AsyncWorker
from cdcbridge.database import store_errors
from cdcbridge.errors import ClientClosed, StoreUnavailable, UsageError

log: Final = logging.getLogger("cdcbridge.client")


class AsyncQueue(AsyncSettling):
    """A consumer's queue. Made by connect(); a context manager."""

    @classmethod
    async def connect(
        cls,
        dsn: str,
        consumer: str,
        *,
        schema: str = "cdcbridge",
        poll_interval: float | None = None,
        parse_float: ParseFloat | None = None,
    ) -> Self:
        """Open a consumer's queue in the store `dsn`. Raises UsageError where there is no such consumer,
        StoreUnavailable where the store cannot be reached.

        `poll_interval`: look so often (seconds) instead of listening; chosen by itself behind a connection pooler.
        `parse_float`: makes the numbers of `message.data` that are no integers, for example `decimal.Decimal`. Then no
        number loses a digit.
        """
        queue = cls(dsn, consumer, schema, poll_interval)
        queue.parse_float = parse_float
        await queue._reader_session()
        return queue

    # receiving

    async def receive(
        self, max_messages: int = 10, *, wait: float = 0, visibility_timeout: float | None = None
    ) -> list[AsyncMessage]:
        """Up to `max_messages` deliveries, each invisible to others for `visibility_timeout` seconds (default: the
        consumer's). Waits up to `wait` seconds for the first one; a lost session is made anew meanwhile. Where the call
        is cancelled, its messages go back at once.

        Raises StoreUnavailable where the store is still away when the time is over.
        """
        return await self._until(wait, lambda session: self._receive(session, max_messages, visibility_timeout))

    async def _receive(
        self, session: AsyncSession, max_messages: int, visibility_timeout: float | None
    ) -> list[AsyncMessage]:
        asked = now()
        values = (self.consumer, max_messages, visibility_timeout)
        rows = await self._rows(session, self.sql.receive, values, rescue=self._rescue)
        return [AsyncMessage(row_delivery(row, asked), self) for row in rows]

    async def _rescue(self, rows: list[tuple[Any, ...]]) -> None:
        receipts = [row[0] for row in rows]
        await self._quietly(lambda: self._write(self.sql.give_back, (self.consumer, receipts)))

    def messages(
        self, *, wait: float = 20, max_messages: int = 10, stop_when_empty: bool = False
    ) -> AsyncGenerator[AsyncMessage, None]:
        """Messages, one after the other, until stop() or close(); `stop_when_empty`: until a poll of `wait` seconds
        brings none. Fetches `max_messages` at a time, and extends the leases of the message that you handle and of
        those that wait. Messages that were not yielded are given back at the end, uncounted. In fifo the next message
        of a key follows when the ack of the one before is committed; otherwise the key's messages go back.
        """
        self.refuse_unusable()
        refuse_bad_time("wait", wait)
        return Closing(self._messages(patient(wait, stop_when_empty), max_messages, stop_when_empty))

    async def _messages(
        self, wait: float, max_messages: int, stop_when_empty: bool
    ) -> AsyncGenerator[AsyncMessage, None]:
        waiting: list[AsyncMessage] = []
        try:
            while not self.stopped:
                fetched = await self.fetch(max_messages, wait)
                if stop_when_empty and fetched == []:
                    return
                waiting = list(reversed(fetched or []))
                while waiting and not self.stopped:
                    message = waiting.pop()
                    if not await self.begin(message):
                        continue
                    try:
                        yield message
                    finally:
                        self.done(message)
                    await self.let_next(message)
        finally:
            await self.leave(waiting)

    async def fetch(self, max_messages: int, wait: float) -> list[AsyncMessage] | None:
        """Fetch messages for begin() and leave(). Returns None if the store is away or the client is closed."""
        try:
            fetched = await self.receive(max_messages, wait=wait)
        except ClientClosed:
            return None
        except StoreUnavailable as error:
            if not self.stopped:
                log.warning("%s; trying again", error)
                await sleep(AWAY)
            return None
        self._unbegun.update(fetched)
        self._keeper.hold(fetched)
        if self.mode == "fifo":
            tie_mates(fetched)
        return fetched

    # publishing

    async def publish(
        self,
        topic: str,
        data: Any,
        *,
        key: str | None = None,
        delay: float | str | None = None,
        deliver_at: datetime | None = None,
        dedup_id: str | None = None,
        connection: Connection | None = None,
    ) -> Seq:
        """Publish a message to the consumers of a topic, in the caller's transaction where `connection` is given; its
        seq, a number whose `duplicate` tells whether a message with this `dedup_id` was there before. `data` is
        anything that orjson writes, without NaN and infinity. It is not delivered before `delay` (seconds, or a text
        such as "5m") has passed, or before `deliver_at`.

        Where the session is lost while it runs, it is tried again with a `dedup_id`; without one it raises
        StoreUnavailable, since the message may be there. While another transaction with the same `dedup_id` is open,
        it waits for ten seconds and then raises StoreUnavailable.
        """
        seconds = refuse_bad_delay(delay, deliver_at)
        refuse_bad_text(topic=topic, key=key, dedup_id=dedup_id)
        once = dedup_id is not None
        if connection is not None:
            text = json_text(data, ascii_only=connection.info.encoding != "utf-8")
            with store_errors():
                cursor = await connection.execute(self.sql.publish, (topic, key, text, deliver_at, dedup_id, seconds))
                return Seq.of(await cursor.fetchone(), once=once)
        values = (topic, key, json_text(data), deliver_at, dedup_id, seconds)
        if not once:
            return Seq.of((await self._once(self.sql.publish, values, "the message was published"), None), once=False)
        attempts = 0

        async def attempt() -> tuple[Any, ...]:
            nonlocal attempts
            attempts += 1
            return (await self._rows(await self._writer_session(), self.sql.publish, values))[0]

        try:
            return Seq.of(await self._again(now() + PATIENCE, attempt), once=True, attempts=attempts)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, psycopg.errors.QueryCanceled):
                raise
            raise StoreUnavailable(
                f"{error}: another transaction that published the dedup_id {dedup_id!r} may be open",
                hint="Publish again when it has ended. `cdcbridge publish --dedup-id` names its session.",
            ) from error

    # workers

    def worker(
        self, *, concurrency: int = 1, wait: float = 20, grace: float = 30
    ) -> Callable[[Handler[AsyncMessage]], AsyncWorker]:
        """Decorate what handles a message: its run() handles so many at a time, until stop(), SIGTERM or SIGINT.

        A message is acked when its handler returns, and given back with the consumer's back-off when it raises. Long
        work is extended by itself. Messages of one key that came together are handled one after the other. On a
        signal, handlers get `grace` seconds to end.
        """
        if type(concurrency) is not int or concurrency < 1:
            raise UsageError(f"concurrency is {concurrency!r}; it must be a whole number of at least 1")
        refuse_bad_time("wait", wait)
        refuse_bad_time("grace", grace)

        def decorate(handler: Handler[AsyncMessage]) -> AsyncWorker:
            return AsyncWorker(self, handler, concurrency, patient(wait, stop_when_empty=False), grace)

        return decorate
