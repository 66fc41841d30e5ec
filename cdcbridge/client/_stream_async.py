"""The client of stream consumers, asynchronous: reads the log by partition, as a member of a group.

`_stream.py` is made from this file by `make client`: change this one.

A batch is of one partition, which nobody else of the group reads until its offset is committed or its lease ends. A
member may hold several. Never moves an offset over what its caller has not said to be done.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self

from psycopg.pq import TransactionStatus

from cdcbridge.client._common import LogMessage, Standing, StreamStatements, row_message
from cdcbridge.client._contents import ParseFloat
from cdcbridge.client._limits import AWAY, COUNTING, LONGEST, PATIENCE, now, patient, refuse_bad_time, refuse_no_zone
from cdcbridge.client._session_async import AsyncSession
from cdcbridge.client._sessions_async import AsyncSessions, Connection
from cdcbridge.client._tasks import Closing, sleep
from cdcbridge.database import store_errors
from cdcbridge.errors import ClientClosed, StaleReceipt, StoreUnavailable, UsageError

log: Final = logging.getLogger("cdcbridge.client")


class AsyncBatch:
    """Messages of one partition, in order. As a context manager it keeps its lease while its block runs, and commits
    the offset behind its last message on leaving, or gives the partition back where its block raised.
    """

    def __init__(
        self,
        stream: AsyncStream,
        rows: list[tuple[Any, ...]],
        lease: float,
        connection: Connection | None,
        asked: float,
    ) -> None:
        self.receipt: str | None = rows[0][0]
        self.partition: int = rows[0][1]
        self.messages: list[LogMessage] = [row_message(row[2:], stream.parse_float) for row in rows]
        self.settled = False
        self.lost = False
        self.visibility = lease
        self.ends = asked + lease
        self.done = self.messages[0].seq - 1  # the last message that messages() yielded and that is handled
        self._stream = stream
        self._connection = connection

    def __repr__(self) -> str:
        first, last = self.messages[0].seq, self.messages[-1].seq
        return f"<{type(self).__name__} partition={self.partition} seqs {first} to {last}>"

    def __len__(self) -> int:
        return len(self.messages)

    async def commit(self, seq: int | None = None) -> bool:
        """All up to `seq` (default: its last message) is done, and the partition free; whether the offset moved. Tries
        again until the lease ends.

        Raises StaleReceipt where the lease ended: another member reads these messages, or will.
        """
        seq = self.messages[-1].seq if seq is None else seq
        moved = await self._stream.commit_batch(self, seq, self._connection)
        self.settled = True
        return moved

    async def release(self) -> None:
        """Give it back: the group reads it again, at once."""
        if self._connection is None:
            try:
                await self.commit(self.messages[0].seq - 1)
            except StaleReceipt:
                pass  # it went back before
            except StoreUnavailable as error:
                log.warning("%r could not be given back, and is read again when its lease ends: %s", self, error)
        self.settled = True  # else the caller's transaction holds it, until that ends

    async def extend(self, seconds: float | None = None) -> None:
        """Keep the lease for so long from now (default: as long as it was). Raises StaleReceipt where it is over."""
        seconds = self.visibility if seconds is None else seconds
        asked = now()
        await self._stream.extend(self, seconds)
        self.visibility, self.ends = seconds, asked + seconds

    @property
    def half_over(self) -> bool:
        """Half of its lease has passed."""
        return self._connection is None and now() > self.ends - self.visibility / 2

    @property
    def idle(self) -> bool:
        """Whether its lease need not be extended: the offset is committed, or the lease is lost."""
        return self.settled or self.lost or self._connection is not None

    async def __aenter__(self) -> Self:
        self._stream.keep(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.let_go(self)
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
        refuse_bad_time("lease", lease, zero=False)
        self.sql = StreamStatements(schema)
        self.lease = lease
        self._open: set[AsyncBatch] = set()  # those of messages()

    @classmethod
    async def connect(
        cls,
        dsn: str,
        consumer: str,
        *,
        schema: str = "cdcbridge",
        poll_interval: float | None = None,
        lease: float = 30,
        parse_float: ParseFloat | None = None,
    ) -> Self:
        """Join a stream consumer's group in the store `dsn`. Raises UsageError where there is no such consumer,
        StoreUnavailable where the store cannot be reached.

        `lease`: how long (seconds) a batch is this member's; should it die, others go on after that. `poll_interval`:
        look so often (seconds) instead of listening; chosen by itself behind a connection pooler. `parse_float`: makes
        the numbers that are no integers, for example `decimal.Decimal`, so that no number loses a digit.
        """
        stream = cls(dsn, consumer, schema, poll_interval, lease)
        stream.parse_float = parse_float
        await stream._reader_session()
        return stream

    async def read(
        self, max_messages: int = 100, *, wait: float = 0, connection: Connection | None = None
    ) -> AsyncBatch | None:
        """Up to `max_messages` of the least recently read partition that is free and has something; None where none has
        within `wait` seconds.

        `connection`: in the caller's transaction, which holds the partition instead of a lease: the batch's commit() is
        part of it, and so reading, effect and offset are one. It does not wait then. Raises UsageError where there is
        no transaction: nobody would hold the partition, and another member would read the same messages.
        """
        if connection is not None:
            refuse_unfit(connection)
            with store_errors():
                rows = await (
                    await connection.execute(self.sql.read, (self.consumer, max_messages, None), binary=True)
                ).fetchall()
            return AsyncBatch(self, rows, 0, connection, now()) if rows else None
        return await self._until(wait, lambda session: self._read(session, max_messages))

    async def _read(self, session: AsyncSession, max_messages: int) -> AsyncBatch | None:
        asked = now()
        rows = await self._rows(session, self.sql.read, (self.consumer, max_messages, self.lease), rescue=self._rescue)
        return AsyncBatch(self, rows, self.lease, None, asked) if rows else None

    async def _rescue(self, rows: list[tuple[Any, ...]]) -> None:
        receipt, partition, seq = rows[0][:3]
        values = (self.consumer, partition, seq - 1, receipt)
        await self._quietly(lambda: self._write(self.sql.commit, values))

    def batches(
        self, *, wait: float = 20, max_messages: int = 100, stop_when_empty: bool = False
    ) -> AsyncGenerator[AsyncBatch, None]:
        """Batches, until stop() or close(); `stop_when_empty`: until `wait` seconds bring none. Use each as a context
        manager, or commit() it; one that is neither is read again when its lease ends.
        """
        self.refuse_unusable()
        refuse_bad_time("wait", wait)
        return self._batches(patient(wait, stop_when_empty), max_messages, stop_when_empty)

    async def _batches(self, wait: float, max_messages: int, stop_when_empty: bool) -> AsyncGenerator[AsyncBatch, None]:
        while not self.stopped:
            try:
                batch = await self.read(max_messages, wait=wait)
            except ClientClosed:
                return
            except StoreUnavailable as error:
                if not self.stopped:
                    log.warning("%s; trying again", error)
                    await sleep(AWAY)
                continue
            if batch is not None:
                yield batch
            elif stop_when_empty:
                return

    def messages(
        self, *, wait: float = 20, max_messages: int = 100, stop_when_empty: bool = False
    ) -> AsyncGenerator[LogMessage, None]:
        """Messages, one after the other. A message is done when the next one is asked for; offsets are committed by the
        batch, and at the end behind the last message that was done. The lease is kept while you handle a message; a
        batch whose lease was lost is left to the others.
        """
        batches = self.batches(wait=wait, max_messages=max_messages, stop_when_empty=stop_when_empty)
        return Closing(self._messages(batches))

    async def _messages(self, batches: AsyncGenerator[AsyncBatch, None]) -> AsyncGenerator[LogMessage, None]:
        async for batch in batches:
            self._open.add(batch)
            self.keep(batch)
            try:
                for message in batch.messages:
                    if self.stopped or not await self._is_held(batch):
                        break
                    yield message
                    batch.done = message.seq
            finally:
                await self._finish(batch)

    async def _is_held(self, batch: AsyncBatch) -> bool:
        """Whether the lease is good. If half of it is over, the server is asked first."""
        if batch.half_over and not batch.lost:
            await self._renew([batch])
        return not batch.lost

    async def _renew(self, due: list[AsyncBatch]) -> None:
        for batch in due:
            try:
                await batch.extend()
            except (StaleReceipt, StoreUnavailable) as error:
                if not batch.idle:
                    batch.lost = True
                    log.warning("the lease of %r was lost: %s", batch, error)

    def keep(self, batch: AsyncBatch) -> None:
        """Extend its lease until let_go()."""
        if not batch.idle:
            self._keeper.hold([batch])

    def let_go(self, batch: AsyncBatch) -> None:
        """Stop extending its lease."""
        self._keeper.drop([batch])

    async def _finish(self, batch: AsyncBatch) -> None:
        """Commit the offset of the handled messages, and give the rest back. Raises nothing."""
        self._open.discard(batch)
        self.let_go(batch)
        if batch.idle or self.closed:
            return
        error = await self._quietly(lambda: batch.commit(batch.done))
        if error is not None:
            log.warning("%r was handled up to %s, which is not committed: %s", batch, batch.done, error)

    async def _leave(self) -> None:
        for batch in list(self._open):
            await self._finish(batch)

    async def commit(
        self, partition: int, seq: int, receipt: str | None = None, *, connection: Connection | None = None
    ) -> bool:
        """All of the partition up to `seq` is done; whether the offset moved. Raises StaleReceipt, or UsageError for a
        seq below the offset or beyond the log.
        """
        values = (self.consumer, partition, seq, receipt)
        if connection is None:
            return await self._commit(values, now() + (PATIENCE if receipt is None else self.lease))
        with store_errors():
            row = await (await connection.execute(self.sql.commit, values)).fetchone()
        return bool(row and row[0])

    async def commit_batch(self, batch: AsyncBatch, seq: int, connection: Connection | None) -> bool:
        """What AsyncBatch.commit() does."""
        if connection is not None:
            return await self.commit(batch.partition, seq, connection=connection)
        return await self._commit((self.consumer, batch.partition, seq, batch.receipt), batch.ends)

    async def _commit(self, values: tuple[Any, ...], deadline: float) -> bool:
        """Commit with further attempts. After a lost answer, the offset shows whether the first attempt succeeded."""
        attempts = 0

        async def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            return bool(await self._write(self.sql.commit, values))

        try:
            return await self._again(min(deadline, now() + LONGEST), attempt)
        except StaleReceipt:
            if attempts == 1 or now() > deadline:
                raise
            # Nobody else can have moved it under this lease.
            rows = await self._patiently(self.sql.offset, values[:2], COUNTING)
            if not rows or rows[0][0] != values[2]:
                raise
            return True

    async def extend(self, batch: AsyncBatch, seconds: float) -> None:
        """What AsyncBatch.extend() does."""
        values = (self.consumer, batch.partition, batch.receipt, seconds)
        await self._again(min(batch.ends, now() + LONGEST), lambda: self._write(self.sql.extend, values))

    async def seek(self, target: str | int | datetime, partition: int | None = None) -> int:
        """Continue from elsewhere, in one partition or all: "earliest", "latest", a seq, a time with a zone, or "-1h",
        an hour ago; how many partitions. Leases of all members end. Raises UsageError for a time without a zone.
        """
        if isinstance(target, datetime):
            refuse_no_zone("target", target)
        place = target.isoformat() if isinstance(target, datetime) else str(target)
        return int(await self._once(self.sql.seek, (self.consumer, place, partition), "the group was moved"))

    async def offsets(self) -> list[Standing]:
        """Where the group stands in each partition, and how much it has yet to read. For people: it counts."""
        rows = await self._again(now() + PATIENCE, lambda: self._patiently(self.sql.lag, (self.consumer,), COUNTING))
        return [Standing(*row) for row in rows]


def refuse_unfit(connection: Connection) -> None:
    """Raise UsageError for a caller's connection on which a batch cannot be read."""
    if connection.info.encoding != "utf-8":
        raise UsageError(
            f"the connection's client_encoding is {connection.info.parameter_status('client_encoding')}, which does not"
            " have all characters of the log",
            hint="psycopg.connect(dsn, client_encoding='UTF8')",
        )
    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise UsageError(
            "the connection is in autocommit mode and outside of a transaction, so nothing would hold the batch",
            hint="Put read(), the effect and the batch's commit() inside `with connection.transaction():`.",
        )
