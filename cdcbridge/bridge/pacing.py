"""Decide when a streaming session reads, appends, confirms, looks at the capture, and waits.

The decisions depend on sizes and times alone, so that each rule can be tested without a server. The caller passes the
time: this module never reads a clock. Nor does it ever decide whether a change is durable, or which LSN may be
confirmed (see changes/position.py).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cdcbridge.changes.position import Progress

BATCH_ROWS: Final = 5_000  # rows that are worth an append: so many that its commit costs little in comparison
BATCH_BYTES: Final = 4 << 20  # bytes that are worth an append
WAITING_BATCHES: Final = 2  # batches that may be collected during an append before reading stops
LOOK_INTERVAL: Final = 0.5  # seconds between two looks at the capture
_STATUS_SHARE: Final = 4  # status updates in one wal_sender_timeout
_LONGEST_STATUS_INTERVAL: Final = 1.0
_SHORTEST_WAIT: Final = 0.01
_GENTLE_FOR: Final = 1.0  # seconds after a change during which backfills are gentle
_CHUNK_WAIT: Final = 0.1  # seconds between chunks that share a batch with changes, if these leave no pause


class Load(NamedTuple):
    """The amount and the state of the work that a streaming session has collected.

    Attributes:
        rows: Rows that are collected and not appended yet.
        size: Their size in bytes.
        open: Whether a transaction has begun and not ended.
        waiting: Whether there is something to append, or a backfill waits until the store has the position.
        drained: Whether everything that has arrived is read.
        spilling: Whether blocks of a transaction in progress must be stored before more is read.
        moved: Whether the position has advanced since the last append, for example by transactions of other tables.
    """

    rows: int = 0
    size: int = 0
    open: bool = False
    waiting: bool = False
    drained: bool = True
    spilling: bool = False
    moved: bool = False

    def worth(self, batches: int) -> bool:
        """Return whether rows or bytes amount to at least so many batches."""
        return self.size >= batches * BATCH_BYTES or self.rows >= batches * BATCH_ROWS

    @property
    def full(self) -> bool:
        """Return whether reading must stop until the append in progress is done. This is the back-pressure."""
        return self.worth(WAITING_BATCHES)


class Pacing:
    """The times of a streaming session, all of them in seconds of one monotonic clock.

    Args:
        idle_interval: Seconds after which a position that advanced without rows is appended, too.
        wal_sender_timeout: The timeout of the replication session in seconds, or 0 if it has none.

    Attributes:
        status_interval: The longest time between two status updates, in seconds.
    """

    def __init__(self, idle_interval: float, wal_sender_timeout: float) -> None:
        self._idle_interval = idle_interval
        self.status_interval = _status_interval(wal_sender_timeout)
        self._next_status = self._next_idle_append = self._next_look = 0.0
        self._written = self._looked_at = 0  # LSNs
        self._changes = 0
        self._changed_at = self._chunk_at = float("-inf")

    # events

    def note_changes(self, changes: int, now: float) -> None:
        """Note the number of rows that were collected so far, without those of backfills."""
        if changes > self._changes:
            self._changes, self._changed_at = changes, now

    def note_submitted(self, now: float) -> None:
        """Note that a batch was given to the appender."""
        self._next_idle_append = now + self._idle_interval

    def note_stored(self, *, chunks: bool, now: float) -> None:
        """Note that a batch is durable, and whether it contained chunks of backfills.

        A status update for PostgreSQL is due at once.
        """
        self._next_status = 0.0
        if chunks:
            self._chunk_at = now

    def note_confirmed(self, written: int, now: float) -> None:
        """Note that a status update reported everything up to the LSN `written` as written."""
        self._next_status, self._written = now + self.status_interval, written

    def note_look(self, received: int, now: float) -> None:
        """Note a look at the capture, made when everything up to the LSN `received` had been received."""
        self._next_look, self._looked_at = now + LOOK_INTERVAL, received

    # decisions

    def gentle(self, now: float) -> bool:
        """Return whether backfills must be gentle, because a change arrived within the last second.

        They then read small chunks, each of which is appended alone, so that changes do not wait for them long.
        """
        return now - self._changed_at < _GENTLE_FOR

    def chunk_due(self, now: float) -> bool:
        """Return whether a chunk of a backfill may share a batch with changes."""
        return not self.gentle(now) or now > self._chunk_at + _CHUNK_WAIT

    def append_due(self, load: Load, now: float) -> bool:
        """Return whether to append now.

        An append is due in each of these cases:
        - The collected rows fill a batch.
        - Something waits, no transaction is open, and everything that has arrived is read.
        - Blocks of a transaction in progress must be stored.
        - The position advanced without rows, and `idle_interval` has passed since the last append began.
        """
        complete = load.waiting and load.drained and not load.open
        idle = load.moved and not load.waiting and not load.open and now >= self._next_idle_append
        return load.worth(1) or complete or load.spilling or idle

    def confirm_due(self, written: int, now: float, *, wanted: bool) -> bool:
        """Return whether to report the positions to PostgreSQL.

        A report is due after each append, when the server asks for one (`wanted`), and in time for the server's
        timeout.
        """
        return wanted or written > self._written or now >= self._next_status

    def look_due(self, progress: Progress, now: float, *, ending: bool) -> bool:
        """Return whether to look at the capture, as is necessary before the durable changes are vouched for.

        No look is due while nothing has changed since the last one. At the end of a streaming session (`ending`) there
        is no interval to wait for.
        """
        unchanged = progress.received == self._looked_at and progress.durable == progress.vouched
        return not unchanged and (ending or now >= self._next_look)

    def longest_wait(self, load: Load, now: float, *, appending: bool) -> float:
        """Return for how many seconds nothing has to be done, if nothing arrives and no append ends."""
        wait = max(0.0, self._next_status - now)
        if appending or load.full or load.spilling:
            return wait
        return min(wait, max(_SHORTEST_WAIT, self._next_idle_append - now))


def _status_interval(wal_sender_timeout: float) -> float:
    """Return the longest time between two status updates, in seconds."""
    if wal_sender_timeout <= 0:
        return _LONGEST_STATUS_INTERVAL
    return min(_LONGEST_STATUS_INTERVAL, wal_sender_timeout / _STATUS_SHARE)
