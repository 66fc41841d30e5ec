"""What a backfill has read, on its way into the log: handed over with a watermark in the WAL. Part of the rim.

Knows what is on its way, and takes it back when the backfill ends, so that whoever goes on knows from where.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, Final

from cdcbridge.database import Connection, source_errors
from cdcbridge.lsn import parse_lsn
from cdcbridge.reads import WATERMARK_PREFIX, Chunk, Snapshot, Watch

AHEAD: Final = 3  # chunks that are read and not yet durable
_numbers = itertools.count(1)


class Handover:
    """Of one backfill, in one session of the bridge. `handed` is where the collector looks; `name` begins the
    watermarks; `over` is set when the session has appended all that it ever will.
    """

    def __init__(self, handed: dict[bytes, Watch | Chunk], name: str, over: threading.Event) -> None:
        self._handed = handed
        self._name = name
        self._over = over
        self._changed = threading.Condition()
        self._outstanding: set[bytes] = set()
        self._stopped = False

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def watch(self, marker: Connection, watch: Watch) -> int:
        """From this watermark on the collector watches the table; its LSN."""
        token = self._token()
        self._handed[token] = watch
        return mark(marker, token)

    def chunk(
        self,
        marker: Connection,
        watch: Watch,
        backfill_id: int,
        seen: Snapshot,
        rows: list[bytes],
        place: list[Any],
        looked_at: int,
        *,
        last: bool,
    ) -> None:
        """Rows that were read, to enter the log when the stream has come past a watermark that is written now."""
        token = self._token()
        with self._changed:
            self._outstanding.add(token)
        self._handed[token] = Chunk(watch, backfill_id, seen, rows, place, looked_at, last, self._releaser(token))
        mark(marker, token)

    def has_room(self) -> bool:
        """Wait until few enough chunks are on their way; False when stopped meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._outstanding) < AHEAD or self._stopped)
            return not self._stopped

    def wait_for_all(self) -> bool:
        """Until nothing is on its way; False when stopped meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._outstanding or self._stopped)
            return not self._outstanding

    def withdraw(self, watch: Watch) -> None:
        """Nothing more of it may enter the log: what is on its way is taken back, what is being appended waited for."""
        watch.over = True
        with self._changed:
            tokens = list(self._outstanding)
        for token in tokens:
            if self._handed.pop(token, None) is not None:
                self._releaser(token)()
        with self._changed:
            while self._outstanding and not self._over.is_set():
                self._changed.wait(0.1)

    def _token(self) -> bytes:
        return f"{self._name}/{next(_numbers)}".encode()

    def _releaser(self, token: bytes) -> Callable[[], None]:
        def release() -> None:
            with self._changed:
                self._outstanding.discard(token)
                self._changed.notify_all()

        return release


def mark(marker: Connection, token: bytes) -> int:
    """Write a watermark into the WAL; its LSN. The position of the log comes there soon after the stream does."""
    with source_errors():
        row = marker.execute(
            "select pg_logical_emit_message(true, %s, %s)::text", (WATERMARK_PREFIX, token.decode()), prepare=True
        ).fetchone()
    return parse_lsn(row[0]) if row else 0
