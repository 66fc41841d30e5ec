"""The client of queue and fifo consumers, synchronous.

Made from `_async.py` by `make client`.

A claim is committed asynchronously (losing it in a crash only delivers again), an ack never. Never decides what a
failure means: back-off and dead letters are the server's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Literal, Self

import orjson

from cdcbridge.client._common import Delivery, QueueStatements, row_delivery
from cdcbridge.client._sessions import Connection, Sessions
from cdcbridge.client._threads import Handler, sleep
from cdcbridge.client._worker import Worker
from cdcbridge.database import store_errors
from cdcbridge.errors import StoreUnavailable

log: Final = logging.getLogger("cdcbridge.client")


class Message(Delivery):
    """One delivery. As a context manager it acks on leaving, or gives back where its block raised."""

    __slots__ = ("_queue",)

    def __init__(self, row: tuple[Any, ...], queue: Queue) -> None:
        super().__init__(*row)
        self._queue = queue

    def ack(self) -> bool:
        """Finish it. False where the delivery is not ours any more."""
        return self._queue.ack([self]) == 1

    def nack(self, *, delay: float | None = None, reason: str | None = None, dead: bool = False) -> bool:
        """Give it back, by default after the consumer's back-off; or kill it. False where it is not ours any more."""
        return self._queue.nack([self], delay=delay, reason=reason, dead=dead) == 1

    def extend(self, seconds: float) -> bool:
        """Keep it for so long from now. False where it is not ours any more."""
        return self._queue.extend([self], seconds) == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.settled is not None:
            return
        if error is not None:
            self.nack(reason=f"{type(error).__name__}: {error}"[:500])
        elif not self.ack():
            log.warning("message %s of %s was handled, but its delivery had expired", self.seq, self._queue.consumer)


class Queue(Sessions):
    """A consumer's queue. Made by connect(); a context manager."""

    sql: QueueStatements

    def __init__(self, dsn: str, consumer: str, schema: str, poll_interval: float | None) -> None:
        super().__init__(dsn, consumer, poll_interval)
        self.sql = QueueStatements(schema)

    @classmethod
    def connect(cls, dsn: str, consumer: str, *, schema: str = "cdcbridge", poll_interval: float | None = None) -> Self:
        """Open a consumer's queue in the store `dsn`. Raises UsageError where there is no such consumer,
        StoreUnavailable where the store cannot be reached.

        `poll_interval`: look so often (seconds) instead of listening; chosen by itself behind a connection pooler.
        """
        queue = cls(dsn, consumer, schema, poll_interval)
        queue._reader_session()
        return queue

    # receiving

    def receive(
        self, max_messages: int = 10, *, wait: float = 0, visibility_timeout: float | None = None
    ) -> list[Message]:
        """Up to `max_messages` deliveries, each invisible to others for `visibility_timeout` seconds (default: the
        consumer's). Waits up to `wait` seconds for the first one; a lost session is made anew meanwhile.

        Raises StoreUnavailable where the store is still away when the time is over.
        """
        deadline = time.monotonic() + wait
        return self._until(deadline, lambda: self._receive(max_messages, visibility_timeout))

    def _receive(self, max_messages: int, visibility_timeout: float | None) -> list[Message]:
        connection = self._reader_session()
        rows = self._rows(connection, self.sql.receive, (self.consumer, max_messages, visibility_timeout))
        return [Message(row_delivery(row, time.monotonic()), self) for row in rows]

    def messages(
        self, *, wait: float = 20, max_messages: int = 10, stop_when_empty: bool = False
    ) -> Generator[Message, None, None]:
        """Messages, one after the other, until stop() or close(); `stop_when_empty`: until a poll of `wait` seconds
        brings none. Fetches `max_messages` at a time, and keeps those that wait their turn from expiring. What was
        fetched and not yielded is given back at the end.
        """
        waiting: list[Message] = []
        failed = False  # the last one went back, and those of its key with it
        try:
            while not self.stopped:
                waiting = list(reversed(self.receive_or_pause(max_messages, wait)))
                if not waiting and stop_when_empty:
                    return
                while waiting and not self.stopped:
                    if failed or waiting[-1].half_over:
                        waiting = self._still_ours(waiting)
                        failed = False
                        continue
                    message = waiting.pop()
                    yield message
                    failed = self.mode == "fifo" and message.settled == "nacked"
        finally:
            if waiting and not self.closed:
                with suppress(StoreUnavailable):
                    self.extend(waiting, 0)

    def _still_ours(self, messages: list[Message]) -> list[Message]:
        """Those that have not expired or gone back, with their timeout anew."""
        seconds = max((message.visibility for message in messages), default=0)
        if self.extend(messages, seconds) == len(messages):
            return messages
        return [message for message in messages if message.extend(seconds)]

    def receive_or_pause(self, max_messages: int, wait: float) -> list[Message]:
        """receive(), where a store that is away is waited for."""
        try:
            return self.receive(max_messages, wait=wait)
        except StoreUnavailable as error:
            log.warning("%s; trying again", error)
            sleep(min(wait, 1.0))
            return []

    # settling

    def ack(self, messages: Iterable[Message], *, connection: Connection | None = None) -> int:
        """Finish deliveries; how many were still ours.

        `connection`: in the caller's transaction, and strict: raises StaleReceipt where one is not ours any more, so
        that the effect rolls back with it.
        """
        chosen = list(messages)
        receipts = [message.receipt for message in chosen]
        if connection is None:
            done = self._settle(self.sql.ack, (self.consumer, receipts, False))
        else:
            with store_errors():
                cursor = connection.execute(self.sql.ack, (self.consumer, receipts, True))
                row = cursor.fetchone()
            done = row[0] if row else 0
        self._mark(chosen, "acked")
        return done

    def nack(
        self,
        messages: Iterable[Message],
        *,
        delay: float | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> int:
        """Give deliveries back: visible again after `delay` seconds, or by the consumer's back-off; `dead`: no more."""
        chosen = list(messages)
        receipts = [message.receipt for message in chosen]
        done = self._settle(self.sql.nack, (self.consumer, receipts, delay, reason, dead))
        self._mark(chosen, "nacked")
        return done

    def extend(self, messages: Iterable[Message], seconds: float) -> int:
        """Keep deliveries invisible for so many seconds from now; how many were still ours. 0 gives them back."""
        chosen = list(messages)
        done = self._settle(self.sql.extend, (self.consumer, [m.receipt for m in chosen], seconds))
        if done == len(chosen):
            for message in chosen:
                message.prolonged(seconds)
        return done

    def publish(
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
            return self._write(self.sql.publish, values)  # once: it would stand there twice
        with store_errors():
            row = (connection.execute(self.sql.publish, values)).fetchone()
        return row[0] if row else 0

    # workers

    def worker(
        self, *, concurrency: int = 1, wait: float = 20, grace: float = 30
    ) -> Callable[[Handler[Message]], Worker]:
        """Decorate what handles a message: its run() handles so many at a time, until stop(), SIGTERM or SIGINT.

        A message is acked when its handler returns, and given back with the consumer's back-off when it raises. Long
        work is extended by itself. Messages of one key that came together are handled one after the other. On a
        signal, handlers get `grace` seconds to end.
        """

        def decorate(handler: Handler[Message]) -> Worker:
            return Worker(self, handler, concurrency, wait, grace)

        return decorate

    def _mark(self, messages: list[Message], state: Literal["acked", "nacked"]) -> None:
        for message in messages:
            message.settled = message.settled or state
