"""Hand over the rows that a backfill has read to the main loop, each chunk with a watermark in the WAL.

This module knows which chunks are on their way into the log. When the backfill ends, it takes them back, so that the
next thread knows the place from which to continue.
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

AHEAD: Final = 3  # chunks of one backfill that are read and not yet durable, at most
BYTES_AHEAD: Final = 16 << 20  # of all backfills together; a single chunk may have more
_numbers = itertools.count(1)


class Room:
    """The memory that all backfills of a session share, for rows that are read and not yet durable.

    The readers take memory, and the main loop gives it back. `changed` is the lock of all attributes.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.taken = 0  # bytes
        self.over = False  # nothing will be appended any more

    def fits(self, size: int) -> bool:
        """Return whether `size` more bytes may be taken. A single chunk always may.

        Call it with the lock `changed`.
        """
        return not self.taken or self.taken + size <= BYTES_AHEAD

    def enter(self, size: int) -> bool:
        """Wait until `size` more bytes may be taken, take them, and return False if the room is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.over or self.fits(size))
            self.taken += size
            return not self.over

    def leave(self, size: int) -> None:
        """Give back `size` bytes, whose rows are durable or dropped."""
        with self.changed:
            self.taken -= size
            self.changed.notify_all()

    def close(self) -> None:
        """Wake all readers that wait for memory, because nothing will be appended any more."""
        with self.changed:
            self.over = True
            self.changed.notify_all()


class Handover:
    """The chunks of one backfill on their way to the main loop, in one streaming session.

    Args:
        handed: The mailbox from which the collector takes them.
        name: The beginning of the text of each watermark.
        room: The memory shared with other backfills. The session closes it when it will append nothing more.
    """

    def __init__(self, handed: Mailbox[Watch | Chunk], name: str, room: Room) -> None:
        self._handed = handed
        self._name = name
        self._room = room
        self._changed = room.changed
        self._outstanding: dict[bytes, int] = {}  # by watermark, the bytes of each chunk on its way
        self._stopped = False

    def stop(self) -> None:
        """Wake all threads that wait in this object, and let none wait again."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def watch(self, marker: Connection, watch: Watch) -> int:
        """Make the collector watch the table from a new watermark on, and return the LSN of that watermark."""
        token = self._token()
        self._handed.put(watch, token)
        return mark(marker, token)

    def chunk(self, marker: Connection, watch: Watch, backfill_id: int, seen: Snapshot, read: Read) -> None:
        """Hand over rows that were read, and write a watermark.

        The rows enter the log when the stream has passed the watermark.
        """
        token = self._token()
        with self._changed:
            self._outstanding[token] = size = sum(map(len, read.rows))
            self._room.taken += size
        done = self._releaser(token)
        chunk = Chunk(watch, backfill_id, seen, read.rows, read.end, read.looked_at, read.last, done, read.sized)
        self._handed.put(chunk, token)
        mark(marker, token)

    def has_room(self, size: int) -> bool:
        """Wait until few enough chunks are on their way and `size` more bytes fit.

        The result is False if the backfill was stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or (len(self._outstanding) < AHEAD and self._room.fits(size)))
            return not self._stopped

    def wait_for_all(self) -> bool:
        """Wait until no chunk is on its way, and return False if the backfill was stopped before."""
        with self._changed:
            self._changed.wait_for(lambda: not self._outstanding or self._stopped)
            return not self._outstanding

    def withdraw(self, watch: Watch) -> None:
        """Let nothing more of this watch enter the log.

        Chunks on their way are taken back. A chunk that is being appended is waited for.
        """
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
    """Write a watermark into the WAL, and return its LSN.

    The log's position reaches that LSN soon after the stream does.
    """
    with source_errors():
        row = marker.execute(
            "select pg_logical_emit_message(true, %s, %s)::text", (WATERMARK_PREFIX, token.decode()), prepare=True
        ).fetchone()
    return parse_lsn(row[0]) if row else 0
