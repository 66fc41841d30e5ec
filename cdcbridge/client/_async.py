"""Client of queue and fifo consumers, asynchronous.

`_sync.py` is made from this file by `make client`: change this one.

Receives and publishes messages, and creates workers. A claim is committed with `synchronous_commit = off`, because a
crash that loses the claim only causes another delivery. Never keeps a message that it fetched and did not hand to the
caller.
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
    """The queue of one consumer. Open it with connect() and use it as a context manager.

    An instance belongs to the process that called connect(). A forked child connects again.

    Attributes:
        consumer: Name of the consumer.
        mode: Mode of the consumer, "queue" or "fifo".
        poll_interval: Seconds between two looks for messages, or None if the client listens for notifications.
        stopped: True after stop() or close().
        closed: True after close().
    """

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
        """Open the queue of a consumer.

        Args:
            dsn: Connection string of the store.
            consumer: Name of a consumer with the mode queue or fifo.
            schema: Schema of the store.
            poll_interval: Seconds between two looks for messages, instead of listening for notifications. By default
                the client listens, or looks once a second if it connects through a connection pooler.
            parse_float: Function that makes the numbers of `message.data` that are not integers, for example
                `decimal.Decimal`. With it no number loses a digit.

        Returns:
            The open queue.

        Raises:
            UsageError: There is no such queue or fifo consumer, the role may not read it, or an argument is wrong.
            StoreUnavailable: The store cannot be reached.
        """
        queue = cls(dsn, consumer, schema, poll_interval)
        queue._parse_float = parse_float
        await queue._reader_session()
        return queue

    # receiving

    async def receive(
        self, max_messages: int = 10, *, wait: float = 0, visibility_timeout: float | None = None
    ) -> list[AsyncMessage]:
        """Claim up to `max_messages` messages, and wait for the first one if none is visible.

        A session that is lost meanwhile is opened again. If the call is cancelled, the messages that it claimed are
        given back at once.

        Args:
            max_messages: Largest number of messages to claim, at least 1.
            wait: Seconds to wait for the first message. With 0 the call looks once.
            visibility_timeout: Seconds for which no other receiver gets the messages. None uses the consumer's timeout.

        Returns:
            The deliveries, or an empty list if no message became visible in time.

        Raises:
            StoreUnavailable: The store is still away when `wait` is over.
            UsageError: An argument is out of range, or the client is closed or belongs to another process.
        """
        return await self._until(wait, lambda session: self._receive(session, max_messages, visibility_timeout))

    async def _receive(
        self, session: AsyncSession, max_messages: int, visibility_timeout: float | None
    ) -> list[AsyncMessage]:
        asked = now()
        values = (self.consumer, max_messages, visibility_timeout)
        rows = await self._rows(session, self._sql.receive, values, rescue=self._rescue)
        return [AsyncMessage(row_delivery(row, asked), self) for row in rows]

    async def _rescue(self, rows: list[tuple[Any, ...]]) -> None:
        """Give back the messages of a claim whose caller was cancelled."""
        receipts = [row[0] for row in rows]
        await self._quietly(lambda: self._write(self._sql.give_back, (self.consumer, receipts)))

    def messages(
        self, *, wait: float = 20, max_messages: int = 10, stop_when_empty: bool = False
    ) -> AsyncGenerator[AsyncMessage, None]:
        """Return a generator of messages that ends after stop() or close().

        The generator fetches `max_messages` at a time. The leases of the message that you handle, and of the messages
        that wait for their turn, are extended. When the loop ends, the messages that were not yielded are given back at
        once and do not count as delivered. While the store is away, the generator logs warnings and tries again.

        In fifo the next message of a key follows when the ack of the previous one is committed. Otherwise the remaining
        messages of the key are given back.

        Args:
            wait: Seconds that a fetch waits for the first message, at least 1 unless `stop_when_empty` is set.
            max_messages: Largest number of messages that a fetch claims.
            stop_when_empty: Whether to end when a fetch returns no message within `wait` seconds.

        Returns:
            A generator of deliveries. Ack or nack each of them, for example with `async with message:`.

        Raises:
            UsageError: `wait` is negative, or the client is closed or belongs to another process.
        """
        self._refuse_unusable()
        refuse_bad_time("wait", wait)
        return Closing(self._messages(patient(wait, stop_when_empty), max_messages, stop_when_empty))

    async def _messages(
        self, wait: float, max_messages: int, stop_when_empty: bool
    ) -> AsyncGenerator[AsyncMessage, None]:
        waiting: list[AsyncMessage] = []
        try:
            while not self.stopped:
                fetched = await self._fetch(max_messages, wait)
                if stop_when_empty and fetched == []:
                    return
                waiting = list(reversed(fetched or []))
                while waiting and not self.stopped:
                    message = waiting.pop()
                    if not await self._begin(message):
                        continue
                    try:
                        yield message
                    finally:
                        self._done(message)
                    await self._let_next(message)
        finally:
            await self._give_back(waiting)

    async def _fetch(self, max_messages: int, wait: float) -> list[AsyncMessage] | None:
        """Fetch messages for begin() and leave(), and extend their leases from now on.

        Args:
            max_messages: Largest number of messages to claim.
            wait: Seconds to wait for the first message.

        Returns:
            The deliveries, or None if the store is away or the client is closed.
        """
        try:
            fetched = await self.receive(max_messages, wait=wait)
        except ClientClosed:
            return None
        except StoreUnavailable as error:
            if not self.stopped:
                log.warning("%s. Trying again", error)
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
        """Publish a message to the consumers of a topic.

        While the store is away, the call tries again for ten seconds. Without a `dedup_id` it stops if the statement
        may have run. The call waits as long for an open transaction that published the same `dedup_id`.

        Args:
            topic: Name of the topic, without a dot.
            data: Any value that orjson can write, without NaN and infinity.
            key: Key of the message, or None.
            delay: Time before the message may be delivered: seconds, or a text such as "5m".
            deliver_at: Time before which the message is not delivered, with a time zone. Give either this or `delay`.
            dedup_id: Text by which a repeated message of the topic is recognized for five minutes, and not added again.
            connection: Connection in whose transaction the message is published. Then no further attempts are made.

        Returns:
            The seq, an int. Its attribute `duplicate` shows whether a message with this `dedup_id` existed before.

        Raises:
            UsageError: An argument is wrong.
            StoreUnavailable: The store is away, or the other transaction stays open. The message may have been added.
        """
        seconds = refuse_bad_delay(delay, deliver_at)
        refuse_bad_text(topic=topic, key=key, dedup_id=dedup_id)
        once = dedup_id is not None
        if connection is not None:
            text = json_text(data, ascii_only=connection.info.encoding != "utf-8")
            with store_errors():
                cursor = await connection.execute(self._sql.publish, (topic, key, text, deliver_at, dedup_id, seconds))
                return Seq._of(await cursor.fetchone(), once=once)
        values = (topic, key, json_text(data), deliver_at, dedup_id, seconds)
        if not once:
            return Seq._of((await self._once(self._sql.publish, values, "the message was published"), None), once=False)
        attempts = 0

        async def attempt() -> tuple[Any, ...]:
            nonlocal attempts
            attempts += 1
            return (await self._rows(await self._writer_session(), self._sql.publish, values))[0]

        try:
            return Seq._of(await self._again(now() + PATIENCE, attempt), once=True, attempts=attempts)
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
        """Return a decorator that turns a handler into a worker, whose run() handles messages until it is stopped.

        A message is acked when its handler returns. If the handler raises, the message is nacked and waits for
        the consumer's back-off. The lease is extended while the handler runs. Messages of one key that were fetched
        together are handled one after the other. The decorator raises UnusableHandler for a handler that a call would
        not run, such as a generator.

        Args:
            concurrency: Largest number of messages that are handled at the same time.
            wait: Seconds that a fetch waits for the first message, at least 1.
            grace: Seconds that running handlers get to end after stop(), SIGTERM or SIGINT.

        Returns:
            The decorator.

        Raises:
            UsageError: An argument is out of range.
        """
        if type(concurrency) is not int or concurrency < 1:
            raise UsageError(f"concurrency is {concurrency!r}, but must be a whole number of at least 1")
        refuse_bad_time("wait", wait)
        refuse_bad_time("grace", grace)

        def decorate(handler: Handler[AsyncMessage]) -> AsyncWorker:
            return AsyncWorker(self, handler, concurrency, patient(wait, stop_when_empty=False), grace)

        return decorate
