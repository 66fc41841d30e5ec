"""When a session reads, appends, confirms, looks and waits. Pure: it is told the time, and never asks a clock.

It decides by sizes and times alone, so that each rule can be tested without a server. Whether something is durable, and
what may be confirmed, is not its business (changes/position.py).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cdcbridge.changes.position import Progress

BATCH_ROWS: Final = 5_000  # rows worth an append of their own: enough that its commit costs little
BATCH_BYTES: Final = 4 << 20  # and bytes
WAITING_BATCHES: Final = 2  # what may be collected while an append is under way, in such batches; then reading stops
LOOK_INTERVAL: Final = 0.5  # seconds between two looks at what is captured
_STATUS_SHARE: Final = 4  # status updates in one wal_sender_timeout
_LONGEST_STATUS_INTERVAL: Final = 1.0
_SHORTEST_WAIT: Final = 0.01
_GENTLE_FOR: Final = 1.0  # seconds after a change
_CHUNK_WAIT: Final = 0.1  # then a chunk of a backfill goes with changes, if these leave no time between them


class Load(NamedTuple):
    """What a session has at hand.

    rows, size: collected and not appended yet; size in bytes.
    open: a transaction has begun and not ended.
    waiting: something is to be appended, or somebody waits for the position.
    drained: everything that has arrived is read.
    spilling: blocks of a transaction in progress must be stored before more is read.
    moved: the position has moved since the last append, for example by transactions of other tables.
    """

    rows: int = 0
    size: int = 0
    open: bool = False
    waiting: bool = False
    drained: bool = True
    spilling: bool = False
    moved: bool = False

    def worth(self, batches: int) -> bool:
        """Whether it is as much as so many batches."""
        return self.size >= batches * BATCH_BYTES or self.rows >= batches * BATCH_ROWS

    @property
    def full(self) -> bool:
        """Reading stops until the append under way is done. That is the back-pressure."""
        return self.worth(WAITING_BATCHES)


class Pacing:
    """The times of a session. Every time is in seconds of one monotonic clock.

    idle_interval: seconds after which a position that moved without rows is appended, too.
    wal_sender_timeout: the server's, in seconds; 0 where it has none.
    status_interval: the longest time between two status updates.
    """

    def __init__(self, idle_interval: float, wal_sender_timeout: float) -> None:
        self._idle_interval = idle_interval
        self.status_interval = _status_interval(wal_sender_timeout)
        self._next_status = self._next_idle_append = self._next_look = 0.0
        self._written = self._looked_at = 0  # LSNs
        self._changes = 0
        self._changed_at = self._chunk_at = float("-inf")

    # what happened

    def note_changes(self, changes: int, now: float) -> None:
        """So many rows were collected in all that are no backfill's."""
        if changes > self._changes:
            self._changes, self._changed_at = changes, now

    def note_submitted(self, now: float) -> None:
        """A batch was given to the appender."""
        self._next_idle_append = now + self._idle_interval

    def note_stored(self, *, chunks: bool, now: float) -> None:
        """A batch is durable, with chunks of backfills in it or not. PostgreSQL is told at once."""
        self._next_status = 0.0
        if chunks:
            self._chunk_at = now

    def note_confirmed(self, written: int, now: float) -> None:
        """PostgreSQL was told that everything up to LSN `written` is written."""
        self._next_status, self._written = now + self.status_interval, written

    def note_look(self, received: int, now: float) -> None:
        """What is captured was looked at, after everything up to LSN `received`."""
        self._next_look, self._looked_at = now + LOOK_INTERVAL, received

    # what is due

    def gentle(self, now: float) -> bool:
        """Whether backfills come in small pieces and alone, so that changes need not wait for them for long."""
        return now - self._changed_at < _GENTLE_FOR

    def chunk_due(self, now: float) -> bool:
        """Whether a chunk of a backfill may go into a batch with changes."""
        return not self.gentle(now) or now > self._chunk_at + _CHUNK_WAIT

    def append_due(self, load: Load, now: float) -> bool:
        """Whether to append now: a batch, what nothing more follows just now, or a position that moved alone."""
        complete = load.waiting and load.drained and not load.open
        idle = load.moved and not load.waiting and not load.open and now >= self._next_idle_append
        return load.worth(1) or complete or load.spilling or idle

    def confirm_due(self, written: int, now: float, *, wanted: bool) -> bool:
        """Whether to tell PostgreSQL the positions: after each append, as it wishes, and in time for its timeout."""
        return wanted or written > self._written or now >= self._next_status

    def look_due(self, progress: Progress, now: float, *, ending: bool) -> bool:
        """Whether to look at what is captured, before what is durable is vouched for."""
        unchanged = progress.received == self._looked_at and progress.durable == progress.vouched
        return not unchanged and (ending or now >= self._next_look)

    def longest_wait(self, load: Load, now: float, *, appending: bool) -> float:
        """For how many seconds nothing has to be done, if nothing arrives and no append ends."""
        wait = max(0.0, self._next_status - now)
        if appending or load.full or load.spilling:
            return wait
        return min(wait, max(_SHORTEST_WAIT, self._next_idle_append - now))


def _status_interval(wal_sender_timeout: float) -> float:
    """The seconds between two status updates."""
    if wal_sender_timeout <= 0:
        return _LONGEST_STATUS_INTERVAL
    return min(_LONGEST_STATUS_INTERVAL, wal_sender_timeout / _STATUS_SHARE)
