"""Backfills: rows that were in a table before, read beside the stream and handed to it in chunks. Part of the rim.

The store says what is asked for and how far it is; each backfill is a thread with sessions of its own, and holds a
snapshot for one chunk. It begins with a watermark in the WAL, from which on the collector watches the table, and waits
for the transactions that were writing into it then: what they did before the watermark must be visible to the first
chunk. After each chunk it writes another watermark; the rows enter the log where the stream comes past that. Never
appends by itself, and never reads further ahead than a few chunks.
"""

from __future__ import annotations

import re
import time
from typing import Final, NamedTuple

import psycopg
import structlog

from cdcbridge.backfill.requests import (
    Order,
    begin,
    begin_anew,
    fail,
    refuse_unknown_columns,
    subscription_of,
    truncated_since,
)
from cdcbridge.backfill.table_reader import CHUNK_BYTES, Read, Wanted, read_chunk
from cdcbridge.backfill.watermarks import Handover, Room, mark
from cdcbridge.background import Background
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, server_errors, source_errors, store_errors
from cdcbridge.errors import CdcbridgeError, SourceUnavailable, StoreUnavailable, UsageError
from cdcbridge.instants import reach
from cdcbridge.mailbox import Mailbox
from cdcbridge.routing.collector import READ_ROWS, READ_ROWS_BESIDE
from cdcbridge.routing.overtaken import EARLY_LIMIT, Chunk, Snapshot, Watch
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.source import shapes
from cdcbridge.source.sessions import refuse_row_security
from cdcbridge.source.slots import current_lsn
from cdcbridge.store.log import log_end

READ_SECONDS: Final = 0.2  # what a chunk's reading should take
FEWEST_ROWS, FIRST_ROWS = 20, 200
_COMPARABLE: Final = 1 << 31  # while a database has used fewer transaction IDs, no old row's looks young
_TELLS_OPERATIONS: Final = re.compile(r"\b(op|old|meta)\b")
log = structlog.get_logger()


class Ended(NamedTuple):
    """A backfill's thread has no work left."""

    backfill_id: int
    failed: bool  # a server went away: try again, after a pause


class BackfillSession:
    """What a streaming session's main loop, its backfills and their scheduler share: each part has a lock of its own.

    handed: what the stream is to come past, by watermark. Backfills put it, the main loop takes it.
    room: the memory that backfills have in use.
    ended: the backfills that ended. They put it, the scheduler takes it.
    """

    def __init__(self, config: Config, epoch: int, router: Router) -> None:
        self.config = config
        self.epoch = epoch
        self.router = router
        self.handed: Mailbox[Watch | Chunk] = Mailbox()
        self.room = Room()
        self.ended: Mailbox[Ended] = Mailbox()
        self._told: Mailbox[bool] = Mailbox()

    @property
    def gentle(self) -> bool:
        """There are changes, which have to wait for each chunk's append. Set by the main loop, read by backfills."""
        return self._told.look("gentle") is not None

    @gentle.setter
    def gentle(self, value: bool) -> None:
        if value:
            self._told.put(value, "gentle")
        else:
            self._told.take("gentle")


class Backfill(Background):
    """One of them, in a thread."""

    def __init__(self, session: BackfillSession, order: Order) -> None:
        super().__init__(f"backfill-{order.backfill_id}")
        self._session = session
        self._config = session.config
        self._order = order
        self._handover = Handover(session.handed, f"{session.epoch}/{order.backfill_id}", session.room)
        self._reader: Connection | None = None  # the thread sets it once, stop() cancels its statement
        self._place = order.place or []
        self._watch: Watch | None = None
        self._size = min(FIRST_ROWS, order.rate or FIRST_ROWS)
        self._on_standby = False

    def stop(self) -> None:
        super().stop()
        self._handover.stop()
        if self._reader is not None:
            self._reader.cancel()

    def _work(self) -> None:
        order, failed = self._order, False
        try:
            with (
                connect_reader(self._config) as reader,
                connect_source(self._config.source_dsn, "cdcbridge watermark") as marker,
                connect_store(self._config.store_dsn, self._config.store.schema_, "cdcbridge backfill") as store,
            ):
                self._reader = reader
                prepare_reader(reader)
                try:
                    with server_errors():
                        self._read(reader, marker, store)
                except (UsageError, psycopg.Error, CdcbridgeError) as error:
                    if isinstance(error, SourceUnavailable | StoreUnavailable):
                        raise
                    fail(store, order, error)
        except (CdcbridgeError, psycopg.Error) as error:
            if not self._stop.is_set():
                failed = True
                message = " ".join(str(error).split())
                log.warning("backfill.interrupted", consumer=order.consumer, table=order.table, error=message)
        finally:
            if self._watch is not None:
                self._handover.withdraw(self._watch)
            self._session.ended.put(Ended(order.backfill_id, failed))

    # reading

    def _read(self, reader: Connection, marker: Connection, store: Connection) -> None:
        order = self._order
        schema, _, name = order.table.partition(".")
        subscription = subscription_of(self._session.router, order.consumer_id, order.consumer, schema, name)
        shape = shapes.describe(reader, schema, name)
        reach("table described")
        refuse_row_security(reader, schema, name)
        refuse_unknown_columns(shape, order.columns)
        self._watch = Watch(subscription, order.table)
        going_on = order.since is not None and order.place is not None
        if order.since is not None and going_on:
            # What was written anew while nobody read looks young, and did not come as a change.
            going_on = not shapes.altered_since(reader, shape, Snapshot.parse(order.since)) or self._truncated(
                marker, store, Snapshot.parse(order.since)
            )
        self._on_standby = reader.execute("select pg_is_in_recovery()").fetchone() == (True,)
        begun = self._handover.watch(marker, self._watch)
        self._wait_for_writers(reader, marker, store, shape)
        if self._stop.is_set():
            return  # and whoever wrote may still do
        since = begin(store, order, shapes.snapshot(reader), shapes.estimate(reader, shape), going_on=going_on)
        if since is None:
            return  # paused or cancelled meanwhile
        comes_as_change = _comes_as_change(subscription, since)
        if going_on or not comes_as_change:
            self._watch.early = frozenset((comes_as_change and order.early) or ())
        else:
            # Rows that a transaction which runs now has written in a savepoint, `since` cannot tell; the watch can.
            self._wait_for_writers(reader, marker, store, shape)
            self._watch.before = self._came_as_changes(store, subscription, begun)
        log.info("backfill.reading", consumer=order.consumer, table=order.table, behind=self._place)
        self._read_on(reader, marker, store, shape, wanted_of(order, subscription, since if comes_as_change else None))

    def _read_on(
        self, reader: Connection, marker: Connection, store: Connection, shape: shapes.ReadShape, wanted: Wanted
    ) -> None:
        """Chunk after chunk, until the last, or until it is stopped."""
        order, watch = self._order, self._watch
        paced = time.monotonic()
        last = False
        while watch is not None and not (last or self._stop.is_set()):
            started = time.monotonic()
            now, seen, read = self._chunk(reader, shape, wanted)
            if read is None:
                if wanted.since is not None and not self._truncated(marker, store, wanted.since):
                    log.info("backfill.rewritten", consumer=order.consumer, table=order.table)
                    begin_anew(store, order)
                    return  # and it is started again, from its place
                shape = now
                continue
            shape, self._place, last, looked_at = now, read.end, read.last, read.looked_at
            size = sum(map(len, read.rows))
            self._adapt(time.monotonic() - started, size, looked_at if read.bounded else self._size)
            if not self._handover.has_room(size):
                return
            self._handover.chunk(marker, watch, order.backfill_id, seen, read)
            reach("chunk handed over")
            del read  # its memory belongs to the log's batch now
            if self._session.gentle:
                self._handover.wait_for_all()
                self._stop.wait(time.monotonic() - started)
            if order.rate:
                paced = max(paced + looked_at / order.rate, time.monotonic() - 1)
                self._stop.wait(max(0.0, paced - time.monotonic()))
        if last and self._handover.wait_for_all():
            log.info("backfill.done", consumer=order.consumer, table=order.table)

    def _chunk(
        self, reader: Connection, shape: shapes.ReadShape, wanted: Wanted
    ) -> tuple[shapes.ReadShape, Snapshot, Read | None]:
        """The next rows, in a transaction of their own: (the table as it is by now, what was visible, what was read, or
        None where the table was written anew).
        """
        with source_errors(), reader.transaction():
            shapes.begin_locked(reader, shape)
            seen = shapes.snapshot(reader)
            seen = seen.certain() if self._on_standby else seen
            if not shapes.is_still(reader, shape):
                before, shape = shape, self._altered(shape, shapes.describe(reader, shape.schema, shape.name))
                if wanted.since is not None and shapes.rewritten(before, shape):
                    return shape, seen, None
            return shape, seen, read_chunk(reader, shape, wanted, self._place, self._size)

    def _truncated(self, marker: Connection, store: Connection, since: Snapshot) -> bool:
        """Whether the log has a TRUNCATE of the table by a transaction that `since` does not see: then each row that is
        there now came as a change.
        """
        target = mark(marker, b"rewritten")
        while log_end(store) < target and not self._stop.is_set():
            self._stop.wait(0.02)
        return truncated_since(store, self._order.table, since)

    def _came_as_changes(self, store: Connection, subscription: Subscription, begun: int) -> frozenset[str | None]:
        """Keys that the consumer got before the watch began, where it was made for this."""
        if self._order.after_seq is None:
            return frozenset()
        while log_end(store) < begun and not self._stop.is_set():
            self._stop.wait(0.02)
        with store_errors():
            rows = store.execute(
                "select changed_behind(%s, %s, %s, %s)",
                (self._order.table, self._order.after_seq, sorted(subscription.operations), EARLY_LIMIT),
            ).fetchall()
        return frozenset(key for (key,) in rows)

    def _wait_for_writers(
        self, reader: Connection, marker: Connection, store: Connection, shape: shapes.ReadShape
    ) -> None:
        """Until what was committed by now is visible to the reader, and whoever writes into the table now has ended."""
        waiting_since = time.monotonic()
        told: str | None = None
        first = shapes.writers(marker, shape)
        written: int | None = None  # where the primary's WAL ended when none of these was left
        while not self._stop.is_set():
            if self._watch is not None:
                seen = shapes.snapshot(reader)
                self._watch.visible = seen.certain() if self._on_standby else seen
            now = shapes.writers(marker, shape) if first else {}
            blockers = [text for writer, text in now.items() if writer in first]
            if not blockers and self._on_standby:
                written = written or current_lsn(marker)
                blockers = [] if current_lsn(reader) >= written else ["the standby, which is behind"]
            if not blockers:
                break
            note = "waits for " + "; ".join(blockers)
            if time.monotonic() - waiting_since > 1 and note != told:
                told = note
                log.info("backfill.waiting", consumer=self._order.consumer, table=self._order.table, on=blockers)
                self._note(store, note)
            self._stop.wait(0.05)

    def _altered(self, before: shapes.ReadShape, after: shapes.ReadShape) -> shapes.ReadShape:
        """A table that was altered meanwhile: read on by its new columns, if its key is the same."""
        if [(c.name, c.type) for c in before.key] != [(c.name, c.type) for c in after.key] or (
            not before.key and before.oids != after.oids
        ):
            raise UsageError(f"the key of {self._order.table} was changed while it was read: start the backfill anew")
        refuse_unknown_columns(after, self._order.columns)
        log.info("backfill.altered", consumer=self._order.consumer, table=self._order.table)
        return after

    def _adapt(self, seconds: float, size: int, looked_at: int) -> None:
        """The next chunk's rows: so that reading takes the time it should, and they fit."""
        factor = min(2.0, READ_SECONDS / max(seconds, 0.001), CHUNK_BYTES / max(size, 1))
        most = min(READ_ROWS_BESIDE if self._session.gentle else READ_ROWS, self._order.rate or READ_ROWS)
        self._size = int(min(most, max(FEWEST_ROWS, looked_at * max(0.1, factor))))

    # telling

    def _note(self, store: Connection, note: str | None) -> None:
        with store_errors():
            store.execute("update backfills set note = %s where id = %s", (note, self._order.backfill_id))


def connect_reader(config: Config) -> Connection:
    """Where rows are read: source.read_dsn, which may be a standby, or the source. Raises SourceUnavailable."""
    return connect_source(config.read_dsn, "cdcbridge backfill", reads=config.source.read_dsn is not None)


def prepare_reader(reader: Connection) -> None:
    """Make the planner read a table along its key, even where its statistics are missing."""
    for setting in ("enable_seqscan = off", "enable_bitmapscan = off"):
        reader.execute(f"set {setting}".encode())


def wanted_of(order: Order, subscription: Subscription, since: Snapshot | None) -> Wanted:
    """What to read for a consumer. Only queues and fifo consumers have a limit; a filter may need all of a row."""
    read = frozenset[str]() if subscription.filter is None else subscription.filter.record_columns
    limited = not subscription.reads_log and read is not None
    return Wanted(
        order.condition,
        tuple(order.columns) if order.columns else None,
        subscription.key,
        since,
        subscription.max_bytes if limited else None,
        tuple(read or ()),
    )


def _comes_as_change(subscription: Subscription, since: Snapshot) -> bool:
    """Whether each row version that is younger than `since` reaches the consumer as a change, and can be told by its
    transaction ID. Where not, a row may come as a change and as a read.
    """
    return (
        since.xmax < _COMPARABLE
        and {"insert", "update"} <= subscription.operations
        and (subscription.filter is None or not _TELLS_OPERATIONS.search(subscription.filter.source))
    )
