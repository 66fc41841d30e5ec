"""What a backfill has read, on its way into the log: handed over with a watermark in the WAL. Part of the rim.

Knows what is on its way, and takes it back when the backfill ends, so that whoever goes on knows from where.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Final

from cdcbridge.backfill.table_reader import Read
from cdcbridge.database import Connection, source_errors
from cdcbridge.lsn import parse_lsn
from cdcbridge.mailbox import Mailbox
from cdcbridge.routing.overtaken import WATERMARK_PREFIX, Chunk, Snapshot, Watch

AHEAD: Final = 3  # chunks that are read and not yet durable
BYTES_AHEAD: Final = 16 << 20  # of all backfills, beside one chunk
_numbers = itertools.count(1)


class Room:
    """The memory that all backfills of a session share for rows that are read and not yet durable.

    The readers take it, the main loop gives it back. `changed` is the lock of everything in here.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.taken = 0  # bytes
        self.over = False  # nothing will be appended any more

    def fits(self, size: int) -> bool:
        """Whether so many bytes may be added. A single chunk always may. Call with `changed`."""
        return not self.taken or self.taken + size <= BYTES_AHEAD

    def enter(self, size: int) -> bool:
        """Wait until so many bytes may be added, and add them; False when over."""
        with self.changed:
            self.changed.wait_for(lambda: self.over or self.fits(size))
            self.taken += size
            return not self.over

    def leave(self, size: int) -> None:
        """So many bytes are durable, or dropped."""
        with self.changed:
            self.taken -= size
            self.changed.notify_all()

    def close(self) -> None:
        """Nothing will be appended any more: nobody waits for that."""
        with self.changed:
            self.over = True
            self.changed.notify_all()


class Handover:
    """Of one backfill, in one session of the bridge. `handed` is where the collector looks; `name` begins the
    watermarks; `room` is shared with others, and over when the session has appended all that it ever will.
    """

    def __init__(self, handed: Mailbox[Watch | Chunk], name: str, room: Room) -> None:
        self._handed = handed
        self._name = name
        self._room = room
        self._changed = room.changed
        self._outstanding: dict[bytes, int] = {}  # bytes of each
        self._stopped = False

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def watch(self, marker: Connection, watch: Watch) -> int:
        """From this watermark on the collector watches the table; its LSN."""
        token = self._token()
        self._handed.put(watch, token)
        return mark(marker, token)

    def chunk(self, marker: Connection, watch: Watch, backfill_id: int, seen: Snapshot, read: Read) -> None:
        """Rows that were read, to enter the log when the stream has come past a watermark that is written now."""
        token = self._token()
        with self._changed:
            self._outstanding[token] = size = sum(map(len, read.rows))
            self._room.taken += size
        done = self._releaser(token)
        chunk = Chunk(watch, backfill_id, seen, read.rows, read.end, read.looked_at, read.last, done, read.sized)
        self._handed.put(chunk, token)
        mark(marker, token)

    def has_room(self, size: int) -> bool:
        """Wait until few enough chunks are on their way, and so many bytes fit beside them; False when stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or (len(self._outstanding) < AHEAD and self._room.fits(size)))
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
            if self._handed.take(token) is not None:
                self._releaser(token)()
        with self._changed:
            self._changed.wait_for(lambda: not self._outstanding or self._room.over)

    def _token(self) -> bytes:
        return f"{self._name}/{next(_numbers)}".encode()

    def _releaser(self, token: bytes) -> Callable[[], None]:
        def release() -> None:
            with self._changed:
                self._room.taken -= self._outstanding.pop(token, 0)
                self._changed.notify_all()

        return release


def mark(marker: Connection, token: bytes) -> int:
    """Write a watermark into the WAL; its LSN. The position of the log comes there soon after the stream does."""
    with source_errors():
        row = marker.execute(
            "select pg_logical_emit_message(true, %s, %s)::text", (WATERMARK_PREFIX, token.decode()), prepare=True
        ).fetchone()
    return parse_lsn(row[0]) if row else 0
