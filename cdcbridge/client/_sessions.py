"""What the clients of queues and streams share, asynchronous: sessions that are made anew where they were lost, further
attempts, waiting.

Made from `_sessions.py` by `make client`.

Two sessions: one reads and waits for notifications, one settles and serves further readers. So an ack never waits for a
long poll. Through a pooler notifications do not arrive, and the client looks once a second instead. A direct session is
pinned once. Through a pooler each call is a transaction with settings of its own, since the server's session is also
used by other applications.
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
_SLICE: Final = 0.5  # seconds in which stop() is noticed


class Uncertain(StoreUnavailable):
    """The session was lost while a statement ran that must not run twice."""


class Sessions(Base):
    """A client's two sessions; a context manager. `sql` is the subclass's."""

    sql: Statements

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
        """Stop, give back what was fetched and not begun, and close both sessions. What is being handled comes again
        after its timeout.
        """
        self.stop()
        if self.forked:  # they are the parent's
            self.closed = True
            return
        self._keeper.close()
        if not self.closed:
            try:
                self._leave()
                if acquired(self._giving, LEAVING):  # another task or thread had begun to
                    self._giving.release()
            finally:
                self.closed = True
                # A call that waits for notifications notices the stop first.
                if acquired(self._reading, 2 * _SLICE):
                    self._reading.release()
                for session in (self._reader, self._writer):
                    if session is not None:
                        session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the subclass's

    def _renew(self, due: Any) -> None:
        """Prolong leases; mark the lost ones."""

    def _leave(self) -> None:
        """Give back messages that were fetched and not begun."""

    # attempts

    def _again(self, deadline: float, call: Callable[[], T], *, stoppable: bool = False) -> T:
        """Return the result of the call. While the store is away, make further attempts until the deadline."""
        pace = Pace()
        while True:
            self.refuse_unusable()
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
            session = self._writer_session()  # where this fails, nothing was sent
            try:
                return self._first(session, query, values)
            except StoreUnavailable as error:
                if not session.closed:
                    raise  # the server answered, so it was rolled back
                raise Uncertain(f"{error}; whether {what} is not known") from error

        return self._again(now() + PATIENCE, attempt)

    def _quietly(self, call: Callable[[], object]) -> CdcbridgeError | None:
        """Make the call with little time for further attempts. Returns its error, if there was one."""
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
        """What `look` finds, once that is something or `wait` is over; a lost session is made anew meanwhile."""
        refuse_bad_time("wait", wait)
        deadline = now() + wait
        return self._again(deadline, lambda: self._look(deadline, look), stoppable=True)

    def _look(self, deadline: float, look: Callable[[Session], T]) -> T:
        """One call waits for notifications, on the reader. Others look on the writer, and then wait for that call."""
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
        """Until a notification for this consumer, a timeout or delay of its own that ends, or the deadline."""
        rows = self._rows(session, self.sql.next_due, (self.consumer,))
        until = min(deadline, now() + due_in(rows[0] if rows else None, self.poll_interval))
        while not self.stopped and (left := until - now()) > 0:
            if self.poll_interval is not None:
                sleep(min(left, _SLICE))
                continue
            with store_errors():
                heard = [one.payload for one in session.notifies(timeout=min(left, _SLICE), stop_after=1)]
            if self.meets_new(heard):
                self._learn(session)
            if any(self.concerns(payload) for payload in heard):
                return

    # statements

    def _write(self, query: Composed, values: tuple[Any, ...]) -> Any:
        return self._first(self._writer_session(), query, values)

    def _first(self, session: Session, query: Composed, values: tuple[Any, ...]) -> Any:
        rows = self._rows(session, query, values)
        return rows[0][0] if rows else 0

    def _rows(
        self, session: Session, query: Composed, values: tuple[Any, ...], rescue: Rescue | None = None
    ) -> list[tuple[Any, ...]]:
        """A statement's rows, in binary: what they look like as text depends on settings.

        `rescue` gets the rows of a statement that had ended on the server when the caller was cancelled.
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
                session.close()  # the next one may come to a server that takes writes, and has new plans
            raise
        except Exception:
            raise
        except BaseException:
            result = cursor.pgresult
            if rescue is not None and result is not None and result.ntuples and result.nfields:
                rescue(cursor.fetchall())
            raise

    def _transaction(self, session: Session, cursor: Any, query: Composed, values: tuple[Any, ...]) -> None:
        """A statement behind a pooler: four in one round trip, so no other call may come between them."""
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
        self.refuse_unusable()
        session = open_session(self.dsn, "cdcbridge client, counting", patient=True)
        session.limit = max(ANSWER, seconds)
        with session:
            return self._rows(session, query, values)

    # sessions

    def _writer_session(self) -> Session:
        if not acquired(self._opening, ANSWER):
            raise StoreUnavailable("store: another call waits for a session in vain")
        try:
            if self._writer is None or self._writer.gone:
                self.refuse_unusable()
                self._writer = open_session(self.dsn, "cdcbridge client, settling")
            return self._writer
        finally:
            self._opening.release()

    def _reader_session(self) -> Session:
        if self._reader is None or self._reader.gone:
            self.refuse_unusable()
            session = open_session(self.dsn, "cdcbridge client, receiving")
            self.pooled = session.pooled
            try:
                self._learn(session)
                if self.poll_interval is None:
                    with store_errors():
                        session.execute(self.sql.listen)
            except BaseException:
                session.close()
                raise
            self._reader = session
        return self._reader

    def _learn(self, session: Session) -> None:
        rows = self._rows(session, self.sql.settings, (self.consumer,))
        self.learn(rows[0] if rows else None)
