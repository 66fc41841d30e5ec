"""Decide which bridge leads, by a lock that it holds in a session of its own on the store.

That session runs a statement twice a second, as a sign that the leader is alive. If a bridge dies, its connection ends,
and the lock is free. A bridge that was cut off or stopped (SIGSTOP, a frozen machine) gives no sign any more. Then a
standby ends its session, so the standby takes over within five seconds.

A sign of life writes nothing, so that an old snapshot on the store cannot slow it down. This lock does not keep an
evicted leader from appending, because that leader does not know yet that it was evicted. The fence of the epoch does
(store/log.py).
"""

from __future__ import annotations

from typing import Final

import psycopg
import structlog

from cdcbridge.background import Background
from cdcbridge.database import BRIDGE_SESSION, connect_store, cut_off, store_errors
from cdcbridge.errors import Fenced, StoreUnavailable
from cdcbridge.mailbox import Mailbox

SIGN_INTERVAL: Final = 0.5
SILENCE: Final = 2.5  # seconds without a sign of life, after which a standby takes over
# The sign of life is a column of pg_stat_activity, which never changes in a session without track_activities.
_SESSION: Final = {**BRIDGE_SESSION, "track_activities": "on", "lock_timeout": "1s"}
# Every bridge holds this lock, also a standby, so that `uninstall` finds the bridges of this schema.
PRESENT: Final = "select pg_try_advisory_lock_shared('leaders'::regclass::oid::int, 2)"
_NEWEST: Final = "select epoch, holder from leaders order by epoch desc limit 1"
log = structlog.get_logger()


class Lead(Background):
    """The right to lead: call try_take() until it succeeds, and keep the lead until release().

    The file of fileno() becomes readable when the lead is lost, or when the holder has to start again. The database
    session belongs to the caller until try_take() succeeds, and to the thread afterwards.
    """

    def __init__(self, dsn: str, schema: str) -> None:
        super().__init__("lead")
        self._connection = connect_store(dsn, schema, "cdcbridge lead", _SESSION)
        with store_errors():
            self._connection.execute(PRESENT)
        # The reasons why the lead is "lost" and why the session is "over", for the holder. They stay until the end.
        self._news: Mailbox[str] = Mailbox()
        self.epoch: int | None = None  # written once, by the holder, when it has begun an epoch

    def fileno(self) -> int:
        return self._news.fileno()

    def try_take(self) -> bool:
        """Take the lead if it is free, and return whether it was taken.

        If the holder has shown no sign of life for SILENCE seconds, its session is ended. Then the next try succeeds.

        Raises:
            StoreUnavailable: The store cannot be reached.
        """
        with store_errors():
            got = self._connection.execute("select pg_try_advisory_lock('leaders'::regclass::oid::int, 0)").fetchone()
            if got != (True,):
                evict = "select evict_leader(make_interval(secs => %s))"
                if self._connection.execute(evict, (SILENCE,)).fetchone() == (True,):
                    log.warning("lead.evicted", reason=f"no sign of life for {SILENCE} s, so its session was ended")
                return False
        self.start()
        return True

    @property
    def lost(self) -> bool:
        """The store is out of reach, or a standby has taken over."""
        return self._news.look("lost") is not None

    def check(self) -> None:
        """Raise an error if the holder has to stop.

        Raises:
            StoreUnavailable: The lead is lost.
            Fenced: The holder has to start its streaming session again.
        """
        if (reason := self._news.look("lost")) is not None:
            raise StoreUnavailable(f"the lead is lost: {reason}")
        if (reason := self._news.look("over")) is not None:
            raise Fenced(reason)

    def end(self, reason: str) -> None:
        """Make the holder start its streaming session again.

        This is safe from another thread. If it is called again, the first reason is kept.
        """
        self._news.put(reason, "over")

    def release(self) -> None:
        """Give the lead up at once.

        An append that is still under way is fenced by the next epoch.
        """
        self.stop()

    def stop(self) -> None:
        """Do the same as release()."""
        if not self._stop.is_set():
            super().stop()
            self._news.end()
            cut_off(self._connection)

    def close(self) -> None:
        """Release the lead, wait for the thread to end, and close the session.

        Call it only when no thread waits on fileno() any more.
        """
        self.release()
        self.join()
        self._connection.close()
        self._news.close()

    def _work(self) -> None:
        while not self._stop.wait(SIGN_INTERVAL):
            try:
                newest = self._connection.execute(_NEWEST).fetchone()
                # Reported here, too, because a bridge that has nothing to append would not notice.
                if newest is not None and self.epoch is not None and newest[0] > self.epoch:
                    self.end(f"epoch {self.epoch} has ended, because {newest[1]} leads with epoch {newest[0]}")
            except psycopg.errors.LockNotAvailable:
                continue
            except psycopg.Error as error:
                if not self._stop.is_set():
                    self._news.put(" ".join(str(error).split()), "lost")
                return
