"""The bridge: from the slot to the store, and back the LSN that PostgreSQL may forget. Read top to bottom.

A session takes the lead, compares histories, and pumps: read, append, confirm. It neither decodes nor routes nor
filters, and never confirms what the store has not committed. Whatever breaks ends the session; the next one starts
from what the store holds.
"""

from __future__ import annotations

import os
import re
import selectors
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog
import tenacity

from cdcbridge.appender import Appender
from cdcbridge.backfill import Session
from cdcbridge.backfiller import Backfiller
from cdcbridge.batch import Batch
from cdcbridge.catalog import SourceCatalog
from cdcbridge.check import refuse_unwritable
from cdcbridge.collect import Collector
from cdcbridge.config import Config
from cdcbridge.database import connect_source
from cdcbridge.decoders.pgoutput import PgoutputDecoder
from cdcbridge.decoders.wal2json import Wal2jsonDecoder
from cdcbridge.errors import (
    CdcbridgeError,
    ConfigError,
    Fenced,
    NotLeader,
    OperatorNeeded,
    SourceUnavailable,
    StoreUnavailable,
)
from cdcbridge.housekeeping import Housekeeper
from cdcbridge.lsn import format_lsn
from cdcbridge.pgtypes import Types
from cdcbridge.position import Progress
from cdcbridge.replication import ReplicationStream
from cdcbridge.setup import Ready, prepare
from cdcbridge.store import Store

BATCH_ROWS: Final = 5_000  # rows worth an append of their own: enough that its commit costs little
BATCH_BYTES: Final = 4 << 20  # and bytes
WAITING_BATCHES: Final = 2  # what may be collected while an append is under way, in such batches; then reading stops
# The appender mostly waits for the server, and after each wait it needs the interpreter lock, which the decoding thread
# gives up only this often. At Python's 5 ms every round trip of an append would cost 5 ms.
SWITCH_INTERVAL: Final = 0.0001
READ_BYTES: Final = 512 << 10  # read before looking whether the append is done
_STATUS_SHARE: Final = 4  # status updates in one wal_sender_timeout
_LONGEST_STATUS_INTERVAL: Final = 1.0
_STANDBY_INTERVAL: Final = 1.0
_GENTLE_FOR: Final = 1.0  # seconds after a change
_READS_WAIT: Final = 0.1  # then a chunk of a backfill goes with changes, if these leave no time between them
_LOST: Final = re.compile(r'no tuple identifier for (UPDATE|DELETE) in table "(.+)"\."(.+)"')
log = structlog.get_logger()


class Bridge:
    """run() until stop(); `wait` False gives up at once where another bridge leads. `consistent`: see prepare().

    `reload` gives the configuration anew before each session.
    """

    def __init__(
        self,
        config: Config,
        *,
        wait: bool = True,
        reload: Callable[[], Config] | None = None,
        consistent: bool = False,
    ) -> None:
        self._config = config
        self._reload = reload
        self._wait = wait
        self._consistent = consistent
        self._stopping = threading.Event()
        self._stop_read, self._stop_write = os.pipe()
        self._streamed = False

    def stop(self) -> None:
        """End after the append that is under way. Safe in a signal handler and from another thread."""
        self._stopping.set()
        os.write(self._stop_write, b"x")

    def run(self) -> None:
        """Stream until stopped. Servers that go away are waited for; what needs an operator is raised."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        again = (SourceUnavailable, StoreUnavailable, NotLeader if self._wait else Fenced)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(again),
            wait=self._backoff,
            sleep=self._stopping.wait,  # type: ignore[arg-type]
            stop=tenacity.stop_when_event_set(self._stopping),
            before_sleep=_tell_retry,
            reraise=True,
        )
        while not self._stopping.is_set():
            self._streamed = False
            try:
                retrying(self._session)
            except again:
                if not self._stopping.is_set():
                    raise
        log.info("bridge.stopped")

    def _backoff(self, state: tenacity.RetryCallState) -> float:
        """Exponential with jitter, from 0.1 s to 10 s; anew after each session that streamed."""
        if self._streamed:
            state.attempt_number, self._streamed = 1, False
        return tenacity.wait_random_exponential(multiplier=0.1, max=10)(state)

    def _session(self) -> None:
        if self._reload is not None:
            try:
                self._config = self._reload()
            except ConfigError as error:
                log.warning("config.kept", error=str(error))
        store = Store(self._config.store_dsn, self._config.store.schema_)
        try:
            if self._take_lead(store):
                self._lead(store)
        finally:
            store.close()

    def _take_lead(self, store: Store) -> bool:
        """Whether this bridge leads now; as stand-by it waits for the lead, False when stopped meanwhile."""
        told = False
        refuse_unwritable(self._config, store.connection)
        store.migrate()
        while not store.try_lead():
            if not self._wait:
                raise NotLeader(f"another bridge leads: {store.leader()}")
            if not told:
                log.info("bridge.standby", leader=store.leader())
                told = True
            if self._stopping.wait(_STANDBY_INTERVAL):
                return False
        return True

    def _lead(self, store: Store) -> None:
        """Prepare both sides, then stream until stopped, or until a transaction begun under older options is done."""
        notices: list[str] = []
        stream = ReplicationStream(self._config.source_dsn, notices.append)
        try:
            # The epoch before anything is read: an older bridge that still hangs can append nothing after that.
            epoch = store.begin_epoch()
            ready = prepare(self._config, store, stream, consistent=self._consistent, stopped=self._stopping.is_set)
            log.info(
                "bridge.streaming",
                slot=self._config.source.slot,
                plugin=ready.plugin,
                epoch=epoch,
                start_lsn=format_lsn(ready.tail.end_lsn),
                position=str(ready.tail.position),
                consumers=len(ready.subscriptions),
            )
            with (
                connect_source(self._config.source_dsn, "cdcbridge catalog") as catalog_session,
                Housekeeper(self._config),
                Backfiller(Session(self._config, epoch, ready.router), idle=ready.finishing) as backfiller,
            ):
                catalog = SourceCatalog(catalog_session, ready.router, store.catalog())
                ready.start(stream, self._config.source.slot)
                self._streamed = True
                pump = _Pump(self._config, store, stream, ready, catalog, notices, self._stop_read, backfiller.session)
                pump.run(self._stopping)
        finally:
            stream.close()


class _Pump:
    """One streaming session: the loop, and its state."""

    def __init__(
        self,
        config: Config,
        store: Store,
        stream: ReplicationStream,
        ready: Ready,
        catalog: SourceCatalog,
        notices: list[str],
        stop_fd: int,
        backfills: Session,
    ) -> None:
        self._stream = stream
        self._ready = ready
        self._catalog = catalog
        self._notices = notices
        self._decoder = _decoder(ready, catalog, stream.last_lsn)
        tail = ready.tail
        self._collector = Collector(ready.router, ready.partitions, tail.position, tail.end_lsn, backfills.handed)
        self._progress = Progress(tail.end_lsn, tail.end_lsn, tail.end_lsn)
        self._appender = Appender(store)
        self._idle_interval = config.source.heartbeat_interval
        self._status_interval = _status_interval(ready.wal_sender_timeout)
        self._next_status = self._next_idle_append = 0.0
        self._told = 0
        self._backfills = backfills
        self._changes, self._changed_at, self._read_at = 0, 0.0, 0.0
        self._appending = selectors.DefaultSelector()
        self._anything = selectors.DefaultSelector()
        for selector in (self._appending, self._anything):
            selector.register(self._appender, selectors.EVENT_READ)
            selector.register(stop_fd, selectors.EVENT_READ)
        self._anything.register(stream, selectors.EVENT_READ)

    def run(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set() and not self._finished_unfinished():
                self._read()
                self._append()
                self._confirm()
                self._sleep()
            self._leave()
        finally:
            self._appender.close()
            self._appending.close()
            self._anything.close()

    # the three steps

    def _read(self) -> None:
        """Decode and collect what has arrived: some rows, up to what may wait."""
        if self._collected(WAITING_BATCHES):
            return
        try:
            self._collector.feed(self._decoder.events(self._stream.messages(READ_BYTES)))
        except OperatorNeeded as error:
            error.hint = f"{error.hint or ''} {self._way_on()}".strip()
            raise
        if self._notices:
            self._heed_notices()
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
        worth_it = self._collected(1) or (self._collector.waiting and self._stream.drained and not self._collector.open)
        if worth_it or self._idle_append_due():
            self._submit()

    def _confirm(self) -> None:
        """Tell PostgreSQL how far the store is: after each append, on its wish, and in time for its timeout."""
        written = self._progress.durable
        idle = self._stream.drained and not (self._collector.open or self._collector.waiting or self._appender.busy)
        if idle and not self._ready.finishing:
            # Nothing is open or unflushed, so what the server says it has sent through is done with.
            self._collector.idle(self._stream.wal_end)
            self._progress.receive(self._collector.end_lsn)
            written = self._progress.received
        now = time.monotonic()
        if now >= self._next_status or self._stream.reply_wanted or written > self._told:
            # Reported as written: up to here nothing waits to be appended. `lag` tells idle from busy by it.
            self._stream.confirm(written, self._progress.confirm())
            self._next_status, self._told = now + self._status_interval, written

    # helpers

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
        for chunk, _ in batch.chunks:
            chunk.release()
            self._read_at = time.monotonic()

    def _collected(self, batches: int) -> bool:
        return self._collector.size >= batches * BATCH_BYTES or self._collector.rows >= batches * BATCH_ROWS

    def _submit(self) -> None:
        self._appender.submit(self._collector.take(), self._ready.resume_options, self._catalog.remember())
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
        full = self._collected(WAITING_BATCHES)
        if not self._stream.drained and not full:
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

    def _finished(self) -> Batch | None:
        """The batch that became durable. What the store refuses for good needs an operator."""
        try:
            return self._appender.finished()
        except CdcbridgeError as error:
            if type(error) is CdcbridgeError:
                raise OperatorNeeded(f"the store refuses an append: {error}", hint=self._way_on()) from error
            raise

    def _way_on(self) -> str:
        """How to leave behind the transaction that cannot be read."""
        begun = self._collector.position.commit_lsn if self._collector.open else None
        target = "LSN" if begun is None else format_lsn(begun + 1)
        return f"`cdcbridge slot skip --to {target}` leaves this transaction behind, and a gap message in its place."

    def _heed_notices(self) -> None:
        """wal2json tells of changes that it drops for want of a replica identity as a warning, and only so."""
        for notice in self._notices:
            match = _LOST.search(notice)
            if match is None:
                log.warning("source.notice", message=notice)
                continue
            operation, schema, table = match[1].lower(), match[2], match[3]
            relation = self._catalog.table(schema, table, match[1][0], {}).relation
            if self._ready.router.plan(relation, operation) is not None:
                raise OperatorNeeded(
                    f"an {operation.upper()} of {relation.topic} is not in the WAL's output, because the table has no"
                    f" usable replica identity; stopped before it was confirmed (position {self._collector.position})",
                    hint=f"Mend it: ALTER TABLE {schema}.{table} REPLICA IDENTITY FULL (or give it a primary key). "
                    + self._way_on(),
                )
        self._notices.clear()

    def _leave(self) -> None:
        """Let the append that is under way end, and tell the server how far things are."""
        while self._appender.busy:
            self._appending.select(self._status_interval)
            done = self._appender.finished()
            if done is not None:
                self._stored(done)
        durable = self._progress.confirm()
        self._stream.confirm(durable, durable)
        self._stream.finish()


def _decoder(ready: Ready, catalog: SourceCatalog, where: Callable[[], int]) -> PgoutputDecoder | Wal2jsonDecoder:
    types = Types(catalog.lookup_type)
    if ready.plugin == "pgoutput":
        return PgoutputDecoder(types, catalog, where)
    as_text = "numeric-data-types-as-string" in ready.options
    return Wal2jsonDecoder(types, catalog, where, numbers_as_text=as_text)


def _status_interval(wal_sender_timeout: float) -> float:
    if wal_sender_timeout <= 0:
        return _LONGEST_STATUS_INTERVAL
    return min(_LONGEST_STATUS_INTERVAL, wal_sender_timeout / _STATUS_SHARE)


def _tell_retry(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    delay = round(state.next_action.sleep, 2) if state.next_action else 0
    log.warning("bridge.retry", error=str(error), retry_in_seconds=delay)
