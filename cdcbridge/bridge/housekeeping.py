"""Do the periodic work of the bridge, in a thread with database sessions of its own.

The thread has these tasks:
- Send heartbeats to the source, so that the slot advances while only other databases are written.
- Turn messages whose last delivery expired into dead letters.
- Merge the many rows of a held key into few.
- Drop segments of the log that no consumer needs.

The thread never touches the stream, and never waits for a lock in the store for longer than a second. It logs each
failure and tries again.
"""

from __future__ import annotations

import time
from typing import Final

import psycopg
import structlog

from cdcbridge.background import Background
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store
from cdcbridge.errors import CdcbridgeError
from cdcbridge.source.slots import in_recovery

HEARTBEAT_PREFIX: Final = "cdcbridge.heartbeat"
_BURY_INTERVAL: Final = 2.0  # seconds; a message whose last delivery expired must become a dead letter within 5 s
_RETENTION_INTERVAL: Final = 10.0  # seconds
log = structlog.get_logger()


class Housekeeper(Background):
    """The thread, which works from entry to exit of its `with` block."""

    def __init__(self, config: Config) -> None:
        super().__init__("housekeeper")
        self._config = config
        self._held_by: str | None = None  # the consumer that keeps an old segment

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._sessions()
            except (CdcbridgeError, psycopg.Error) as error:
                log.warning("housekeeping.failed", error=" ".join(str(error).split()))
                self._stop.wait(_BURY_INTERVAL)

    def _sessions(self) -> None:
        interval = self._config.source.heartbeat_interval
        with (
            connect_source(self._config.source_dsn, "cdcbridge heartbeat") as source,
            connect_store(
                self._config.store_dsn, self._config.store.schema_, "cdcbridge housekeeping", {"lock_timeout": "1s"}
            ) as store,
        ):
            next_heartbeat = next_retention = 0.0
            while not self._stop.is_set():
                if time.monotonic() >= next_heartbeat:
                    if not in_recovery(source):  # on a standby the primary's own traffic has to suffice
                        source.execute("select pg_logical_emit_message(true, %s, '')", (HEARTBEAT_PREFIX,))
                    next_heartbeat = time.monotonic() + interval
                buried = store.execute("select bury_expired(), forget_published(), merge_runs()").fetchone()
                if buried and buried[0]:
                    log.info("messages.died", reason="max_deliveries", messages=buried[0])
                if time.monotonic() >= next_retention:
                    while self._drop_segments(store) and not self._stop.is_set():
                        pass
                    store.execute("select forget_hints(), forget_settled(), note_safe_point(), forget_marks()")
                    store.execute(
                        "select forget_changes(make_interval(secs => %s))", (self._config.store.audit_retention,)
                    )
                    next_retention = time.monotonic() + _RETENTION_INTERVAL
                self._stop.wait(min(_BURY_INTERVAL, interval))

    def _drop_segments(self, store: Connection) -> bool:
        """Drop segments that no consumer needs. Return whether there may be more."""
        limits = self._config.store
        row = store.execute(
            "select dropped, held_by, lost, expired"
            " from drop_segments(make_interval(secs => %s), make_interval(secs => %s), %s)",
            (limits.retention, limits.max_retention, limits.retention_bytes),
        ).fetchone()
        dropped, held_by, lost, expired = row or (0, None, 0, 0)
        if expired:
            log.error(
                "retention.expired",
                messages=expired,
                reason="unfinished for longer than store.max_retention: they are dead letters now",
            )
        if dropped:
            log.info("retention.dropped", segments=dropped)
        if lost:
            log.error(
                "retention.lost",
                messages=lost,
                reason="groups had not read them. `cdcbridge offsets show` lists these groups, and `cdcbridge offsets"
                " seek` lets them continue",
            )
        if held_by != self._held_by and held_by is not None:
            log.warning(
                "retention.held", consumer=held_by, reason="it has not finished messages older than store.retention"
            )
        self._held_by = held_by
        return bool(dropped)
