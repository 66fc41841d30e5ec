"""One session of a client, asynchronous. It limits the wait for an answer, and notices its end while it is idle.

`_session.py` is made from this file by `make client`: change this one.

Never sends a statement by itself but the first one, which pins the settings.
"""

from __future__ import annotations

import select
from typing import Any, Final

import psycopg

from cdcbridge.client._limits import ANSWER, NoAnswer, limited
from cdcbridge.client._tasks import if_unused
from cdcbridge.database import conninfo, store_errors
from cdcbridge.database.session import pin, pin_locally

# Every statement of a client names the schema of its function. A claim must not be committed after its receiver has
# given up, so the server ends a late statement before the client ends the session.
SETTINGS: Final = {"search_path": "pg_catalog, pg_temp", "statement_timeout": f"{ANSWER - 1:g}s"}
PATIENT: Final = {**SETTINGS, "statement_timeout": "0"}
SETTINGS_HERE: Final = pin_locally(SETTINGS)
PATIENT_HERE: Final = pin_locally(PATIENT)


class AsyncSession(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection whose statements raise NoAnswer, and close it, where the server stays silent for `limit` seconds."""

    limit = ANSWER
    patient = False  # its statements may take longer than ANSWER
    pooled = False
    ended = False  # the server said so
    _socket: select.poll | None = None

    async def wait(self, gen: Any, *arguments: Any, **named: Any) -> Any:
        """Wait for the server; psycopg calls this for every exchange."""
        try:
            return await super().wait(limited(gen, self.limit), *arguments, **named)
        except NoAnswer:
            self.pgconn.finish()
            raise

    @property
    def gone(self) -> bool:
        """Whether the server ended the session while it was idle. Reads the socket, and sends nothing."""
        if not self.closed:
            if_unused(self.lock, self._hear)
        return self.closed

    def _hear(self) -> None:
        try:
            if self._socket is None:
                self._socket = select.poll()
                self._socket.register(self.pgconn.socket, select.POLLIN)
            while self._socket.poll(0):
                self.pgconn.consume_input()
                self.pgconn.is_busy()  # reads on, as far as the notice that ends a session
                if self.ended:
                    raise psycopg.OperationalError
        except psycopg.OperationalError:
            self.pgconn.finish()

    def note(self, diagnostic: Any) -> None:
        """Note the notice with which a server ends an idle session."""
        self.ended = self.ended or diagnostic.severity_nonlocalized in {"FATAL", "PANIC"}


async def open_session(dsn: str, name: str, *, patient: bool = False) -> AsyncSession:
    """A session on the store that depends on nothing around it. Raises StoreUnavailable, or UsageError for a bad DSN.

    `patient` removes the time limit of statements.
    """
    with store_errors():
        session = await AsyncSession.connect(conninfo(dsn, name, pooler=True), autocommit=True)
        try:
            pid = session.info.backend_pid
            row = await (await session.execute(pin(PATIENT if patient else SETTINGS, pid))).fetchone()
        except BaseException:
            await session.close()
            raise
    session.add_notice_handler(session.note)
    session.patient = patient
    session.pooled = row is not None and row[0] != pid
    if session.pooled:
        session.prepare_threshold = None  # the next transaction may be another server session's
    return session
