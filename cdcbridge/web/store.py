"""The sessions of the API on the store, with a limit.

Every session is pinned like those of the bridge (database/session.py). The DSN leads to the server itself, and not to
PgBouncer, because sessions are kept and one of them listens. A session that the server has ended is replaced before the
next call, so a restart of the store costs no call. Never runs a statement by itself, except for the first one of a
session.

psycopg_pool opens sessions in the background. While the store is away, a call would wait for its time limit instead of
getting the reason, and after a long outage the next attempt could be minutes away.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any, Final

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from cdcbridge.config import Config
from cdcbridge.database import behind_pooler, conninfo, search_path, store_errors
from cdcbridge.database.session import pin
from cdcbridge.errors import StoreUnavailable

_PATIENCE: Final = 5.0  # seconds for a free session
_LONGEST: Final = "15s"  # a statement that takes longer is ended


class WebSession(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A session with a cursor for all its statements. To make one takes a sixth of the time of a small statement."""

    @cached_property
    def reader(self) -> psycopg.AsyncCursor[tuple[Any, ...]]:
        return self.cursor()


class WebStore:
    """The sessions.

    Args:
        config: The configuration, which has the store and the largest number of sessions.
    """

    def __init__(self, config: Config) -> None:
        self._dsn = config.store_dsn
        self._settings = {"search_path": search_path(config.store.schema_), "statement_timeout": _LONGEST}
        self._most = config.api.connections
        self._places = asyncio.Semaphore(self._most)
        self._free: list[WebSession] = []
        self.in_use = 0  # sessions that are lent

    async def close(self) -> None:
        """Close all sessions that are free."""
        while self._free:
            await self._free.pop().close()

    async def connect(self, name: str = "cdcbridge serve, listening") -> WebSession:
        """Open a session that does not count.

        Args:
            name: Its name in pg_stat_activity.

        Raises:
            StoreUnavailable: The store cannot be reached.
            BehindPooler: The DSN leads to a connection pooler.
        """
        with store_errors():
            session = await WebSession.connect(conninfo(self._dsn, name), autocommit=True)
            try:
                pid = session.info.backend_pid
                row = await (await session.execute(pin(self._settings, pid))).fetchone()
                if row is None or row[0] != pid:
                    raise behind_pooler("store", f"the process of a session is not {pid}, as the pooler calls it")
            except BaseException:
                await session.close()
                raise
            return session

    @asynccontextmanager
    async def session(self) -> AsyncIterator[WebSession]:
        """Lend a session for the duration of a `with` block. A free one is used, or a new one opened.

        Raises:
            StoreUnavailable: The store cannot be reached, or no session became free within five seconds.
        """
        if self._places.locked():
            await self._wait_for_place()
        else:
            await self._places.acquire()  # at once
        self.in_use += 1
        try:
            session = await self._take()
            try:
                with store_errors():
                    yield session
            finally:
                if session.closed or session.info.transaction_status != TransactionStatus.IDLE:
                    await session.close()
                else:
                    self._free.append(session)
        finally:
            self.in_use -= 1
            self._places.release()

    async def _wait_for_place(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._places.acquire()
        except TimeoutError:
            raise StoreUnavailable(
                f"store: all {self._most} sessions have been busy for {_PATIENCE:g} s",
                hint="Start another `serve`, or allow more `api.connections`.",
            ) from None

    async def _take(self) -> WebSession:
        while self._free:
            session = self._free.pop()
            if not _was_ended(session):
                return session
            await session.close()
        return await self.connect("cdcbridge serve")

    async def rows(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a statement.

        Raises:
            CdcbridgeError: The statement failed. The SQLSTATE is that of `__cause__`.
        """
        async with self.session() as session:
            return await (await session.reader.execute(query.encode(), values or None)).fetchall()

    async def records(self, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return the rows of a statement, each as a dictionary by the names of its columns.

        Raises:
            CdcbridgeError: The statement failed.
        """
        async with self.session() as session, session.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(query.encode(), values or None)
            return await cursor.fetchall()

    async def patiently(self, query: str, values: Sequence[Any]) -> None:
        """Run a statement that matters although its caller has gone. While the store is away, try three times."""
        for pause in (0.2, 1.0, None):
            try:
                await self.rows(query, values)
            except StoreUnavailable:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                return

    async def value(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """Return the first value of the first row of a statement."""
        return (await self.rows(query, values))[0][0]


def _was_ended(session: WebSession) -> bool:
    """Return whether the server has ended a free session. This reads the socket, and sends nothing.

    The server sends nothing to a free session but the notice that ends it.
    """
    if session.closed:
        return True
    socket = select.poll()
    socket.register(session.pgconn.socket, select.POLLIN)
    return bool(socket.poll(0))
