"""Client that reads the log by partition as a member of a stream consumer's group, asynchronous.

`_stream.py` is made from this file by `make client`: change this one.

A batch holds messages of one partition. No other member of the group reads that partition until the batch's offset is
committed or its lease ends. A member may hold several batches. Never moves an offset past a message that is not done.
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
    """Messages of one partition, in order, and the lease of the partition.

    As a context manager it extends its lease. On leaving it commits, or after an error gives the partition back.

    Attributes:
        partition: Number of the partition.
        messages: The messages, at least one.
        receipt: Name of the lease, or None if the caller's transaction holds the partition.
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
        self.messages: list[LogMessage] = [row_message(row[2:], stream._parse_float) for row in rows]
        self._settled = False
        self._lost = False
        self._visibility = lease
        self._ends = asked + lease
        self._done = self.messages[0].seq - 1  # the seq of the last message that messages() yielded and that is done
        self._stream = stream
        self._connection = connection

    def __repr__(self) -> str:
        first, last = self.messages[0].seq, self.messages[-1].seq
        return f"<{type(self).__name__} partition={self.partition} seqs {first} to {last}>"

    def __len__(self) -> int:
        return len(self.messages)

    async def commit(self, seq: int | None = None) -> bool:
        """Commit the offset of the group, free the partition, and return whether the offset moved.

        Args:
            seq: Last seq that is done. None means the last message of the batch.

        Raises:
            StaleReceipt: The lease has ended: another member reads these messages, or will.
            UsageError: `seq` is below the offset or beyond the log.
            StoreUnavailable: The store is still away when the lease ends, or after five minutes.
        """
        seq = self.messages[-1].seq if seq is None else seq
        moved = await self._stream._commit_batch(self, seq, self._connection)
        self._settled = True
        return moved

    async def release(self) -> None:
        """Give the partition back, so that the group reads these messages again at once."""
        if self._connection is None:
            try:
                await self.commit(self.messages[0].seq - 1)
            except StaleReceipt:
                pass  # the partition was given back before
            except StoreUnavailable as error:
                log.warning("%r could not be released, and will be read again when its lease ends: %s", self, error)
        self._settled = True  # with a connection, its transaction holds the partition until it ends

    async def extend(self, seconds: float | None = None) -> None:
        """Keep the lease for so many seconds from now. None means the duration that the lease had so far.

        Raises:
            StaleReceipt: The lease has ended.
            StoreUnavailable: The store is still away when the lease ends, or after five minutes.
        """
        seconds = self._visibility if seconds is None else seconds
        asked = now()
        await self._stream._extend_batch(self, seconds)
        self._visibility, self._ends = seconds, asked + seconds

    @property
    def _half_over(self) -> bool:
        """True if less than half of the lease is left. A batch in the caller's transaction has no lease."""
        return self._connection is None and now() > self._ends - self._visibility / 2

    @property
    def _idle(self) -> bool:
        """True if no lease needs extending: the batch is settled, lost, or in the caller's transaction."""
        return self._settled or self._lost or self._connection is not None

    async def __aenter__(self) -> Self:
        self._stream._keep(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream._let_go(self)
        if self._settled:
            return
        if error is None:
            await self.commit()
        else:
            await self.release()


class AsyncStream(AsyncSessions):
    """One member of a stream consumer's group. Open it with connect() and use it as a context manager.

    Attributes:
        consumer: Name of the consumer.
        mode: Mode of the consumer, "stream".
        lease: Seconds for which a batch holds its partition, unless it is extended.
        poll_interval: Seconds between two looks for messages, or None if the client listens for notifications.
        stopped: True after stop() or close().
        closed: True after close().
    """

    _sql: StreamStatements

    def __init__(self, dsn: str, consumer: str, schema: str, poll_interval: float | None, lease: float) -> None:
        super().__init__(dsn, consumer, poll_interval)
        refuse_bad_time("lease", lease, zero=False)
        self._sql = StreamStatements(schema)
        self.lease = lease
        self._open: set[AsyncBatch] = set()  # the batches that messages() has not finished

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
        """Join the group of a stream consumer, and return the open stream.

        Args:
            dsn: Connection string of the store.
            consumer: Name of a consumer with the mode stream.
            schema: Schema of the store.
            poll_interval: Seconds between two looks for messages, instead of listening for notifications. By default
                the client listens, or looks once a second if it connects through a connection pooler.
            lease: Seconds for which a batch belongs to this member. If the member dies, others continue after that.
            parse_float: Function for numbers that are not integers, such as `decimal.Decimal`, so no digit is lost.

        Raises:
            UsageError: There is no such stream consumer, the role may not read it, or an argument is wrong.
            StoreUnavailable: The store cannot be reached.
        """
        stream = cls(dsn, consumer, schema, poll_interval, lease)
        stream._parse_float = parse_float
        await stream._reader_session()
        return stream

    async def read(
        self, max_messages: int = 100, *, wait: float = 0, connection: Connection | None = None
    ) -> AsyncBatch | None:
        """Return a batch of the least recently read partition that is free and has messages, or None.

        Args:
            max_messages: Largest number of messages in the batch.
            wait: Seconds to wait for a batch. Ignored with `connection`.
            connection: Connection whose transaction holds the partition instead of a lease. The batch's commit() is
                part of the transaction, so reading, effect and offset are one.

        Raises:
            StoreUnavailable: The store is still away when `wait` is over.
            UsageError: `connection` is in autocommit mode outside of a transaction, which would hold the partition, or
                not in UTF-8. Or retention removed messages that the group had not read: seek() continues without them.
        """
        if connection is not None:
            refuse_unfit(connection)
            with store_errors():
                rows = await (
                    await connection.execute(self._sql.read, (self.consumer, max_messages, None), binary=True)
                ).fetchall()
            return AsyncBatch(self, rows, 0, connection, now()) if rows else None
        return await self._until(wait, lambda session: self._read(session, max_messages))

    async def _read(self, session: AsyncSession, max_messages: int) -> AsyncBatch | None:
        asked = now()
        rows = await self._rows(session, self._sql.read, (self.consumer, max_messages, self.lease), rescue=self._rescue)
        return AsyncBatch(self, rows, self.lease, None, asked) if rows else None

    async def _rescue(self, rows: list[tuple[Any, ...]]) -> None:
        receipt, partition, seq = rows[0][:3]
        await self._quietly(lambda: self._write(self._sql.commit, (self.consumer, partition, seq - 1, receipt)))

    def batches(
        self, *, wait: float = 20, max_messages: int = 100, stop_when_empty: bool = False
    ) -> AsyncGenerator[AsyncBatch, None]:
        """Return a generator of batches that ends after stop() or close().

        Use each batch as a context manager, or call its commit(). Otherwise it is read again when its lease ends.

        Args:
            wait: Seconds that a read waits for a batch, at least 1 unless `stop_when_empty` is set.
            max_messages: Largest number of messages in a batch.
            stop_when_empty: Whether to end when `wait` seconds bring no batch.
        """
        self._refuse_unusable()
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
                    log.warning("%s. Trying again", error)
                    await sleep(AWAY)
                continue
            if batch is not None:
                yield batch
            elif stop_when_empty:
                return

    def messages(
        self, *, wait: float = 20, max_messages: int = 100, stop_when_empty: bool = False
    ) -> AsyncGenerator[LogMessage, None]:
        """Return a generator of messages that ends after stop() or close(), with the arguments of batches().

        A message is done when the next one is asked for. After each batch, and at the end, the offset of the last
        message that is done is committed. The lease is extended while you handle a message. A batch whose lease was
        lost is left to the other members.
        """
        batches = self.batches(wait=wait, max_messages=max_messages, stop_when_empty=stop_when_empty)
        return Closing(self._messages(batches))

    async def _messages(self, batches: AsyncGenerator[AsyncBatch, None]) -> AsyncGenerator[LogMessage, None]:
        async for batch in batches:
            self._open.add(batch)
            self._keep(batch)
            try:
                for message in batch.messages:
                    if self.stopped or not await self._is_held(batch):
                        break
                    yield message
                    batch._done = message.seq
            finally:
                await self._finish(batch)

    async def _is_held(self, batch: AsyncBatch) -> bool:
        """Return whether the lease is good. If half of it is over, extend it first."""
        if batch._half_over and not batch._lost:
            await self._renew([batch])
        return not batch._lost

    async def _renew(self, due: list[AsyncBatch]) -> None:
        for batch in due:
            try:
                await batch.extend()
            except (StaleReceipt, StoreUnavailable) as error:
                if not batch._idle:
                    batch._lost = True
                    log.warning("the lease of %r was lost: %s", batch, error)

    def _keep(self, batch: AsyncBatch) -> None:
        """Extend the lease of a batch until let_go()."""
        if not batch._idle:
            self._keeper.hold([batch])

    def _let_go(self, batch: AsyncBatch) -> None:
        """Stop extending the lease of a batch."""
        self._keeper.drop([batch])

    async def _finish(self, batch: AsyncBatch) -> None:
        """Commit the offset of the messages that are done, and give the rest back. Raise nothing."""
        self._open.discard(batch)
        self._let_go(batch)
        if batch._idle or self.closed:
            return
        error = await self._quietly(lambda: batch.commit(batch._done))
        if error is not None:
            log.warning("%r was handled up to %s, but that is not committed: %s", batch, batch._done, error)

    async def _leave(self) -> None:
        for batch in list(self._open):
            await self._finish(batch)

    async def commit(
        self, partition: int, seq: int, receipt: str | None = None, *, connection: Connection | None = None
    ) -> bool:
        """Commit the offset of the group in one partition, and return whether it moved.

        Args:
            partition: Number of the partition.
            seq: Last seq that is done.
            receipt: Receipt of the batch, or None if the partition has no lease.
            connection: Connection in whose transaction the offset is committed.

        Raises:
            StaleReceipt: The lease has ended, or another member has one.
            UsageError: `seq` is below the offset or beyond the log.
        """
        values = (self.consumer, partition, seq, receipt)
        if connection is None:
            return await self._commit(values, now() + (PATIENCE if receipt is None else self.lease))
        with store_errors():
            row = await (await connection.execute(self._sql.commit, values)).fetchone()
        return bool(row and row[0])

    async def _commit_batch(self, batch: AsyncBatch, seq: int, connection: Connection | None) -> bool:
        """Commit the offset of a batch, as AsyncBatch.commit() describes."""
        if connection is not None:
            return await self.commit(batch.partition, seq, connection=connection)
        return await self._commit((self.consumer, batch.partition, seq, batch.receipt), batch._ends)

    async def _commit(self, values: tuple[Any, ...], deadline: float) -> bool:
        """Commit with further attempts. After a lost answer, the offset shows whether the first attempt succeeded."""
        attempts = 0

        async def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            return bool(await self._write(self._sql.commit, values))

        try:
            return await self._again(min(deadline, now() + LONGEST), attempt)
        except StaleReceipt:
            if attempts == 1 or now() > deadline:
                raise
            rows = await self._patiently(self._sql.offset, values[:2], COUNTING)  # only this member can have moved it
            if not rows or rows[0][0] != values[2]:
                raise
            return True

    async def _extend_batch(self, batch: AsyncBatch, seconds: float) -> None:
        """Extend the lease of a batch, as AsyncBatch.extend() describes."""
        values = (self.consumer, batch.partition, batch.receipt, seconds)
        await self._again(min(batch._ends, now() + LONGEST), lambda: self._write(self._sql.extend, values))

    async def seek(self, target: str | int | datetime, partition: int | None = None) -> int:
        """Move the group to another place, end the leases of all members, and return the number of moved partitions.

        Args:
            target: "earliest", "latest", the seq to read next, a time with a zone, or for example "-1h", an hour ago.
            partition: Number of the partition to move. None moves all.

        Raises:
            UsageError: The target is outside of the log, or is a time without a zone.
        """
        if isinstance(target, datetime):
            refuse_no_zone("target", target)
        place = target.isoformat() if isinstance(target, datetime) else str(target)
        return int(await self._once(self._sql.seek, (self.consumer, place, partition), "the group was moved"))

    async def offsets(self) -> list[Standing]:
        """Return the progress of the group in each partition. Call this rarely, because it counts messages."""
        rows = await self._again(now() + PATIENCE, lambda: self._patiently(self._sql.lag, (self.consumer,), COUNTING))
        return [Standing(*row) for row in rows]


def refuse_unfit(connection: Connection) -> None:
    """Raise UsageError for a caller's connection on which a batch cannot be read."""
    if connection.info.encoding != "utf-8":
        raise UsageError(
            f"the connection's client_encoding is {connection.info.parameter_status('client_encoding')}, which lacks"
            " some characters of the log",
            hint="psycopg.connect(dsn, client_encoding='UTF8')",
        )
    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise UsageError(
            "the connection is in autocommit mode and outside of a transaction, so the batch would not be held",
            hint="Put read(), the effect and the batch's commit() inside `with connection.transaction():`.",
        )
