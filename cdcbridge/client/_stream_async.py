"""The client of stream consumers, asynchronous: reads the log by partition, as a member of a group.

`_stream.py` is made from this file by `make client`: change this one.

A batch is of one partition, which nobody else of the group reads until its offset is committed or its lease ends. A
member may hold several. Never moves an offset over what its caller has not said to be done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self

from cdcbridge.client._common import LogMessage, Standing, StreamStatements, row_message
from cdcbridge.client._sessions_async import AsyncSessions, Connection
from cdcbridge.client._tasks import sleep
from cdcbridge.database import store_errors
from cdcbridge.errors import StaleReceipt, StoreUnavailable

log: Final = logging.getLogger("cdcbridge.client")


class AsyncBatch:
    """Messages of one partition, in order. As a context manager it commits the offset behind its last message on
    leaving, or gives the partition back where its block raised.
    """

    def __init__(
        self, stream: AsyncStream, rows: list[tuple[Any, ...]], lease: float, connection: Connection | None
    ) -> None:
        self.receipt: str | None = rows[0][0]
        self.partition: int = rows[0][1]
        self.messages: list[LogMessage] = [row_message(row[2:]) for row in rows]
        self.settled = False
        self._stream = stream
        self._lease = lease
        self._ends = time.monotonic() + lease
        self._connection = connection

    def __repr__(self) -> str:
        first, last = self.messages[0].seq, self.messages[-1].seq
        return f"<{type(self).__name__} partition={self.partition} seqs {first} to {last}>"

    def __len__(self) -> int:
        return len(self.messages)

    async def commit(self, seq: int | None = None) -> bool:
        """All up to `seq` (default: its last message) is done, and the partition free; whether the offset moved.

        Raises StaleReceipt where the lease ended: another member reads these messages, or will.
        """
        seq = self.messages[-1].seq if seq is None else seq
        moved = await self._stream.commit(self.partition, seq, self.receipt, connection=self._connection)
        self.settled = True
        return moved

    async def release(self) -> None:
        """Give it back: the group reads it again, at once."""
        if self._connection is None:
            with suppress(StaleReceipt):
                await self.commit(self.messages[0].seq - 1)
        self.settled = True  # else the caller's transaction holds it, until that ends

    async def extend(self, seconds: float | None = None) -> None:
        """Keep the lease for so long from now (default: as long as it was). Raises StaleReceipt where it is over."""
        seconds = self._lease if seconds is None else seconds
        await self._stream.extend(self, seconds)
        self._lease, self._ends = seconds, time.monotonic() + seconds

    @property
    def half_over(self) -> bool:
        """Half of its lease has passed."""
        return self._connection is None and time.monotonic() > self._ends - self._lease / 2

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.settled:
            return
        if error is None:
            await self.commit()
        else:
            await self.release()


class AsyncStream(AsyncSessions):
    """A stream consumer's group, as one member sees it. Made by connect(); a context manager."""

    sql: StreamStatements

    def __init__(self, dsn: str, consumer: str, schema: str, poll_interval: float | None, lease: float) -> None:
        super().__init__(dsn, consumer, poll_interval)
        self.sql = StreamStatements(schema)
        self.lease = lease

    @classmethod
    async def connect(
        cls,
        dsn: str,
        consumer: str,
        *,
        schema: str = "cdcbridge",
        poll_interval: float | None = None,
        lease: float = 30,
    ) -> Self:
        """Join a stream consumer's group in the store `dsn`. Raises UsageError where there is no such consumer,
        StoreUnavailable where the store cannot be reached.

        `lease`: how long (seconds) a batch is this member's; should it die, others go on after that. `poll_interval`:
        look so often (seconds) instead of listening; chosen by itself behind a connection pooler.
        """
        stream = cls(dsn, consumer, schema, poll_interval, lease)
        await stream._reader_session()
        return stream

    async def read(
        self, max_messages: int = 100, *, wait: float = 0, connection: Connection | None = None
    ) -> AsyncBatch | None:
        """Up to `max_messages` of the least recently read partition that is free and has something; None where none has
        within `wait` seconds.

        `connection`: in the caller's transaction, which holds the partition instead of a lease: the batch's commit() is
        part of it, and so reading, effect and offset are one. It does not wait then.
        """
        if connection is not None:
            return await self._read(connection, max_messages, None)
        return await self._until(time.monotonic() + wait, lambda: self._read(None, max_messages, self.lease))

    async def _read(self, given: Connection | None, max_messages: int, lease: float | None) -> AsyncBatch | None:
        values = (self.consumer, max_messages, lease)
        if given is None:
            rows = await self._rows(await self._reader_session(), self.sql.read, values)
        else:
            with store_errors():
                rows = await (await given.execute(self.sql.read, values, binary=True)).fetchall()
        return AsyncBatch(self, rows, lease or 0, given) if rows else None

    async def batches(
        self, *, wait: float = 20, max_messages: int = 100, stop_when_empty: bool = False
    ) -> AsyncGenerator[AsyncBatch, None]:
        """Batches, until stop() or close(); `stop_when_empty`: until `wait` seconds bring none. Use each as a context
        manager, or commit() it; one that is neither is read again when its lease ends.
        """
        while not self.stopped:
            try:
                batch = await self.read(max_messages, wait=wait)
            except StoreUnavailable as error:
                log.warning("%s; trying again", error)
                await sleep(min(wait, 1.0))
                continue
            if batch is not None:
                yield batch
            elif stop_when_empty:
                return

    async def messages(
        self, *, wait: float = 20, max_messages: int = 100, stop_when_empty: bool = False
    ) -> AsyncGenerator[LogMessage, None]:
        """Messages, one after the other. A message is done when the next one is asked for; offsets are committed by the
        batch, and at the end behind the last message that was done. A batch whose lease was lost is left to the others.
        """
        async for batch in self.batches(wait=wait, max_messages=max_messages, stop_when_empty=stop_when_empty):
            done = batch.messages[0].seq - 1
            try:
                for message in batch.messages:
                    if self.stopped:
                        break
                    if batch.half_over:
                        await batch.extend()
                    yield message
                    done = message.seq
            except StaleReceipt as error:
                batch.settled = True
                log.warning("the lease of %r was lost: %s", batch, error)
            finally:
                if not (batch.settled or self.closed):
                    await self._finish(batch, done)

    async def _finish(self, batch: AsyncBatch, seq: int) -> None:
        try:
            await batch.commit(seq)
        except StaleReceipt as error:
            log.warning("%r was handled up to %s, but its lease had ended: %s", batch, seq, error)

    async def commit(
        self, partition: int, seq: int, receipt: str | None = None, *, connection: Connection | None = None
    ) -> bool:
        """All of the partition up to `seq` is done; whether the offset moved. Raises StaleReceipt, or UsageError for a
        seq below the offset or beyond the log.
        """
        values = (self.consumer, partition, seq, receipt)
        if connection is None:
            return bool(await self._write(self.sql.commit, values))
        with store_errors():
            row = await (await connection.execute(self.sql.commit, values)).fetchone()
        return bool(row and row[0])

    async def extend(self, batch: AsyncBatch, seconds: float) -> None:
        """What AsyncBatch.extend() does."""
        await self._write(self.sql.extend, (self.consumer, batch.partition, batch.receipt, seconds))

    async def seek(self, target: str | int | datetime, partition: int | None = None) -> int:
        """Go on from elsewhere, in one partition or all: "earliest", "latest", a seq, or a time; how many partitions.
        Leases of all members end.
        """
        place = target.astimezone().isoformat() if isinstance(target, datetime) else str(target)
        return int(await self._write(self.sql.seek, (self.consumer, place, partition)))

    async def offsets(self) -> list[Standing]:
        """Where the group stands in each partition, and how much it has yet to read. For people: it counts."""
        rows = await self._rows(await self._writer_session(), self.sql.lag, (self.consumer,))
        return [Standing(*row) for row in rows]
