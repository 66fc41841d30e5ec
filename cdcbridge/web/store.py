"""The sessions of the API on the store: a pool with a limit.

Every session is pinned like those of the bridge (database/session.py). The DSN leads to the server itself, and not to
PgBouncer, because the pool keeps sessions and one of them listens. Never runs a statement by itself, except for the
first one of a session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from cdcbridge.config import Config
from cdcbridge.database import behind_pooler, conninfo, search_path, store_errors
from cdcbridge.database.session import pin
from cdcbridge.errors import StoreUnavailable

Session: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]
_PATIENCE: Final = 5.0  # seconds for a session of the pool
_LONGEST: Final = "15s"  # a statement that takes longer is ended


class WebStore:
    """The pool.

    Args:
        config: The configuration, which has the store and the largest number of sessions.
    """

    def __init__(self, config: Config) -> None:
        self._dsn = config.store_dsn
        self._settings = {"search_path": search_path(config.store.schema_), "statement_timeout": _LONGEST}
        self._pool: AsyncConnectionPool[Session] = AsyncConnectionPool(
            conninfo(self._dsn, "cdcbridge serve"),
            kwargs={"autocommit": True},
            configure=self._pin,
            min_size=0,
            max_size=config.api.connections,
            timeout=_PATIENCE,
            open=False,
        )

    async def open(self) -> None:
        """Open the pool, which connects when a call needs a session."""
        await self._pool.open()

    async def close(self) -> None:
        """Close all sessions."""
        await self._pool.close()

    async def _pin(self, session: Session) -> None:
        pid = session.info.backend_pid
        row = await (await session.execute(pin(self._settings, pid))).fetchone()
        if row is None or row[0] != pid:
            raise behind_pooler("store", f"the server process of a session is not {pid}, as the pooler calls it")

    async def connect(self) -> Session:
        """Open a session that does not belong to the pool, for notifications."""
        with store_errors():
            session: Session = await psycopg.AsyncConnection.connect(
                conninfo(self._dsn, "cdcbridge serve, listening"), autocommit=True
            )
            try:
                await self._pin(session)
            except BaseException:
                await session.close()
                raise
            return session

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Lend a session of the pool for the duration of a `with` block.

        Raises:
            StoreUnavailable: The store cannot be reached, or no session became free within five seconds.
        """
        with store_errors():
            try:
                async with self._pool.connection() as session:
                    yield session
            except PoolTimeout as error:
                raise StoreUnavailable(
                    f"store: no session within {_PATIENCE:g} s",
                    hint="The store is away, or all sessions of api.connections are busy.",
                ) from error

    async def rows(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a statement.

        Raises:
            CdcbridgeError: The statement failed. The SQLSTATE is that of `__cause__`.
        """
        async with self.session() as session:
            return await (await session.execute(query.encode(), values or None)).fetchall()

    async def value(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """Return the first value of the first row of a statement."""
        return (await self.rows(query, values))[0][0]
