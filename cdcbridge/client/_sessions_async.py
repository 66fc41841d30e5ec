"""What the clients of queues and streams share, asynchronous: sessions that are made anew where they were lost,
waiting.

`_sessions.py` is made from this file by `make client`: change this one.

Two sessions: one reads and waits, one settles, so that an ack never stands behind a long poll. Waits for notifications,
not for time; behind a pooler, where notifications do not arrive, it looks every now and then instead. A direct session
sets what its statements depend on once. Behind a pooler each call is a transaction that sets it for itself, since the
server's session is also used by other applications.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self, TypeAlias, TypeVar

import psycopg
from psycopg.sql import Composed

from cdcbridge.client._common import Base, Pace, Statements, due_in
from cdcbridge.client._tasks import Lock, sleep
from cdcbridge.database import conninfo, store_errors
from cdcbridge.errors import StoreUnavailable
from cdcbridge.session import pin, pin_locally

Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]
T = TypeVar("T")
# Every statement of a client names the schema of its function.
SETTINGS: Final = {"search_path": "pg_catalog, pg_temp"}
SETTINGS_HERE: Final = pin_locally(SETTINGS)


class AsyncSessions(Base):
    """A client's two sessions; a context manager. `sql` is the subclass's."""

    sql: Statements

    def __init__(self, dsn: str, consumer: str, poll_interval: float | None) -> None:
        super().__init__(dsn, consumer, poll_interval)
        self._reader: Connection | None = None
        self._writer: Connection | None = None
        self._reading = Lock()
        self._opening = Lock()
        self._calling = Lock()

    async def close(self) -> None:
        """Stop, and close both sessions. What was received and not settled comes again after its timeout."""
        self.stop()
        self.closed = True
        for connection in (self._reader, self._writer):
            if connection is not None:
                await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _until(self, deadline: float, look: Callable[[], Awaitable[T]]) -> T:
        """What `look` finds, once that is something or the deadline has come; a lost session is made anew meanwhile."""
        pace = Pace()
        while True:
            try:
                async with self._reading:
                    found = await look()
                    if found or self.stopped or time.monotonic() >= deadline:
                        return found
                    await self._wait(deadline)
            except StoreUnavailable:
                left = deadline - time.monotonic()
                if self.stopped or left <= 0:
                    raise
                await sleep(min(left, pace.next()))

    async def _wait(self, deadline: float) -> None:
        """Until a notification for this consumer, a timeout or delay of its own that ends, or the deadline."""
        connection = await self._reader_session()
        with store_errors():
            rows = await self._rows(connection, self.sql.next_due, (self.consumer,))
            until = min(deadline, time.monotonic() + due_in(rows[0] if rows else None, self.poll_interval))
            while not self.stopped and (left := until - time.monotonic()) > 0:
                if self.poll_interval is not None:
                    await sleep(min(left, 0.5))
                    continue
                async for notify in connection.notifies(timeout=min(left, 0.5), stop_after=1):
                    if self.concerns(notify.payload):
                        return

    async def _settle(self, query: Composed, values: tuple[Any, ...]) -> int:
        """One statement of the writing session, again where that was lost: each of them may run twice."""
        try:
            return await self._write(query, values)
        except StoreUnavailable:
            return await self._write(query, values)

    async def _write(self, query: Composed, values: tuple[Any, ...]) -> int:
        rows = await self._rows(await self._writer_session(), query, values)
        return rows[0][0] if rows else 0

    async def _rows(self, connection: Connection, query: Composed, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """A statement's rows, in binary: what they look like as text depends on settings."""
        with store_errors():
            if not self.pooled:
                return await (await connection.execute(query, values, binary=True)).fetchall()
            async with self._calling:
                return await self._transaction(connection, query, values)

    async def _transaction(
        self, connection: Connection, query: Composed, values: tuple[Any, ...]
    ) -> list[tuple[Any, ...]]:
        """A statement behind a pooler: four in one round trip, so no other call may come between them."""
        try:
            async with connection.pipeline():
                await connection.execute("begin isolation level read committed, read write")
                await connection.execute(SETTINGS_HERE)
                cursor = await connection.execute(query, values, binary=True)
                await connection.execute("commit")
            return await cursor.fetchall()
        except BaseException:
            if not connection.closed:
                await connection.rollback()
            raise

    async def _writer_session(self) -> Connection:
        async with self._opening:
            if self._writer is None or self._writer.closed:
                self._writer = await self._open("cdcbridge client, settling")
            return self._writer

    async def _reader_session(self) -> Connection:
        if self._reader is None or self._reader.closed:
            connection = await self._open("cdcbridge client, receiving")
            try:
                rows = await self._rows(connection, self.sql.settings, (self.consumer,))
                self.learn(rows[0] if rows else None)
                if self.poll_interval is None:
                    with store_errors():
                        await connection.execute(self.sql.listen)
            except BaseException:
                await connection.close()
                raise
            self._reader = connection
        return self._reader

    async def _open(self, name: str) -> Connection:
        with store_errors():
            connection = await psycopg.AsyncConnection.connect(conninfo(self.dsn, name, pooler=True), autocommit=True)
            try:
                pid = connection.info.backend_pid
                row = await (await connection.execute(pin(SETTINGS, pid))).fetchone()
            except BaseException:
                await connection.close()
                raise
        self.pooled = row is not None and row[0] != pid
        if self.pooled:
            connection.prepare_threshold = None  # the next transaction may be another server session's
        return connection
