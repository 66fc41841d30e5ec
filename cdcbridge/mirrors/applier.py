"""The thread of one mirror: read the log, apply whole transactions to the target, note how far it is.

Read Session.run() from top to bottom. A transaction of the source is applied whole or not at all, and the target's
commit contains the place. Any error ends the session. The next one continues from the place that the target has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import psycopg
import structlog

from cdcbridge.background import Background
from cdcbridge.config import Config, Mirror
from cdcbridge.database import server_errors, target_errors
from cdcbridge.errors import CdcbridgeError, SourceUnavailable, StoreUnavailable, TargetUnavailable
from cdcbridge.instants import reach
from cdcbridge.mirrors.applying import Applying, Unexpected
from cdcbridge.mirrors.careful import Careful
from cdcbridge.mirrors.changes import LogRow, MirroredChange, take_apart
from cdcbridge.mirrors.log_reader import LogReader, Marks, MirrorState
from cdcbridge.mirrors.peer_log import PeerLog
from cdcbridge.mirrors.place import begin_at
from cdcbridge.mirrors.read_ahead import AHEAD_ROWS, ReadAhead
from cdcbridge.mirrors.segments import Segment, segments
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.target import Place, Target
from cdcbridge.mirrors.target_tables import TargetTables
from cdcbridge.routing.copy_format import GAP_TOPIC

_WAIT: Final = 0.5  # seconds until the next look at the log, if no notification arrives
_NOTE_EVERY: Final = 0.5  # seconds between two notes in the source's store
_RETRY: Final = (0.2, 10.0)  # seconds: the shortest and the longest wait after an error
_ALONE: Final = 50  # source transactions that are applied one by one after a conflict or a deadlock
_CLASHES: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
_PASSING: Final = (SourceUnavailable, StoreUnavailable, TargetUnavailable)
log = structlog.get_logger()


class Applier(Background):
    """The thread that applies one mirror until it is stopped.

    Args:
        config: The configuration.
        mirror: The mirror.
    """

    def __init__(self, config: Config, mirror: Mirror) -> None:
        super().__init__(f"mirror {mirror.name}", patience=None)
        self._config = config
        self.mirror = mirror

    def _work(self) -> None:
        wait = _RETRY[0]
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                with ExitStack() as stack, server_errors():
                    Session(self._config, self.mirror, self._stop.is_set, stack).run()
            except CdcbridgeError as error:
                log.warning("mirror.failed", mirror=self.mirror.name, error=str(error), hint=error.hint)
                self._note(error)
            wait = _RETRY[0] if time.monotonic() - began > _RETRY[1] else min(2 * wait, _RETRY[1])
            self._stop.wait(wait)

    def _note(self, error: CdcbridgeError) -> None:
        """Store the error. An error that passes by itself is tried again, and any other one stops the mirror."""
        try:
            with closing(LogReader(self._config, self.mirror)) as reader:
                state = reader.state()
                if state is None:
                    return
                if isinstance(error, _PASSING):
                    reader.fails(state.consumer_id, str(error))
                else:
                    reader.stop(state.consumer_id, str(error), error.hint)
                    log.error("mirror.stopped", mirror=self.mirror.name, error=str(error), hint=error.hint)
        except CdcbridgeError as unreachable:
            log.warning("mirror.failed", mirror=self.mirror.name, error=str(unreachable), hint=unreachable.hint)


@dataclass(slots=True)
class _Progress:
    """What was applied and not yet noted in the source's store."""

    place: Place
    target_seq: int | None = None
    transactions: int = 0
    changes: int = 0
    conflicts: int = 0
    commit_time: datetime | None = None
    noted_at: float = field(default_factory=time.monotonic)


class _TryAgain(Exception):
    """The chunk was undone, and is applied again, one source transaction at a time."""


class Session:
    """The sessions and the loop of an applier, from its beginning to the first error.

    Args:
        config: The configuration.
        mirror: The mirror.
        stopping: Returns whether the loop has to end.
        stack: Closes the sessions.
    """

    def __init__(self, config: Config, mirror: Mirror, stopping: Callable[[], bool], stack: ExitStack) -> None:
        self._mirror = mirror
        self._stopping = stopping
        self._reader = stack.enter_context(closing(LogReader(config, mirror)))
        self._side = self._reader.identity()
        self._target = stack.enter_context(closing(Target(mirror, self._side)))
        self._source = stack.enter_context(closing(SourceTables(config.source_dsn)))
        self._stack = stack
        self._alone_left = 0

    def run(self) -> None:
        """Apply the log until the mirror is paused, stopped or ended."""
        state = self._reader.state()
        if state is None or state.paused or state.stopped is not None:
            return
        self._prepare(state)
        while not self._stopping() and self._may_run():
            rows = self._ahead.take(self._progress.place.seq)
            if rows:
                self._apply_chunk(rows)
            if not self._target.open and len(rows) < AHEAD_ROWS:
                self._rest(idle=not rows)
        self._target.roll_back()
        self._note()

    def _prepare(self, state: MirrorState) -> None:
        self._target.prepare()
        self._state = state
        self._other = self._target.identity()
        self._tables = TargetTables(self._mirror, self._source, self._target.connection)
        self._applying = Applying(self._mirror, self._target, self._tables, self._source)
        peer = None
        if self._mirror.two_way is not None:
            peer = self._stack.enter_context(closing(PeerLog(self._mirror, self._side)))
            peer.require_peer(self._other)
        self._careful = Careful(
            self._mirror, self._target, self._tables, self._source, self._applying, (self._side, self._other), peer
        )
        place = begin_at(self._mirror.name, state, self._target.place(), self._reader)
        self._progress = _Progress(place)
        self._ahead = self._stack.enter_context(closing(ReadAhead(self._reader, state.consumer_id)))
        self._reader.listen()
        reach("mirror prepared")
        log.info("mirror.started", mirror=self._mirror.name, after_seq=place.seq, origin=self._target.origin)

    # one chunk

    def _apply_chunk(self, rows: list[LogRow]) -> None:
        """Apply the messages of a chunk, and commit if it ends with a whole transaction."""
        if self._target.open:  # in the middle of a transaction that is larger than a chunk
            inside = self._progress.place.lsn
            rows = [row for row in rows if row.lsn == inside]
        elif not rows[-1].ends:
            ends = [number for number, row in enumerate(rows, 1) if row.ends]
            rows = rows[: ends[-1]] if ends else rows
        if self._alone_left:
            rows = [row for row in rows if row.lsn == rows[0].lsn]
        if len(rows) >= AHEAD_ROWS:
            self._ahead.begin(rows[-1].seq)
        marks = self._reader.marks(rows, self._other)
        taken = [row for row in rows if not marks.is_foreign(row.lsn)]
        several = rows[0].lsn != rows[-1].lsn
        try:
            self._apply(taken, marks, several=several)
        except _TryAgain:
            self._target.roll_back()
            self._alone_left = _ALONE
            return
        except BaseException as error:
            self._target.roll_back()
            if isinstance(error.__cause__, _CLASHES):
                self._alone_left = _ALONE
                return
            raise
        self._alone_left = max(self._alone_left - 1, 0)
        self._progress.place = Place(rows[-1].seq, rows[-1].lsn)
        if taken:
            self._progress.commit_time = rows[-1].commit_time
            self._progress.changes += len(taken)
        if self._target.open and rows[-1].ends:
            self._commit()

    def _apply(self, rows: Sequence[LogRow], marks: Marks, *, several: bool) -> None:
        if not rows:
            return
        if not self._target.open:
            self._target.begin(rows[-1].lsn)
            reach("mirror begun")
        changes = [take_apart(row) for row in rows if row.topic != GAP_TOPIC]
        for row in rows:
            if row.topic == GAP_TOPIC:
                self._tell_gap(row)
        strict = self._state.strict_from is not None and rows[0].seq > self._state.strict_from
        with target_errors():
            if self._mirror.apply == "append":
                self._applying.append(changes)
            else:
                in_order = self._mirror.triggers == "fire"
                for segment in segments(changes, in_order=in_order):
                    self._progress.conflicts += self._segment(segment, marks, strict=strict, several=several)
        reach("mirror applied")

    def _segment(self, segment: Segment, marks: Marks, *, strict: bool, several: bool) -> int:
        """Apply a segment in the usual way, or in the careful way if that does not fit. Return the conflicts.

        The careful way waits for the target's log, and locks stay meanwhile. In two-way mode it is therefore taken only
        in target transactions that have one source transaction.
        """
        two_way = self._mirror.two_way is not None
        if segment.alone is not None:
            if two_way and several:
                raise _TryAgain
            return self._alone(segment.alone, marks)
        try:
            with self._target.connection.transaction():
                self._applying.apply(segment, strict=strict or two_way, mirrored_only=two_way)
                if two_way and self._careful.has_rival(segment, marks):
                    raise Unexpected
            return 0
        except (Unexpected, psycopg.errors.UniqueViolation):
            if two_way and several:
                raise _TryAgain from None
            found = self._careful.apply(segment, marks)
            return found if strict or two_way else 0

    def _alone(self, change: MirroredChange, marks: Marks) -> int:
        if change.op == "truncate":
            return self._careful.truncate(change, marks)
        if self._mirror.two_way is None:
            try:
                with self._target.connection.transaction():
                    if self._applying.rekey(change):
                        return 0
            except psycopg.errors.UniqueViolation:
                pass
        row = change.row
        gone = MirroredChange(row._replace(key=row.old_key, old_key=None), "delete", None, change.old, ())
        new = MirroredChange(row._replace(old_key=None), "insert", change.record, None, change.unchanged)
        return self._careful.apply(Segment([gone, new]), marks)

    def _tell_gap(self, row: LogRow) -> None:
        text = f"the source's log has a gap: {row.data}. Compare the tables with `cdcbridge mirror verify`"
        log.warning("mirror.gap", mirror=self._mirror.name, message=text)
        self._reader.note(self._state.consumer_id, text)

    # commits and notes

    def _commit(self) -> None:
        place = self._progress.place
        reach("mirror about to commit")
        self._target.commit(place, self._progress.commit_time)
        reach("mirror committed")
        self._progress.target_seq = place.seq
        self._progress.transactions += 1
        if time.monotonic() - self._progress.noted_at > _NOTE_EVERY:
            self._note()

    def _note(self) -> None:
        """Note in the source's store how far the target is, so that `lag` shows it and retention may go on.

        In the middle of a large transaction nothing is noted, because the target may still undo it.
        """
        if self._target.open:
            return
        done = self._progress
        self._reader.move(
            self._state.consumer_id,
            done.place.seq,
            target_seq=done.target_seq,
            transactions=done.transactions,
            changes=done.changes,
            conflicts=done.conflicts,
            commit_time=done.commit_time,
        )
        self._progress = _Progress(done.place)

    def _rest(self, *, idle: bool) -> None:
        """Note the progress, and wait for messages if there are none."""
        if self._progress.changes or time.monotonic() - self._progress.noted_at > _NOTE_EVERY:
            if idle:
                seq = self._reader.end(self._state.consumer_id, self._progress.place.seq)
                self._progress.place = Place(seq, self._progress.place.lsn)
            self._note()
        self._watch_copy()
        if idle:
            self._reader.wait(_WAIT)

    def _watch_copy(self) -> None:
        """Note the end of the snapshot, from which on a missing row is a mistake."""
        if self._state.strict_from is None and not self._reader.is_copying(self._state.consumer_id):
            self._state.strict_from = self._reader.log_end()
            self._reader.be_strict(self._state.consumer_id, self._state.strict_from)

    def _may_run(self) -> bool:
        """Return whether neither a person nor an error has stopped the mirror."""
        state = self._reader.state()
        return (
            state is not None
            and not state.paused
            and state.stopped is None
            and state.consumer_id == self._state.consumer_id
        )
