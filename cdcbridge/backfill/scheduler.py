"""Start the backfills that are requested while the bridge streams, and stop those that are cancelled or paused."""

from __future__ import annotations

import time
from typing import Final

import psycopg
import structlog

from cdcbridge.backfill.requests import unfinished
from cdcbridge.backfill.worker import Backfill, BackfillSession, Ended
from cdcbridge.background import Background
from cdcbridge.database import Connection, connect_store
from cdcbridge.errors import CdcbridgeError

AT_ONCE: Final = 2  # backfills
_POLL: Final = 0.5
_RETRY: Final = 2.0
log = structlog.get_logger()


class Backfiller(Background):
    """The thread that starts and stops the backfills of a streaming session.

    It runs from entry to exit of its `with` block. With `idle` it never starts.
    """

    def __init__(self, session: BackfillSession, *, idle: bool = False) -> None:
        super().__init__("backfiller", patience=10)
        self.session = session
        self._idle = idle
        self._running: dict[int, Backfill] = {}
        self._not_before: dict[int, float] = {}

    def start(self) -> None:
        if not self._idle:
            super().start()

    def stop(self) -> None:
        """Stop the thread, and let no backfill wait for the main loop.

        The main loop appends nothing any more.
        """
        super().stop()
        self.session.ended.end()
        self.session.room.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                with connect_store(
                    self.session.config.store_dsn, self.session.config.store.schema_, "cdcbridge backfills"
                ) as store:
                    while not self._stop.is_set():
                        self._look(store)
                        self._forget(self.session.ended.wait(_POLL))
            except (CdcbridgeError, psycopg.Error) as error:
                log.warning("backfill.failed", error=" ".join(str(error).split()))
                self._stop.wait(_RETRY)
        for running in self._running.values():
            running.stop()
        for running in self._running.values():
            running.join(5)

    def _look(self, store: Connection) -> None:
        """Start backfills that are requested, and stop those that are not requested any more."""
        while self._forget(self.session.ended.take()):
            pass
        # Only after that, because the progress of a backfill is final when no thread works on it.
        orders = unfinished(store)
        for backfill_id, running in self._running.items():
            if backfill_id not in orders:
                running.stop()
        for backfill_id, order in orders.items():
            if len(self._running) >= AT_ONCE:
                return
            if backfill_id not in self._running and self._not_before.get(backfill_id, 0) <= time.monotonic():
                running = Backfill(self.session, order)
                running.start()
                self._running[backfill_id] = running

    def _forget(self, ended: Ended | None) -> bool:
        """Remove a backfill that has ended from the running ones, and return whether there was one."""
        if ended is None:
            return False
        del self._running[ended.backfill_id]
        self._not_before[ended.backfill_id] = time.monotonic() + _RETRY * ended.failed
        return True
