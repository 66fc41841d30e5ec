"""Run the loop of a streaming session: read, append, confirm.

Read this file from top to bottom. The loop neither decodes nor routes nor filters. It never confirms an LSN before the
store has committed everything up to it. Any error ends the streaming session. The next one starts from the position
that the store holds.
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

READ_BYTES: Final = 512 << 10  # bytes to read before the loop checks whether the append is done
_LOOK_AGAIN: Final = 0.2  # seconds between two checks, at the end, whether the append is done or the lead is lost


class _Readable(Protocol):
    def fileno(self) -> int: ...


@dataclass(slots=True, frozen=True)
class SessionParts:
    """The objects that a streaming session works with, all of them ready.

    Attributes:
        stream: The replication stream, which has begun to send.
        blocks: A database session on the store for the main loop alone. The one inside `store` belongs to the appender.
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
    """The loop of a streaming session, and its state.

    The loop ends when the bridge is stopped. Streaming sessions of two kinds also end by themselves, see
    _finished_unfinished() and _patience_served(). If the lead is lost, the loop raises an error.

    Args:
        parts: The objects that the loop works with.
        pacing: The decisions when to act.
        stop_fd: A file descriptor that becomes readable when the loop has to stop.
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
            tail.effective_time,
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
                    self._store.cut_off()  # otherwise the append may wait for a store that is out of reach
            self._appender.close()
            self._leaving.close()
            self._appending.close()
            self._anything.close()

    @property
    def appended(self) -> bool:
        """Return whether this session has brought anything into the store."""
        return self._progress.durable > self._ready.tail.end_lsn

    # the three steps

    def _read(self) -> None:
        """Decode and collect about READ_BYTES of the messages that have arrived.

        Nothing is read while the collected work has reached its limit. An OperatorNeeded error without a hint gets one
        here: how to skip the transaction.
        """
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
        """Handle a finished append. Give the appender the next batch if it is idle and an append is due."""
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
        """Report to PostgreSQL how far the store is, if a report is due."""
        written = self._progress.durable
        load = self._load()
        idle = load.drained and not (load.open or load.waiting or self._appender.busy)
        if idle and not self._ready.finishing:
            # No transaction is open, and nothing waits for an append, so everything that the server has sent is done.
            self._collector.idle(self._stream.wal_end)
            self._progress.receive(self._collector.end_lsn)
            written = self._progress.received
        now = time.monotonic()
        self._vouch(now)
        if self._pacing.confirm_due(written, now, wanted=self._stream.reply_wanted):
            # The LSN `written` means that nothing before it waits for an append. `lag` uses it to distinguish an idle
            # bridge from a busy one.
            self._stream.confirm(written, self._progress.confirm())
            self._pacing.note_confirmed(written, now)

    def _vouch(self, now: float, *, ending: bool = False) -> None:
        """Check that the durable changes are all changes that the consumers want, before their LSN is confirmed.

        See source/capture.py. Raises CaptureChanged if changes may be missing.
        """
        received, durable = self._progress.received, self._progress.durable
        if self._ready.finishing and self._ready.plugin == "pgoutput":
            return  # the next streaming session compares the capture of this one
        if self._ready.watched is not None:
            if not self._pacing.look_due(self._progress, now, ending=ending):
                return
            self._pacing.note_look(received, now)
            if found := self._ready.watched.losses():
                raise CaptureChanged(f"source: {'; '.join(found)}. The bridge starts again and sends a gap message")
        self._progress.vouch(durable)

    # helpers

    def _read_block(self, xid: int, n: int) -> bytes:
        """Return block `n` of transaction `xid`, which was sent in progress and has committed."""
        with store_errors():
            query = "select block from spilled where xid = %s and n = %s"
            row = self._blocks.execute(query, (xid, n), binary=True).fetchone()
        if row is None:
            raise StoreUnavailable(
                f"store: block {n} of transaction {xid} is missing in the table spilled. The source sends it again"
            )
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
        """Record that the batch is durable.

        From now on its LSN may be confirmed, its blocks may be read back, and the backfills of its chunks may read on.
        The streaming session ends if the batch has the gap message of a table that lost its replica identity during it.
        """
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
            # The collected changes may belong to a new timeline. Batches that were submitted before do not.
            raise SourceUnavailable(
                "source: the standby was promoted, or follows one that was. The bridge starts again"
            )
        self._health.append_begins()
        self._appender.submit(self._collector.take(), self._ready.resume_options, self._catalog.remember())
        reach("submitted")
        self._pacing.note_submitted(time.monotonic())

    def _sleep(self) -> None:
        """Wait until there is something to do.

        While a full batch, or a block that must be stored first, waits for the appender, new messages do not end the
        wait.
        """
        load = self._load()
        full = load.full or load.spilling
        if load.drained or full:
            wait = self._pacing.longest_wait(load, time.monotonic(), appending=self._appender.busy)
            (self._appending if full else self._anything).select(wait)

    def _finished_unfinished(self) -> bool:
        """Return whether the transaction that an earlier bridge appended in part is complete.

        The streaming session then ends, and the next one continues with today's options.
        """
        return (
            self._ready.finishing
            and not self._collector.open
            and self._progress.durable > self._ready.tail.end_lsn
            and not self._appender.busy
        )

    def _patience_served(self) -> bool:
        """Return whether the work that needed the server's own timeout is done.

        A stream is patient if the streaming session before it ended without an append. It then leaves
        wal_sender_timeout as the server has it, although other bridges may have to wait for the slot that long. Once
        something is appended, the next stream can use the short timeout again.
        """
        return self._stream.patient and self.appended and not (self._collector.open or self._appender.busy)

    def _take_appended(self) -> AppendBatch | None:
        """Return the batch that became durable, or None.

        Raises OperatorNeeded if the store refuses the batch and a retry cannot help.
        """
        try:
            return self._appender.take_durable()
        except CdcbridgeError as error:
            if type(error) is CdcbridgeError:
                batch = self._appender.given
                skip = max(batch.end_lsn, batch.position.commit_lsn + 1 if batch.open else 0)
                raise OperatorNeeded(
                    f"the store refuses an append: {error}",
                    hint=f"`cdcbridge slot skip --to {format_lsn(skip)}` skips its {len(batch.rows)} messages, and"
                    " sends a gap message instead of them.",
                ) from error
            raise

    def _found(self, schema: str, table: str, action: str) -> Relation | None:
        """Return the relation of a captured table as the open transaction sees it, or None.

        The caller needs the topic, which a partition has from its root.
        """
        found = self._catalog.table(schema, table, action, {})
        return found.relation if found.captured else None

    def _way_on(self) -> str:
        """Return a hint: the command that skips the open transaction, which cannot be read.

        If the server failed before it named the transaction, the command skips everything up to the end of the WAL.
        Only that LSN is then known to lie after the transaction.
        """
        begun = self._collector.position.commit_lsn if self._collector.open else None
        target = self._catalog.wal_end() if begun is None else begun + 1
        what = "everything up to there" if begun is None else "this transaction"
        return f"`cdcbridge slot skip --to {format_lsn(target)}` skips {what}, and sends a gap message instead."

    def _leave(self) -> None:
        """Let the append in progress finish, and report the final position to the server."""
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
    """Return a selector that waits for the first of these to become readable."""
    selector = selectors.DefaultSelector()
    for one in sources:
        selector.register(one, selectors.EVENT_READ)
    return selector
