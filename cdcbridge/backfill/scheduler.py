"""All backfills of a session: starts what is asked for, stops what is not any more. Part of the rim."""

from __future__ import annotations

import threading
import time
from typing import Final, Self

import psycopg
import structlog

from cdcbridge.backfill.requests import unfinished
from cdcbridge.backfill.worker import Backfill, Session
from cdcbridge.database import Connection, connect_store
from cdcbridge.errors import CdcbridgeError

AT_ONCE: Final = 2  # backfills
_POLL: Final = 0.5
_RETRY: Final = 2.0
log = structlog.get_logger()


class Backfiller:
    """Works from entry to exit of its `with` block."""

    def __init__(self, session: Session, *, idle: bool = False) -> None:
        self.session = session
        self._idle = idle
        self._stop = threading.Event()
        self._running: dict[int, Backfill] = {}
        self._not_before: dict[int, float] = {}
        self._thread = threading.Thread(target=self._work, name="backfiller", daemon=True)

    def __enter__(self) -> Self:
        if not self._idle:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.session.ended.set()
        self.session.over.set()
        if not self._idle:
            self._thread.join(timeout=10)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                with connect_store(
                    self.session.config.store_dsn, self.session.config.store.schema_, "cdcbridge backfills"
                ) as store:
                    while not self._stop.is_set():
                        self._look(store)
                        self.session.ended.wait(_POLL)
                        self.session.ended.clear()
            except (CdcbridgeError, psycopg.Error) as error:
                log.warning("backfill.failed", error=" ".join(str(error).split()))
                self._stop.wait(_RETRY)
        for running in self._running.values():
            running.stop()
        for running in self._running.values():
            running.join(5)

    def _look(self, store: Connection) -> None:
        """Start what is asked for, stop what is not any more."""
        for backfill_id, running in list(self._running.items()):
            if not running.alive:
                del self._running[backfill_id]
                self._not_before[backfill_id] = time.monotonic() + _RETRY * running.failed
        # After that: of those that no thread works on, the progress is what it is.
        orders = unfinished(store)
        for backfill_id, running in self._running.items():
            if backfill_id not in orders:
                running.stop()
        for backfill_id, order in orders.items():
            if len(self._running) >= AT_ONCE:
                return
            if backfill_id not in self._running and self._not_before.get(backfill_id, 0) <= time.monotonic():
                self._running[backfill_id] = Backfill(self.session, order)
