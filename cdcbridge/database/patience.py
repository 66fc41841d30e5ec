"""Run a transaction that waits only briefly for a lock, and otherwise rolls back and tries again.

A session that waits for a lock makes later sessions wait, too. For example, a `drop table` that waits for the
transaction of a receiver would stop every publisher. A transaction that rolls back lets the others continue. Never
waits longer than LOCK_TIMEOUT for a lock. Never gives up without the pid of the holder, unless the watch finds none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import psycopg
import structlog
from psycopg.conninfo import make_conninfo

from cdcbridge.database import Connection
from cdcbridge.database.blockers import BlockerWatch
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.errors import CdcbridgeError, LockedOut

LOCK_TIMEOUT: Final = "500ms"
PATIENCE: Final = 30.0  # seconds
_FIRST_PAUSE: Final = 0.25  # seconds before the second attempt; each later pause is twice as long
_LONGEST_PAUSE: Final = 2.0
_REFUSED: Final = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)
_BEGIN: Final = "select pg_backend_pid(), set_config('lock_timeout', %s, true)"
_BLOCKERS: Final = """
    select array_agg(a.pid order by a.pid),
           string_agg(format('pid %%s (%%s, %%s since %%s, %%s)', a.pid, coalesce(a.usename, '?'),
                             coalesce(a.state, a.backend_type),
                             to_char(coalesce(a.state_change, a.xact_start), 'YYYY-MM-DD HH24:MI:SS TZ'),
                             coalesce(nullif(left(regexp_replace(a.query, '\\s+', ' ', 'g'), 200), ''), 'no query')),
                      '; ' order by a.pid)
    from unnest(pg_blocking_pids(%s)) b (pid) join pg_stat_activity a using (pid)
"""
Result = TypeVar("Result")
log = structlog.get_logger()


def patiently(
    connection: Connection,
    work: Callable[[], Result],
    *,
    what: str,
    again: str = "",
    patience: float | None = None,
) -> Result:
    """Run `work` in a transaction that waits for no lock longer than LOCK_TIMEOUT.

    If the connection is in a transaction already, `work` runs in a savepoint of it. If a lock is not free in time,
    everything is undone and tried again.

    Args:
        connection: The session that runs the transaction.
        work: The function that runs the statements.
        what: The name of the work for people, such as `consumers remove billing`.
        again: The command that continues the work later, or '' if there is none.
        patience: Seconds after which no new attempt begins. None stands for PATIENCE.

    Returns:
        The result of `work`.

    Raises:
        LockedOut: A lock was not free in that time. The message names its holder.
    """
    watch = _Watch(connection)
    deadline, pause = time.monotonic() + (PATIENCE if patience is None else patience), _FIRST_PAUSE
    try:
        while True:
            try:
                with watch, connection.transaction():
                    watch.over(connection.execute(_BEGIN.encode(), (LOCK_TIMEOUT,)).fetchone())
                    return work()
            except _REFUSED as error:
                if time.monotonic() >= deadline:
                    raise _locked_out(what, again, watch, error) from error
            watch.begin(what)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    finally:
        watch.close()


def _locked_out(what: str, again: str, watch: _Watch, error: psycopg.Error) -> LockedOut:
    holders = watch.named or " ".join(str(error.diag.message_primary).split())
    ends = " ".join(f"`select pg_terminate_backend({pid})` ends its session." for pid in watch.pids)
    return LockedOut(
        f"{what} waits for a lock, and nothing was changed: {holders}",
        hint=" ".join(part for part in ("End that transaction.", ends, again and f"Then: {again}") if part),
    )


class _Watch:
    """A watch on the sessions that block the caller's session, from a session of its own.

    The first attempt has no watch. The caller's thread writes `_pid`, a single value. The watching thread writes `pids`
    and `named`, and the caller reads them after that thread has ended.
    """

    def __init__(self, connection: Connection) -> None:
        self._info = connection.info
        self._pid: int | None = None
        self._session: Connection | None = None
        self._attempt: contextlib.ExitStack | None = None
        self._what = ""
        self.named = ""
        self.pids: list[int] = []

    def begin(self, what: str) -> None:
        """Connect before the second attempt. Without a connection no holder is named, and the attempts continue."""
        self._what = what
        if self._session is None:
            info = self._info
            dsn = make_conninfo(
                info.dsn, host=info.host, hostaddr=info.hostaddr or None, port=info.port,
                password=info.password or None, application_name="cdcbridge lock holder",
            )  # fmt: skip
            with contextlib.suppress(CdcbridgeError):
                self._session = connect_for_calls(dsn, "pg_catalog", "cdcbridge")

    def over(self, row: tuple[Any, ...] | None) -> None:
        """Watch the server process whose transaction has just begun.

        A connection pooler gives each transaction another server process.
        """
        self._pid = row[0] if row else None

    def __enter__(self) -> None:
        self._attempt = contextlib.ExitStack()
        if self._session is not None:
            looks = BlockerWatch("lock-watch", self._session, lambda: self._pid, _BLOCKERS, self._found, interval=0.1)
            self._attempt.enter_context(looks)

    def __exit__(self, *details: object) -> None:
        if self._attempt is not None:
            self._attempt.close()
        self._pid = None

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _found(self, pids: list[int], named: str) -> None:
        if not pids:
            return
        if pids != self.pids:
            log.warning("lock.waits", command=self._what, held_by=named)
        self.pids, self.named = pids, named
