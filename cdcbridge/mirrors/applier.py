"""The thread of one mirror: read the log, apply whole transactions to the target, note how far it is.

Read ApplierSession.run() from top to bottom. A transaction of the source is applied whole or not at all, and the
target's commit contains the place. Any error ends the session. The next one continues from the place that the target
has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

import psycopg
import structlog

from cdcbridge.background import Background
from cdcbridge.config import Config, Mirror
from cdcbridge.database import server_errors, target_errors
from cdcbridge.errors import CdcbridgeError, SourceUnavailable, StoreUnavailable, TargetUnavailable
from cdcbridge.instants import reach
from cdcbridge.mirrors.applying import Applying
from cdcbridge.mirrors.careful import Careful
from cdcbridge.mirrors.changes import MirrorChunk, MirrorRow, take_apart
from cdcbridge.mirrors.conflicts import count_held
from cdcbridge.mirrors.directions import ApplyHistory, ApplyOneWay, ApplyTwoWay, Direction
from cdcbridge.mirrors.log_reader import LogReader, Marks, MirrorState
from cdcbridge.mirrors.peer_log import BehindPeer, PeerLog
from cdcbridge.mirrors.place import begin_at
from cdcbridge.mirrors.read_ahead import AHEAD_ROWS, ReadAhead
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.target import Place, TargetSession
from cdcbridge.mirrors.target_tables import TargetTables
from cdcbridge.routing.copy_format import GAP_TOPIC

_WAIT: Final = 0.5  # seconds until the next look at the log, if no notification arrives
_NOTE_EVERY: Final = 0.5  # seconds between two notes in the source's store
_RETRY: Final = (0.2, 10.0)  # seconds: the shortest and the longest wait after an error
_COPY_EVERY: Final = 1.0  # seconds between two looks for backfills
_HOLDS_EVERY: Final = 1.0  # seconds between two looks at the rows on hold
_TRIES: Final = 10  # attempts to decide once more, against clashes
_TELL_EVERY: Final = 10.0  # seconds between two log lines about clashes with other sessions
_MOST: Final = 10_000  # the most source transactions that are applied in one commit
# Another session waits for us, or we have waited for it too long.
_CLASHES: Final = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.LockNotAvailable,
)
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
        self._told = ""

    def _work(self) -> None:
        wait = _RETRY[0]
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                with ExitStack() as stack, server_errors():
                    ApplierSession(self._config, self.mirror, self._stop.is_set, stack).run()
                self._stop.wait(_WAIT)  # paused, stopped, or not in the store yet
            except CdcbridgeError as error:
                if time.monotonic() - began > _RETRY[1]:
                    self._told = ""  # it has worked in between
                self._note(error)
                wait = _RETRY[0] if time.monotonic() - began > _RETRY[1] else min(2 * wait, _RETRY[1])
                self._stop.wait(wait)

    def _note(self, error: CdcbridgeError) -> None:
        """Store the error. An error that passes by itself is tried again, and any other one stops the mirror."""
        if str(error) != self._told:  # an error that lasts is logged once
            self._told = str(error)
            log.warning("mirror.failed", mirror=self.mirror.name, error=str(error), hint=error.hint)
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


class ApplierSession:
    """The sessions and the loop of an applier, from its beginning to the first error.

    Args:
        config: The configuration.
        mirror: The mirror.
        stopping: Returns whether the loop has to end.
        stack: Closes the sessions.
    """

    def __init__(self, config: Config, mirror: Mirror, stopping: Callable[[], bool], stack: ExitStack) -> None:
        self._config = config
        self._mirror = mirror
        self._stopping = stopping
        self._reader = stack.enter_context(closing(LogReader(config, mirror)))
        self._stack = stack
        self._pending = MirrorChunk([])  # messages that were read and not applied yet
        self._most = _MOST
        self._tell_clash_at = 0.0
        self._look_at_holds_at = 0.0
        self._look_at_copy_at = 0.0
        self._noted_seq = -1

    def run(self) -> None:
        """Wait until the mirror may run, and apply the log until it is paused, stopped or ended."""
        while (state := self._reader.state()) is None or state.paused or state.stopped is not None:
            if self._stopping():
                return
            self._reader.wait(_WAIT)
        self._prepare(state)
        while not self._stopping() and self._may_run():
            piece = self._take()
            if piece.rows:
                self._apply_piece(piece)
            elif self._target.open:
                raise StoreUnavailable("store: the log has no end of a transaction that it had complete")
            if not self._target.open and len(self._pending.rows) < AHEAD_ROWS:
                self._rest(idle=not piece.rows)
        if self._target.open:
            self._target.roll_back()  # a part of a large transaction, whose end is not applied: its place is void, too
        else:
            self._note()

    def _prepare(self, state: MirrorState) -> None:
        self._state = state
        self._side = self._reader.identity()
        self._target = self._stack.enter_context(closing(TargetSession(self._mirror, self._side)))
        self._source = self._stack.enter_context(closing(SourceTables(self._config.source_dsn)))
        self._target.prepare()
        self._other = self._target.identity()
        self._tables = TargetTables(self._mirror, self._source, self._target.connection)
        self._direction = self._choose_direction()
        self._reader.be_present(state.consumer_id)
        self._held = -1  # not known
        self._count_held()
        before = self._target.place()
        place = begin_at(self._mirror.name, state, before, self._reader)
        if before is not None and place.seq < before.seq:
            self._target.go_back(place)
        self._progress = _Progress(place)
        self._ahead = self._stack.enter_context(closing(ReadAhead(self._reader, state.consumer_id)))
        self._reader.listen()
        reach("mirror prepared")
        log.info("mirror.started", mirror=self._mirror.name, after_seq=place.seq, origin=self._target.origin)

    def _choose_direction(self) -> Direction:
        mirror, target, tables = self._mirror, self._target, self._tables
        applying = Applying(mirror, target, tables, self._source)
        if mirror.apply == "append":
            return ApplyHistory(applying)
        peer = None
        if mirror.two_way is not None:
            peer = self._stack.enter_context(closing(PeerLog(mirror, self._side)))
            peer.require_peer(self._other)
        careful = Careful(mirror, target, tables, self._source, applying, (self._side, self._other), peer)
        if peer is not None:
            return ApplyTwoWay(target, applying, careful, peer, mirror.name, self._other)
        return ApplyOneWay(target, applying, careful, in_order=mirror.triggers == "fire")

    # one piece of the log

    def _take(self) -> MirrorChunk:
        """Return the messages of the next whole transactions, or a part of one that is larger than a chunk.

        After an error, fewer transactions are taken together, see _smaller().
        """
        if not self._pending.rows:
            self._pending = self._ahead.take(self._progress.place.seq)
            if len(self._pending.rows) >= AHEAD_ROWS:
                self._ahead.begin(self._pending.rows[-1].seq)
        ends = self._pending.ends()
        if not ends:
            return self._pending
        most = 1 if self._target.open else self._most  # in the middle of a transaction that is larger than a chunk
        return MirrorChunk(self._pending.rows[: ends[min(most, len(ends)) - 1]])

    def _apply_piece(self, piece: MirrorChunk) -> None:
        """Apply these messages, and commit if they end with a whole transaction."""
        rows = piece.rows
        marks = self._reader.marks(rows, self._other)
        taken = [row for row in rows if not marks.is_foreign(row.lsn) or row.is_own]
        before, continued = replace(self._progress), self._target.open
        try:
            self._progress.conflicts += self._apply(taken, marks)
            self._advance(rows[-1], len(taken))
            if self._target.open and piece.whole:
                self._commit()
        except CdcbridgeError as error:
            self._target.roll_back()
            self._tables.forget()  # those that were created are not there any more
            self._progress = before
            if continued or not self._smaller(rows, error):
                raise
            return
        except BaseException:
            self._target.roll_back()
            raise
        if time.monotonic() - self._progress.noted_at > _NOTE_EVERY:
            self._note()  # after the commit: its errors must not be taken for those of the transaction
        self._most = min(2 * self._most, _MOST)
        self._pending = MirrorChunk(self._pending.rows[len(rows) :], self._pending.whole)
        if isinstance(self._direction, ApplyTwoWay) and not self._target.open:
            self._settle(self._direction, marks)

    def _apply(self, rows: Sequence[MirrorRow], marks: Marks) -> int:
        if not rows:
            return 0
        if not self._target.open:
            if isinstance(self._direction, ApplyTwoWay):
                self._direction.begin()
            self._target.begin(rows[-1].lsn)
            reach("mirror begun")
        changes = [take_apart(row) for row in rows if row.topic != GAP_TOPIC]
        for topic in {change.row.topic for change in changes}:
            table = self._tables.get(topic)  # before any savepoint, whose end would undo the creation of a table
            if isinstance(self._direction, ApplyTwoWay):
                self._direction.require_table(table)
        for row in rows:
            if row.topic == GAP_TOPIC:
                self._tell_gap(row)
        strict = self._state.strict_from is not None and rows[0].seq > self._state.strict_from
        with target_errors():
            conflicts = self._direction.apply(changes, marks, strict=strict)
        reach("mirror applied")
        return conflicts

    def _advance(self, last: MirrorRow, changes: int) -> None:
        self._progress.place = Place(last.seq, last.lsn)
        self._progress.changes += changes
        if changes:
            self._progress.commit_time = last.commit_time

    def _smaller(self, rows: Sequence[MirrorRow], error: CdcbridgeError) -> bool:
        """Take fewer transactions together from now on. Return whether that may help against the error.

        A clash with other sessions is less likely for fewer rows. Any other error is brought down to the transaction
        that causes it, so that those before it are applied.
        """
        transactions = len({row.lsn for row in rows})
        if isinstance(error, BehindPeer):
            self._tell_clash(error, transactions)
            self._reader.wait(_WAIT)  # the locks are free meanwhile
            return True
        if isinstance(error.__cause__, _CLASHES):
            self._most = max(transactions // 4, 1)
            self._tell_clash(error, transactions)
            return True
        if transactions == 1 or isinstance(error, _PASSING):
            return False
        self._most = 1
        return True

    def _tell_clash(self, error: CdcbridgeError, transactions: int) -> None:
        if time.monotonic() > self._tell_clash_at:
            self._tell_clash_at = time.monotonic() + _TELL_EVERY
            log.warning("mirror.clash", mirror=self._mirror.name, transactions=transactions, error=str(error))
            self._reader.fails(self._state.consumer_id, str(error))

    def _tell_gap(self, row: MirrorRow) -> None:
        text = f"the source's log has a gap: {row.data}. Compare the tables with `cdcbridge mirror verify`"
        log.warning("mirror.gap", mirror=self._mirror.name, message=text)
        self._reader.note(self._state.consumer_id, text)

    def _settle(self, direction: ApplyTwoWay, marks: Marks) -> None:
        """Decide once more what the transaction could not lock. It is committed, so a clash is tried again here."""
        for left in reversed(range(_TRIES)):
            try:
                with target_errors():
                    direction.settle(marks)
                return
            except CdcbridgeError as error:
                self._target.roll_back()
                if not left or not (isinstance(error, BehindPeer) or isinstance(error.__cause__, _CLASHES)):
                    raise

    # commits and notes

    def _commit(self) -> None:
        place = self._progress.place
        reach("mirror about to commit")
        self._target.commit(place, self._target.marked, self._progress.commit_time)
        reach("mirror committed")
        self._progress.target_seq = place.seq
        self._progress.transactions += 1

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
        if done.conflicts or (self._held and done.changes):
            self._count_held()
        self._noted_seq = done.place.seq
        self._progress = _Progress(done.place)

    def _count_held(self) -> None:
        """Note how many conflicts wait for a decision, which later writes of their rows may have made."""
        with target_errors():
            held = count_held(self._target.connection, self._mirror.name)
        if held != self._held:
            self._reader.note_held(self._state.consumer_id, held)
            self._held = held

    def _rest(self, *, idle: bool) -> None:
        """Note the progress, and wait for messages if there are none."""
        if self._progress.changes or time.monotonic() - self._progress.noted_at > _NOTE_EVERY:
            if idle:
                seq = self._reader.end(self._state.consumer_id, self._progress.place.seq)
                self._progress.place = Place(seq, self._progress.place.lsn)
            if self._progress.place.seq != self._noted_seq or self._progress.transactions:
                self._note()
        if time.monotonic() > self._look_at_copy_at:
            self._look_at_copy_at = time.monotonic() + _COPY_EVERY
            self._watch_copy()
        if isinstance(self._direction, ApplyTwoWay) and time.monotonic() > self._look_at_holds_at:
            self._look_at_holds_at = time.monotonic() + _HOLDS_EVERY
            with target_errors():
                self._direction.watch_holds()
        if idle:
            self._reader.wait(_WAIT)

    def _watch_copy(self) -> None:
        """Note the beginning and the end of backfills, outside of which a missing row is a mistake."""
        copying = self._reader.is_copying(self._state.consumer_id)
        if copying == (self._state.strict_from is None):
            return
        self._state.strict_from = None if copying else self._reader.log_end()
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
