"""One session of a client, asynchronous.

`_session.py` is made from this file by `make client`: change this one.

A session limits the wait for an answer, and notices that the server ended it while it was idle. Never sends a statement
by itself, except for the first one, which pins the settings.
"""

from __future__ import annotations

import select
from typing import Any, Final

import psycopg

from cdcbridge.client._limits import ANSWER, NoAnswer, limited
from cdcbridge.client._tasks import if_unused
from cdcbridge.database import conninfo, store_errors
from cdcbridge.database.session import pin, pin_locally

# Every statement of a client names the schema of its function, so the search path needs no other schema. A claim must
# not be committed after its receiver has given up, so the server ends a late statement before the client closes the
# session.
SETTINGS: Final = {"search_path": "pg_catalog, pg_temp", "statement_timeout": f"{ANSWER - 1:g}s"}
PATIENT: Final = {**SETTINGS, "statement_timeout": "0"}
SETTINGS_HERE: Final = pin_locally(SETTINGS)
PATIENT_HERE: Final = pin_locally(PATIENT)


class AsyncSession(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection that is closed if the server stays silent for `limit` seconds.

    The statement that waits for an answer then raises NoAnswer.
    """

    limit = ANSWER
    patient = False  # its statements may take longer than ANSWER
    pooled = False
    ended = False  # the server reported the end of the session
    _socket: select.poll | None = None

    async def wait(self, gen: Any, *arguments: Any, **named: Any) -> Any:
        """Wait for the server. psycopg calls this method for every exchange."""
        try:
            return await super().wait(limited(gen, self.limit), *arguments, **named)
        except NoAnswer:
            self.pgconn.finish()
            raise

    @property
    def gone(self) -> bool:
        """True if the session is closed, or was ended by the server while it was idle.

        The property reads the socket and sends nothing. If a call is using the session, the socket is left to that
        call.
        """
        if not self.closed:
            if_unused(self.lock, self._hear)
        return self.closed

    def _hear(self) -> None:
        """Read the bytes that arrived while the session was idle, and close the session if it was ended."""
        try:
            if self._socket is None:
                self._socket = select.poll()
                self._socket.register(self.pgconn.socket, select.POLLIN)
            while self._socket.poll(0):
                self.pgconn.consume_input()
                self.pgconn.is_busy()  # parses the bytes, up to the notice that ends a session
                if self.ended:
                    raise psycopg.OperationalError
        except psycopg.OperationalError:
            self.pgconn.finish()

    def note(self, diagnostic: Any) -> None:
        """Note whether this notice is the one with which a server ends an idle session."""
        self.ended = self.ended or diagnostic.severity_nonlocalized in {"FATAL", "PANIC"}


async def open_session(dsn: str, name: str, *, patient: bool = False) -> AsyncSession:
    """Open a session on the store that is independent of settings of the server, the role and the environment.

    Args:
        dsn: Connection string of the store.
        name: Application name of the session.
        patient: Whether to remove the time limit of statements.

    Raises:
        StoreUnavailable: The store cannot be reached.
        UsageError: The DSN is wrong.
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
        session.prepare_threshold = None  # the next transaction may run in another server session
    return session
