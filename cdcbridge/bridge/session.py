"""The loop of a streaming session: read, append, confirm. Read top to bottom.

It neither decodes nor routes nor filters, and never confirms what the store has not committed. Whatever breaks ends the
session; the next one starts from what the store holds.
"""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Callable
from typing import Final

from cdcbridge.backfill.worker import Session
from cdcbridge.bridge.appender import Appender
from cdcbridge.bridge.preparation import Ready
from cdcbridge.changes.events import Relation
from cdcbridge.changes.in_progress import Spill
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.position import Progress
from cdcbridge.changes.wal2json import Wal2jsonDecoder
from cdcbridge.config import Config
from cdcbridge.database import Connection, store_errors
from cdcbridge.errors import CaptureChanged, CdcbridgeError, OperatorNeeded, SourceUnavailable, StoreUnavailable
from cdcbridge.instants import reach, reach_each
from cdcbridge.lsn import format_lsn
from cdcbridge.observe.health import Health
from cdcbridge.routing.batch import Batch
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.refused_messages import Refused
from cdcbridge.routing.server_notices import Notices
from cdcbridge.routing.table_guard import TableGuard
from cdcbridge.source.catalog import SourceCatalog
from cdcbridge.source.replication import ReplicationStream
from cdcbridge.store.leadership import Lead
from cdcbridge.store.log import Store

BATCH_ROWS: Final = 5_000  # rows worth an append of their own: enough that its commit costs little
BATCH_BYTES: Final = 4 << 20  # and bytes
WAITING_BATCHES: Final = 2  # what may be collected while an append is under way, in such batches; then reading stops
READ_BYTES: Final = 512 << 10  # read before looking whether the append is done
LOOK_INTERVAL: Final = 0.5  # seconds between two looks at what is captured
_STATUS_SHARE: Final = 4  # status updates in one wal_sender_timeout
_LONGEST_STATUS_INTERVAL: Final = 1.0
_LOOK_AGAIN: Final = 0.2  # at the end, whether the append is done or the lead lost
_GENTLE_FOR: Final = 1.0  # seconds after a change
_READS_WAIT: Final = 0.1  # then a chunk of a backfill goes with changes, if these leave no time between them


class Pump:
    """One streaming session: the loop, and its state. It ends when it is stopped, or when `lead` is lost."""

    def __init__(
        self,
        config: Config,
        store: Store,
        stream: ReplicationStream,
        ready: Ready,
        catalog: SourceCatalog,
        stop_fd: int,
        backfills: Session,
        lead: Lead,
        health: Health,
        blocks: Connection,
    ) -> None:
        self._stream = stream
        self._ready = ready
        self._catalog = catalog
        self._refused = Refused()
        self._decoder = _decoder(ready, catalog, stream.last_lsn)
        self._blocks = blocks  # a session of the main loop's own: the other one is the appender's
        tail = ready.tail
        self._collector = Collector(
            ready.router,
            ready.partitions,
            tail.position,
            tail.end_lsn,
            backfills.handed,
            TableGuard(ready.router, catalog.has_identity, catalog.columns(), ready.left_out),
        )
        self._notices = Notices(self._collector, ready.router, self._found, ready.left_out, ready.missing)
        stream.on_notice = self._notices.note
        self._spill = Spill(stream, self._collector.spill, self._read_block, self._collector.unspill)
        self._progress = Progress(tail.end_lsn, tail.end_lsn, tail.end_lsn, tail.end_lsn)
        self._store = store
        self._appender = Appender(store)
        self._idle_interval = config.source.heartbeat_interval
        self._status_interval = _status_interval(ready.wal_sender_timeout)
        self._next_status = self._next_idle_append = 0.0
        self._told = self._looked_at = 0
        self._next_look = 0.0
        self._backfills = backfills
        self._lead = lead
        self._health = health
        self._changes, self._changed_at, self._read_at = 0, 0.0, 0.0
        self._appending = selectors.DefaultSelector()
        self._anything = selectors.DefaultSelector()
        self._leaving = selectors.DefaultSelector()
        self._leaving.register(self._appender, selectors.EVENT_READ)
        self._leaving.register(lead, selectors.EVENT_READ)
        for selector in (self._appending, self._anything):
            selector.register(self._appender, selectors.EVENT_READ)
            selector.register(stop_fd, selectors.EVENT_READ)
            selector.register(lead, selectors.EVENT_READ)
        self._anything.register(stream, selectors.EVENT_READ)

    def run(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set() and not (self._finished_unfinished() or self._patience_served()):
                self._lead.check()
                self._health.beat(self._collector.rows, self._collector.size)
                self._read()
                self._append()
                self._confirm()
                self._sleep()
            self._leave()
        finally:
            while not self._appender.ended(_LOOK_AGAIN):
                if self._lead.lost:
                    self._store.cut_off()  # else the append may wait for a store that is out of reach
            self._appender.close()
            self._leaving.close()
            self._appending.close()
            self._anything.close()

    @property
    def appended(self) -> bool:
        """The session has brought something into the store."""
        return self._progress.durable > self._ready.tail.end_lsn

    # the three steps

    def _read(self) -> None:
        """Decode and collect what has arrived: some rows, up to what may wait."""
        if self._collected(WAITING_BATCHES):
            return
        try:
            messages = self._spill.messages(READ_BYTES)
            if self._ready.plugin == "wal2json":
                messages = self._notices.heeded(messages)
            events = self._decoder.events(reach_each("received", messages))
            self._collector.feed(reach_each("decoded", events, "collected"))
        except OperatorNeeded as error:
            error.hint = error.hint or self._way_on()
            raise
        self._progress.receive(self._collector.end_lsn)

    def _append(self) -> None:
        """Give the appender a batch when it is idle and there is one worth a commit."""
        done = self._finished()
        if done is not None:
            self._stored(done)
            self._next_status = 0.0
        if self._appender.busy:
            return
        self._collector.add_reads(beside=not self._gentle() or time.monotonic() > self._read_at + _READS_WAIT)
        worth_it = self._collected(1) or (self._collector.waiting and self._spill.drained and not self._collector.open)
        if worth_it or self._spill.waiting or self._idle_append_due():
            self._submit()

    def _confirm(self) -> None:
        """Tell PostgreSQL how far the store is: after each append, on its wish, and in time for its timeout."""
        written = self._progress.durable
        idle = self._spill.drained and not (self._collector.open or self._collector.waiting or self._appender.busy)
        if idle and not self._ready.finishing:
            # Nothing is open or unflushed, so what the server says it has sent through is done with.
            self._collector.idle(self._stream.wal_end)
            self._progress.receive(self._collector.end_lsn)
            written = self._progress.received
        now = time.monotonic()
        self._vouch(now)
        if now >= self._next_status or self._stream.reply_wanted or written > self._told:
            # Reported as written: up to here nothing waits to be appended. `lag` tells idle from busy by it.
            self._stream.confirm(written, self._progress.confirm())
            self._next_status, self._told = now + self._status_interval, written

    def _vouch(self, now: float, *, ending: bool = False) -> None:
        """Look whether what is durable is all that the consumers want, before it is confirmed (source/capture.py).

        Raises CaptureChanged where changes may be missing.
        """
        received, durable = self._progress.received, self._progress.durable
        if self._ready.finishing and self._ready.plugin == "pgoutput":
            return  # the next session compares what this one was begun with
        if self._ready.watched is not None:
            if received == self._looked_at and durable == self._progress.vouched:
                return
            if now < self._next_look and not ending:
                return
            self._next_look = now + LOOK_INTERVAL
            if found := self._ready.watched.losses():
                raise CaptureChanged(f"source: {'; '.join(found)}; starting again, behind a gap message")
            self._looked_at = received
        self._progress.vouch(durable)

    # helpers

    def _read_block(self, xid: int, n: int) -> bytes:
        """Of a transaction that was sent in progress and has committed."""
        with store_errors():
            query = "select block from spilled where xid = %s and n = %s"
            row = self._blocks.execute(query, (xid, n), binary=True).fetchone()
        if row is None:
            raise StoreUnavailable(f"store: block {n} of transaction {xid} is gone from spilled; it is sent again")
        return bytes(row[0])

    def _gentle(self) -> bool:
        """Where there are changes, backfills come in small pieces and alone, so that these need not wait for long."""
        now = time.monotonic()
        if self._collector.changes > self._changes:
            self._changes, self._changed_at = self._collector.changes, now
        self._backfills.gentle = now - self._changed_at < _GENTLE_FOR
        return self._backfills.gentle

    def _stored(self, batch: Batch) -> None:
        """It is durable: so far the LSN may be confirmed, and backfills may read on."""
        self._progress.stored(batch.end_lsn)
        self._health.stored(batch)
        self._refused.tell(batch)
        if batch.gap and self._notices.reason:
            self._lead.end(self._notices.reason)
        for xid, n, _ in batch.spilled:
            self._spill.stored(xid, n)
        for chunk, _ in batch.chunks:
            chunk.release()
            self._read_at = time.monotonic()

    def _collected(self, batches: int) -> bool:
        return self._collector.size >= batches * BATCH_BYTES or self._collector.rows >= batches * BATCH_ROWS

    def _submit(self) -> None:
        timeline = self._ready.timeline_on_standby
        if timeline is not None and not self._catalog.is_standby_on(timeline):
            # What is collected may be of a new timeline; what was submitted before is not.
            raise SourceUnavailable("source: the standby was promoted, or follows one that was; starting again")
        self._health.append_begins()
        self._appender.submit(self._collector.take(), self._ready.resume_options, self._catalog.remember())
        reach("submitted")
        self._next_idle_append = time.monotonic() + self._idle_interval

    def _idle_append_due(self) -> bool:
        """Transactions that were nobody's, heartbeats and other databases' WAL move the position too, now and then."""
        return (
            not self._collector.open
            and not self._collector.waiting
            and self._collector.end_lsn > self._progress.durable
            and time.monotonic() >= self._next_idle_append
        )

    def _sleep(self) -> None:
        """Until there is something to do. A full batch waits for the appender alone: that is the back-pressure."""
        full = self._collected(WAITING_BATCHES) or self._spill.waiting
        if not self._spill.drained and not full:
            return
        timeout = max(0.0, self._next_status - time.monotonic())
        if not self._appender.busy and not full:
            timeout = min(timeout, max(0.01, self._next_idle_append - time.monotonic()))
        (self._appending if full else self._anything).select(timeout)

    def _finished_unfinished(self) -> bool:
        """A transaction that an earlier bridge appended in part is complete: go on with today's options."""
        return (
            self._ready.finishing
            and not self._collector.open
            and self._progress.durable > self._ready.tail.end_lsn
            and not self._appender.busy
        )

    def _patience_served(self) -> bool:
        """What took the server's own timeout to get through is through: others need not wait for that long any more."""
        return self._stream.patient and self.appended and not (self._collector.open or self._appender.busy)

    def _finished(self) -> Batch | None:
        """The batch that became durable. What the store refuses for good needs an operator."""
        try:
            return self._appender.finished()
        except CdcbridgeError as error:
            if type(error) is CdcbridgeError:
                batch = self._appender.given
                skip = max(batch.end_lsn, batch.position.commit_lsn + 1 if batch.open else 0)
                raise OperatorNeeded(
                    f"the store refuses an append: {error}",
                    hint=f"`cdcbridge slot skip --to {format_lsn(skip)}` leaves its {len(batch.rows)} messages behind,"
                    " and a gap message in their place.",
                ) from error
            raise

    def _found(self, schema: str, table: str, action: str) -> Relation | None:
        """A captured table as the open transaction has it, for its topic."""
        found = self._catalog.table(schema, table, action, {})
        return found.relation if found.captured else None

    def _way_on(self) -> str:
        """How to leave behind a transaction that cannot be read: the open one.

        Where the server failed before it named the transaction, only the WAL's end is known to lie behind it.
        """
        begun = self._collector.position.commit_lsn if self._collector.open else None
        target = self._catalog.wal_end() if begun is None else begun + 1
        what = "everything up to there" if begun is None else "this transaction"
        return f"`cdcbridge slot skip --to {format_lsn(target)}` leaves {what} behind, and a gap message in its place."

    def _leave(self) -> None:
        """Let the append that is under way end, and tell the server how far things are."""
        while self._appender.busy:
            self._lead.check()
            self._leaving.select(self._status_interval)
            done = self._appender.finished()
            if done is not None:
                self._stored(done)
        self._vouch(time.monotonic(), ending=True)
        self._stream.confirm(self._progress.durable, self._progress.confirm())
        self._stream.finish()


def _decoder(ready: Ready, catalog: SourceCatalog, where: Callable[[], int]) -> PgoutputDecoder | Wal2jsonDecoder:
    types = Types(catalog.lookup_type)
    if ready.plugin == "pgoutput":
        return PgoutputDecoder(types, catalog, where, catalog.to_utf8)
    as_text = "numeric-data-types-as-string" in ready.options
    return Wal2jsonDecoder(types, catalog, where, numbers_as_text=as_text)


def _status_interval(wal_sender_timeout: float) -> float:
    if wal_sender_timeout <= 0:
        return _LONGEST_STATUS_INTERVAL
    return min(_LONGEST_STATUS_INTERVAL, wal_sender_timeout / _STATUS_SHARE)
