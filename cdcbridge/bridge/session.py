"""The loop of a streaming session: read, append, confirm. Read top to bottom.

It neither decodes nor routes nor filters, and never confirms what the store has not committed. Whatever breaks ends the
session; the next one starts from what the store holds.
"""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cdcbridge.backfill.worker import BackfillSession
from cdcbridge.bridge.appender import Appender
from cdcbridge.bridge.pacing import Load, Pacing
from cdcbridge.bridge.preparation import Ready
from cdcbridge.changes.events import Relation
from cdcbridge.changes.in_progress import Spill
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.position import Progress
from cdcbridge.changes.wal2json import Wal2jsonDecoder
from cdcbridge.database import Connection, store_errors
from cdcbridge.errors import CaptureChanged, CdcbridgeError, OperatorNeeded, SourceUnavailable, StoreUnavailable
from cdcbridge.instants import reach, reach_each
from cdcbridge.lsn import format_lsn
from cdcbridge.observe.health import Health
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.refused_messages import Refused
from cdcbridge.routing.server_notices import Notices
from cdcbridge.routing.table_guard import TableGuard
from cdcbridge.source.catalog import SourceCatalog
from cdcbridge.source.replication import ReplicationStream
from cdcbridge.store.leadership import Lead
from cdcbridge.store.log import BridgeStore

READ_BYTES: Final = 512 << 10  # read before looking whether the append is done
_LOOK_AGAIN: Final = 0.2  # at the end, whether the append is done or the lead lost


class _Readable(Protocol):
    def fileno(self) -> int: ...


@dataclass(slots=True, frozen=True)
class SessionParts:
    """What a session works with, all of it made and ready.

    stream: has begun to send.
    blocks: a session on the store for the main loop alone; the store's own is the appender's.
    """

    store: BridgeStore
    stream: ReplicationStream
    ready: Ready
    catalog: SourceCatalog
    backfills: BackfillSession
    lead: Lead
    health: Health
    blocks: Connection


class StreamingSession:
    """The loop, and its state. It ends when it is stopped, or when the lead is lost.

    stop_fd: a file number that becomes readable when the session is to stop.
    """

    def __init__(self, parts: SessionParts, pacing: Pacing, stop_fd: int) -> None:
        self._stream, self._ready, self._catalog = parts.stream, parts.ready, parts.catalog
        self._store, self._blocks = parts.store, parts.blocks
        self._backfills, self._lead, self._health = parts.backfills, parts.lead, parts.health
        self._pacing = pacing
        self._refused = Refused()
        self._decoder = _decoder(self._ready, self._catalog, self._stream.last_lsn)
        ready, tail = self._ready, self._ready.tail
        self._collector = Collector(
            ready.router,
            ready.partitions,
            tail.position,
            tail.end_lsn,
            self._backfills.handed.take,
            TableGuard(ready.router, self._catalog.has_identity, self._catalog.columns(), ready.left_out),
        )
        self._notices = Notices(self._collector, ready.router, self._found, ready.left_out, ready.missing)
        self._stream.on_notice = self._notices.note
        self._spill = Spill(self._stream, self._collector.spill, self._read_block, self._collector.unspill)
        self._progress = Progress(tail.end_lsn, tail.end_lsn, tail.end_lsn, tail.end_lsn)
        self._appender = Appender(self._store)
        self._leaving = _selector(self._appender, self._lead)
        self._appending = _selector(self._appender, self._lead, stop_fd)
        self._anything = _selector(self._appender, self._lead, stop_fd, self._stream)

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
            while not self._appender.stop_within(_LOOK_AGAIN):
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
        if self._load().full:
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
        done = self._take_appended()
        if done is not None:
            self._stored(done)
        if self._appender.busy:
            return
        now = time.monotonic()
        self._pacing.note_changes(self._collector.changes, now)
        self._backfills.gentle = self._pacing.gentle(now)
        self._collector.add_reads(beside=self._pacing.chunk_due(now))
        if self._pacing.append_due(self._load(), now):
            self._submit()

    def _confirm(self) -> None:
        """Tell PostgreSQL how far the store is."""
        written = self._progress.durable
        load = self._load()
        idle = load.drained and not (load.open or load.waiting or self._appender.busy)
        if idle and not self._ready.finishing:
            # Nothing is open or unflushed, so what the server says it has sent through is done with.
            self._collector.idle(self._stream.wal_end)
            self._progress.receive(self._collector.end_lsn)
            written = self._progress.received
        now = time.monotonic()
        self._vouch(now)
        if self._pacing.confirm_due(written, now, wanted=self._stream.reply_wanted):
            # Reported as written: up to here nothing waits to be appended. `lag` tells idle from busy by it.
            self._stream.confirm(written, self._progress.confirm())
            self._pacing.note_confirmed(written, now)

    def _vouch(self, now: float, *, ending: bool = False) -> None:
        """Look whether what is durable is all that the consumers want, before it is confirmed (source/capture.py).

        Raises CaptureChanged where changes may be missing.
        """
        received, durable = self._progress.received, self._progress.durable
        if self._ready.finishing and self._ready.plugin == "pgoutput":
            return  # the next session compares what this one was begun with
        if self._ready.watched is not None:
            if not self._pacing.look_due(self._progress, now, ending=ending):
                return
            self._pacing.note_look(received, now)
            if found := self._ready.watched.losses():
                raise CaptureChanged(f"source: {'; '.join(found)}; starting again, behind a gap message")
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

    def _load(self) -> Load:
        collected = self._collector
        return Load(
            collected.rows,
            collected.size,
            collected.open,
            collected.waiting,
            self._spill.drained,
            self._spill.waiting,
            collected.end_lsn > self._progress.durable,
        )

    def _stored(self, batch: AppendBatch) -> None:
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
        self._pacing.note_stored(chunks=bool(batch.chunks), now=time.monotonic())

    def _submit(self) -> None:
        timeline = self._ready.timeline_on_standby
        if timeline is not None and not self._catalog.is_standby_on(timeline):
            # What is collected may be of a new timeline; what was submitted before is not.
            raise SourceUnavailable("source: the standby was promoted, or follows one that was; starting again")
        self._health.append_begins()
        self._appender.submit(self._collector.take(), self._ready.resume_options, self._catalog.remember())
        reach("submitted")
        self._pacing.note_submitted(time.monotonic())

    def _sleep(self) -> None:
        """Until there is something to do. A full batch waits for the appender alone."""
        load = self._load()
        full = load.full or load.spilling
        if load.drained or full:
            wait = self._pacing.longest_wait(load, time.monotonic(), appending=self._appender.busy)
            (self._appending if full else self._anything).select(wait)

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

    def _take_appended(self) -> AppendBatch | None:
        """The batch that became durable. What the store refuses for good needs an operator."""
        try:
            return self._appender.take_durable()
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
            self._leaving.select(self._pacing.status_interval)
            done = self._appender.take_durable()
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


def _selector(*sources: int | _Readable) -> selectors.BaseSelector:
    """Wait for the first of these that becomes readable."""
    selector = selectors.DefaultSelector()
    for one in sources:
        selector.register(one, selectors.EVENT_READ)
    return selector
