"""Who leads: a lock of a session of its own on the store, which shows twice a second that its holder is alive. Part of
the rim.

A bridge that died gives the lead up with its connection. One that was cut off or stopped (SIGSTOP, a frozen machine)
shows nothing any more, and a stand-by ends its session: so it takes over within five seconds. Being alive is told by
nothing that is written, so that an old snapshot on the store cannot slow it down. The lead alone lets nobody append:
that is the fence of the epoch (store), since whoever was evicted does not know it yet.
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
SILENCE: Final = 2.5  # seconds without a sign, after which a stand-by takes over
# The pulse is a column of pg_stat_activity, which stays as it is in a session without track_activities.
_SESSION: Final = {**BRIDGE_SESSION, "track_activities": "on", "lock_timeout": "1s"}
# Every bridge holds it, a stand-by too, so that `uninstall` finds those of this schema.
PRESENT: Final = "select pg_try_advisory_lock_shared('leaders'::regclass::oid::int, 2)"
_NEWEST: Final = "select epoch, holder from leaders order by epoch desc limit 1"
log = structlog.get_logger()


class Lead(Background):
    """try_take() until it is ours; then held until release(). Readable (fileno) when it is lost.

    Until try_take() succeeds the session is the caller's, then the thread's.
    """

    def __init__(self, dsn: str, schema: str) -> None:
        super().__init__("lead")
        self._connection = connect_store(dsn, schema, "cdcbridge lead", _SESSION)
        with store_errors():
            self._connection.execute(PRESENT)
        # The reason why it is "lost", why the session is "over", for the holder. Both stay until the end.
        self._news: Mailbox[str] = Mailbox()
        self.epoch: int | None = None  # of the holder, which writes it once when it has begun one

    def fileno(self) -> int:
        return self._news.fileno()

    def try_take(self) -> bool:
        """Take the lead if nobody has it, or if its holder has given no sign of life for SILENCE: then at the next try.

        Raises StoreUnavailable.
        """
        with store_errors():
            got = self._connection.execute("select pg_try_advisory_lock('leaders'::regclass::oid::int, 0)").fetchone()
            if got != (True,):
                evict = "select evict_leader(make_interval(secs => %s))"
                if self._connection.execute(evict, (SILENCE,)).fetchone() == (True,):
                    log.warning("lead.evicted", reason=f"no sign of life for {SILENCE} s; its session was ended")
                return False
        self.start()
        return True

    @property
    def lost(self) -> bool:
        """The store is out of reach, or a stand-by took over."""
        return self._news.look("lost") is not None

    def check(self) -> None:
        """Raises StoreUnavailable where the lead is lost, and Fenced where the session is to start again."""
        if (reason := self._news.look("lost")) is not None:
            raise StoreUnavailable(f"the lead is lost: {reason}")
        if (reason := self._news.look("over")) is not None:
            raise Fenced(reason)

    def end(self, reason: str) -> None:
        """Let the holder start its session again. Safe from another thread. The first reason stays."""
        self._news.put(reason, "over")

    def release(self) -> None:
        """Give the lead up, at once. Whoever still appends is fenced by the next epoch."""
        self.stop()

    def stop(self) -> None:
        """release()."""
        if not self._stop.is_set():
            super().stop()
            self._news.end()
            cut_off(self._connection)

    def close(self) -> None:
        """release(), and no thread is left. Only when nobody waits on fileno() any more."""
        self.release()
        self.join()
        self._connection.close()
        self._news.close()

    def _work(self) -> None:
        while not self._stop.wait(SIGN_INTERVAL):
            try:
                newest = self._connection.execute(_NEWEST).fetchone()
                # Told here, too, because a bridge that has nothing to append would not notice.
                if newest is not None and self.epoch is not None and newest[0] > self.epoch:
                    self.end(f"epoch {self.epoch} is over: {newest[1]} leads with epoch {newest[0]}")
            except psycopg.errors.LockNotAvailable:
                continue
            except psycopg.Error as error:
                if not self._stop.is_set():
                    self._news.put(" ".join(str(error).split()), "lost")
                return
