"""Read the log for the lanes of one sink, in a session and a thread of their own.

The thread waits for the server and takes its rows while the event loop shapes and delivers earlier ones. In the event
loop, each 8 kB of the server's answer would cost a turn of the loop, which is half of the time of a row. Never moves an
offset.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from psycopg import OperationalError

from cdcbridge.client._session import Session, open_session
from cdcbridge.database import behind_pooler, libpq, search_path, store_errors
from cdcbridge.errors import StoreUnavailable
from cdcbridge.sinks.log_row import COLUMNS, LogRow, log_row, read_integers

PATIENCE: Final = 60.0  # seconds for the answer to a statement, which may scan messages of other consumers
_LEAVING: Final = 5.0  # seconds to wait for the end of the thread
_PREPARED: Final = {
    b"begin_lane_read": "select wish::text, columns::text, upper_end, partition from begin_lane_read($1, $2, $3)",
    b"scan_lane": f"select {COLUMNS} from scan_lane($1, $2, $3, $4, $5, $6, $7)",  # noqa: S608 - a constant
    b"scan_partition": f"select {COLUMNS} from scan_partition($1, $2, $3, $4, $5, $6)",  # noqa: S608 - a constant
}
# scan_lane() has no SET clauses, so that it is inlined. One plan serves for all reads, and reads along an index.
SETTINGS: Final = {
    "jit": "off",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "random_page_cost": "0",
    "seq_page_cost": "0",
    "plan_cache_mode": "force_generic_plan",
}


class LogSession:
    """A session that is opened when it is first needed and after it was lost. Each sink has one.

    Args:
        dsn: The DSN of the store.
        schema: The schema of the store.
    """

    def __init__(self, dsn: str, schema: str) -> None:
        self._dsn = dsn
        self._schema = schema
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sink-log")
        self._session: Session | None = None  # the thread's
        self._socket: socket.socket | None = None  # the session's, by which a wait is ended
        self._free = asyncio.Lock()  # one lane reads at a time

    async def read(self, consumer: int, lane: int, lanes: int, after: int, most: int) -> list[LogRow]:
        """Return up to `most` messages of a lane after a seq, in order.

        Raises:
            StoreUnavailable: The store cannot be reached.
            CdcbridgeError: Retention dropped messages that the lane had not read.
        """
        loop = asyncio.get_running_loop()
        async with self._free:
            try:
                async with asyncio.timeout(PATIENCE):
                    return await loop.run_in_executor(self._thread, self._read, consumer, lane, lanes, after, most)
            except TimeoutError:
                self._hang_up()
                raise StoreUnavailable(f"store: the server has not answered within {PATIENCE:g} s") from None

    async def close(self) -> None:
        """End the session, also if it waits for a server that does not answer."""
        self._hang_up()
        ended = asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown(wait=False)
        await asyncio.wait([ended], timeout=_LEAVING)

    def _read(self, consumer: int, lane: int, lanes: int, after: int, most: int) -> list[LogRow]:
        session = self._open()
        with store_errors(), libpq.transaction(session.pgconn):
            ((wish, columns, upper_end, partition),) = libpq.rows(
                tuple, session, b"begin_lane_read", consumer, lane, lanes
            )
            if partition is None:
                return libpq.rows(log_row, session, b"scan_lane", lane, lanes, after, most, wish, columns, upper_end)
            return libpq.rows(log_row, session, b"scan_partition", partition, after, most, wish, columns, upper_end)

    def _open(self) -> Session:
        if self._session is None or self._session.gone:
            self._end()
            session = open_session(self._dsn, "cdcbridge sinks, reading", patient=True)
            if session.pooled:
                session.close()
                raise behind_pooler("store", "its sessions have other server processes")
            read_integers(session)
            settings = {**SETTINGS, "search_path": search_path(self._schema)}
            with store_errors():
                for setting, value in settings.items():
                    session.execute("select set_config(%s, %s, false)", (setting, value))
                for name, statement in _PREPARED.items():
                    libpq.prepare(session.pgconn, name, statement)
            self._session, self._socket = session, socket.socket(fileno=os.dup(session.fileno()))
        return self._session

    def _hang_up(self) -> None:
        """End a wait of the thread for the server. libpq itself waits without a limit."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        session, self._session = self._session, None
        line, self._socket = self._socket, None
        if session is not None:
            with contextlib.suppress(OperationalError):
                session.close()
        if line is not None:
            line.close()
