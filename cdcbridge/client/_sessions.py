"""Sessions, further attempts and waiting, which queue and stream clients share, synchronous.

Made from `_sessions.py` by `make client`.

A client has two sessions, and opens them again when they are lost. The reader receives messages and waits for
notifications. The writer settles messages and serves further calls that receive. An ack therefore never waits for a
long poll.

A direct session is pinned once. Through a pooler notifications do not arrive, and the client looks once a second
instead. Each call is then a transaction with settings of its own, because other applications use the same server
session. Never repeats a statement that must not run twice, unless it surely did not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self, TypeAlias, TypeVar

import psycopg
from psycopg.sql import Composed

from cdcbridge.client._common import Base, Statements, due_in
from cdcbridge.client._leases import Keeper
from cdcbridge.client._limits import ANSWER, LEAVING, PATIENCE, Pace, now, refuse_bad_time
from cdcbridge.client._session import PATIENT_HERE, SETTINGS_HERE, Session, open_session
from cdcbridge.client._threads import Cancelled, Lock, acquired, sleep
from cdcbridge.database import store_errors
from cdcbridge.errors import CdcbridgeError, StoreUnavailable

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]
T = TypeVar("T")
Rescue: TypeAlias = Callable[[list[tuple[Any, ...]]], None]
_SLICE: Final = 0.5  # longest time in seconds until stop() is noticed


class Uncertain(StoreUnavailable):
    """The session was lost during a statement that must not run twice."""


class Sessions(Base):
    """Base class of the clients, with their two sessions.

    As a context manager it calls close() on leaving. Subclasses set `_sql`.
    """

    _sql: Statements

    def __init__(self, dsn: str, consumer: str, poll_interval: float | None) -> None:
        super().__init__(dsn, consumer, poll_interval)
        self._reader: Session | None = None
        self._writer: Session | None = None
        self._reading = Lock()
        self._opening = Lock()
        self._calling = Lock()
        self._giving = Lock()  # held while messages are given back
        self._keeper = Keeper(self._renew)

    def close(self) -> None:
        """Stop, give back the messages that a loop or worker fetched and did not begin, and close both sessions.

        A queue gives them back uncounted. A message that is still being handled is delivered again after its timeout. A
        stream commits the offset of the messages that are done. An open batch of batches() or read() is read again
        after its lease. In a forked child the sessions stay open, because they belong to the parent.
        """
        self.stop()
        if self._forked:  # the sessions belong to the parent
            self.closed = True
            return
        self._keeper.close()
        if not self.closed:
            try:
                self._leave()
                if acquired(self._giving, LEAVING):  # another task or thread was giving messages back
                    self._giving.release()
            finally:
                self.closed = True
                # A call that waits for notifications notices the stop before its session is closed.
                if acquired(self._reading, 2 * _SLICE):
                    self._reading.release()
                for session in (self._reader, self._writer):
                    if session is not None:
                        session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # implemented by the subclass

    def _renew(self, due: Any) -> None:
        """Extend leases, and mark the lost ones."""

    def _leave(self) -> None:
        """Give back messages that were fetched and not begun."""

    # attempts

    def _again(self, deadline: float, call: Callable[[], T], *, stoppable: bool = False) -> T:
        """Return the result of the call. While the store is away, make further attempts until the deadline.

        With `stoppable`, stop() ends the attempts, too.
        """
        pace = Pace()
        while True:
            self._refuse_unusable()
            try:
                return call()
            except Uncertain:
                raise
            except StoreUnavailable:
                left = deadline - now()
                if self.closed or left <= 0 or (stoppable and self.stopped):
                    raise
            sleep(min(left, pace.next()))

    def _once(self, query: Composed, values: tuple[Any, ...], what: str) -> Any:
        """Run a statement that must not run twice: repeat it only if it surely did not run."""

        def attempt() -> Any:
            session = self._writer_session()  # if this fails, nothing was sent
            try:
                return self._first(session, query, values)
            except StoreUnavailable as error:
                if not session.closed:
                    raise  # the server answered, so it was rolled back
                raise Uncertain(f"{error}. It is not known whether {what}") from error

        return self._again(now() + PATIENCE, attempt)

    def _quietly(self, call: Callable[[], object]) -> CdcbridgeError | None:
        """Make the call with LEAVING seconds for further attempts. Return its error, if there was one.

        If the task is cancelled meanwhile, the call is made once more before the cancellation continues.
        """
        mine = acquired(self._giving, LEAVING)
        try:
            try:
                self._again(now() + LEAVING, call)
            except Cancelled:
                self._again(now() + LEAVING, call)  # a cancelled task must not lose messages
                raise
        except CdcbridgeError as error:
            return error
        finally:
            if mine:
                self._giving.release()
        return None

    # reading

    def _until(self, wait: float, look: Callable[[Session], T]) -> T:
        """Return the result of `look` as soon as it is not empty, or the last one when `wait` seconds are over.

        A session that is lost meanwhile is opened again.
        """
        refuse_bad_time("wait", wait)
        deadline = now() + wait
        return self._again(deadline, lambda: self._look(deadline, look), stoppable=True)

    def _look(self, deadline: float, look: Callable[[Session], T]) -> T:
        """Look until there is a result, a stop, or the deadline.

        One call at a time uses the reader and waits for notifications. The others look on the writer, and then wait for
        that call to end.
        """
        mine = acquired(self._reading, 0)
        try:
            while True:
                session = self._reader_session() if mine else self._writer_session()
                found = look(session)
                if found or self.stopped or now() >= deadline:
                    return found
                if mine:
                    self._wait(session, deadline)
                while not (mine or self.stopped) and (left := deadline - now()) > 0:
                    mine = acquired(self._reading, min(left, _SLICE))
        finally:
            if mine:
                self._reading.release()

    def _wait(self, session: Session, deadline: float) -> None:
        """Wait for a notification for this consumer, or until the next look is due, or until the deadline.

        A look is due when a timeout, delay or lease ends, because no notification reports that.
        """
        rows = self._rows(session, self._sql.next_due, (self.consumer,))
        until = min(deadline, now() + due_in(rows[0] if rows else None, self.poll_interval))
        while not self.stopped and (left := until - now()) > 0:
            if self.poll_interval is not None:
                sleep(min(left, _SLICE))
                continue
            with store_errors():
                heard = [one.payload for one in session.notifies(timeout=min(left, _SLICE), stop_after=1)]
            if self._meets_new(heard):
                self._learn(session)
            if any(self._concerns(payload) for payload in heard):
                return

    # statements

    def _write(self, query: Composed, values: tuple[Any, ...]) -> Any:
        """Return the first value of a statement that runs on the writer."""
        return self._first(self._writer_session(), query, values)

    def _first(self, session: Session, query: Composed, values: tuple[Any, ...]) -> Any:
        """Return the first value of the first row of a statement, or 0 if there is no row."""
        rows = self._rows(session, query, values)
        return rows[0][0] if rows else 0

    def _rows(
        self, session: Session, query: Composed, values: tuple[Any, ...], rescue: Rescue | None = None
    ) -> list[tuple[Any, ...]]:
        """Return the rows of a statement, in binary, because the text form of a value depends on settings.

        If the caller is cancelled after the statement ended on the server, `rescue` gets the rows.
        """
        cursor = session.cursor(binary=True)
        try:
            with store_errors():
                if session.pooled:
                    with self._calling:
                        self._transaction(session, cursor, query, values)
                else:
                    cursor.execute(query, values)
                return cursor.fetchall()
        except StoreUnavailable as error:
            if isinstance(error.__cause__, psycopg.errors.ReadOnlySqlTransaction | psycopg.errors.FeatureNotSupported):
                session.close()  # the next session may reach a server that accepts writes, with new plans
            raise
        except Exception:
            raise
        except BaseException:
            result = cursor.pgresult
            if rescue is not None and result is not None and result.ntuples and result.nfields:
                rescue(cursor.fetchall())
            raise

    def _transaction(self, session: Session, cursor: Any, query: Composed, values: tuple[Any, ...]) -> None:
        """Run a statement in a transaction through a pooler.

        Four statements are sent in one round trip, so no other call may send one between them.
        """
        try:
            with session.pipeline():
                session.execute("begin isolation level read committed, read write")
                session.execute(PATIENT_HERE if session.patient else SETTINGS_HERE)
                cursor.execute(query, values)
                session.execute("commit")
        except BaseException:
            if not session.closed:
                session.rollback()
            raise

    def _patiently(self, query: Composed, values: tuple[Any, ...], seconds: float) -> list[tuple[Any, ...]]:
        """Return the rows of a statement that may take so many seconds, in a session of its own."""
        self._refuse_unusable()
        session = open_session(self._dsn, "cdcbridge client, counting", patient=True)
        session.limit = max(ANSWER, seconds)
        with session:
            return self._rows(session, query, values)

    # sessions

    def _writer_session(self) -> Session:
        """Return the writer. Open it if there is none, or if the server ended it."""
        if not acquired(self._opening, ANSWER):
            raise StoreUnavailable("store: no session could be opened while another call waits for one")
        try:
            if self._writer is None or self._writer.gone:
                self._refuse_unusable()
                self._writer = open_session(self._dsn, "cdcbridge client, settling")
            return self._writer
        finally:
            self._opening.release()

    def _reader_session(self) -> Session:
        """Return the reader, which listens unless the client polls. Open it if necessary."""
        if self._reader is None or self._reader.gone:
            self._refuse_unusable()
            session = open_session(self._dsn, "cdcbridge client, receiving")
            self._pooled = session.pooled
            try:
                self._learn(session)
                if self.poll_interval is None:
                    with store_errors():
                        session.execute(self._sql.listen)
            except BaseException:
                session.close()
                raise
            self._reader = session
        return self._reader

    def _learn(self, session: Session) -> None:
        """Read the consumer's id and mode from the store."""
        rows = self._rows(session, self._sql.settings, (self.consumer,))
        self._note_consumer(rows[0] if rows else None)
