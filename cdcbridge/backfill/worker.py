"""Run a backfill: read a table in chunks while the stream continues, and hand the rows over to it.

The store has the requests and their progress. Each backfill is a thread with sessions of its own, which holds a
snapshot for one chunk only.

1. The backfill writes a watermark into the WAL. The collector watches the table from there on.
2. The backfill waits for the transactions that are writing into the table then. Their changes before the watermark must
   be visible to the first chunk.
3. The backfill writes another watermark after each chunk. The rows of the chunk enter the log when the stream passes
   this watermark.

A backfill never appends by itself, and never reads more than a few chunks ahead.
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

READ_SECONDS: Final = 0.2  # for reading one chunk
FEWEST_ROWS, FIRST_ROWS = 20, 200
_COMPARABLE: Final = 1 << 31  # while a database has used fewer transaction IDs, no old row looks young by its ID
_TELLS_OPERATIONS: Final = re.compile(r"\b(op|old|meta)\b")
log = structlog.get_logger()


class Ended(NamedTuple):
    """The end of a backfill's thread."""

    backfill_id: int
    failed: bool  # a server was lost: try again after a pause


class BackfillSession:
    """The state that the main loop, its backfills and their scheduler share. Each part has a lock of its own.

    Attributes:
        handed: The watches and chunks that take effect when the stream passes their watermarks. Backfills put them,
            and the main loop takes them.
        room: The memory that the backfills use.
        ended: The backfills that ended. Their threads put them, and the scheduler takes them.
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
        """There are changes, which wait for each chunk's append. The main loop sets this, and backfills read it."""
        return self._told.look("gentle") is not None

    @gentle.setter
    def gentle(self, value: bool) -> None:
        if value:
            self._told.put(value, "gentle")
        else:
            self._told.take("gentle")


class Backfill(Background):
    """The thread of one backfill."""

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
            # Rows that were rewritten while no backfill ran look young, and did not arrive as changes.
            going_on = not shapes.altered_since(reader, shape, Snapshot.parse(order.since)) or self._truncated(
                marker, store, Snapshot.parse(order.since)
            )
        self._on_standby = reader.execute("select pg_is_in_recovery()").fetchone() == (True,)
        begun = self._handover.watch(marker, self._watch)
        self._wait_for_writers(reader, marker, store, shape)
        if self._stop.is_set():
            return  # and transactions may still be writing
        since = begin(store, order, shapes.snapshot(reader), shapes.estimate(reader, shape), going_on=going_on)
        if since is None:
            return  # paused or cancelled meanwhile
        comes_as_change = _comes_as_change(subscription, since)
        if going_on or not comes_as_change:
            self._watch.early = frozenset((comes_as_change and order.early) or ())
        else:
            # `since` cannot judge rows that a transaction in progress has written in a savepoint. The watch can.
            self._wait_for_writers(reader, marker, store, shape)
            self._watch.before = self._came_as_changes(store, subscription, begun)
        log.info("backfill.reading", consumer=order.consumer, table=order.table, behind=self._place)
        self._read_on(reader, marker, store, shape, wanted_of(order, subscription, since if comes_as_change else None))

    def _read_on(
        self, reader: Connection, marker: Connection, store: Connection, shape: shapes.ReadShape, wanted: Wanted
    ) -> None:
        """Read and hand over chunk after chunk, until the last one or until the backfill is stopped."""
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
                    return  # the scheduler starts it again, from its place
                shape = now
                continue
            shape, self._place, last, looked_at = now, read.end, read.last, read.looked_at
            size = sum(map(len, read.rows))
            self._adapt(time.monotonic() - started, size, looked_at if read.bounded else self._size)
            if not self._handover.has_room(size):
                return
            self._handover.chunk(marker, watch, order.backfill_id, seen, read)
            reach("chunk handed over")
            del read  # its rows belong to the batch of the log now
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
        """Read the next rows, in a transaction of their own.

        The result is the table as it is now, the snapshot of the transaction, and the chunk. The chunk is None if the
        table was rewritten.
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
        """Return whether the log has a TRUNCATE of the table by a transaction that `since` does not see.

        This waits first until the log has everything that is committed now. If there is such a TRUNCATE, each row that
        the table has now arrived as a change.
        """
        target = mark(marker, b"rewritten")
        while log_end(store) < target and not self._stop.is_set():
            self._stop.wait(0.02)
        return truncated_since(store, self._order.table, since)

    def _came_as_changes(self, store: Connection, subscription: Subscription, begun: int) -> frozenset[str | None]:
        """Return the keys of changes that the consumer got before the watch began.

        They are needed only for a backfill that was requested when its consumer began (`after_seq`).
        """
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
        """Wait for the transactions that are writing into the table now, and for a standby to catch up.

        Then the reader sees all that is committed by now, and all that those transactions have written.
        """
        waiting_since = time.monotonic()
        told: str | None = None
        first = shapes.writers(marker, shape)
        written: int | None = None  # the end of the primary's WAL when these transactions had ended
        while not self._stop.is_set():
            if self._watch is not None:
                seen = shapes.snapshot(reader)
                self._watch.visible = seen.certain() if self._on_standby else seen
            now = shapes.writers(marker, shape) if first else {}
            blockers = [text for writer, text in now.items() if writer in first]
            if not blockers and self._on_standby:
                written = written or current_lsn(marker)
                blockers = (
                    [] if current_lsn(reader) >= written else ["the standby, which has not replayed enough WAL yet"]
                )
            if not blockers:
                break
            note = "waits for " + "; ".join(blockers)
            if time.monotonic() - waiting_since > 1 and note != told:
                told = note
                log.info("backfill.waiting", consumer=self._order.consumer, table=self._order.table, on=blockers)
                self._note(store, note)
            self._stop.wait(0.05)

    def _altered(self, before: shapes.ReadShape, after: shapes.ReadShape) -> shapes.ReadShape:
        """Return the new shape of a table that was altered meanwhile, with which to continue.

        Raises:
            UsageError: The key was changed, or a requested column was dropped.
        """
        if [(c.name, c.type) for c in before.key] != [(c.name, c.type) for c in after.key] or (
            not before.key and before.oids != after.oids
        ):
            raise UsageError(f"the key of {self._order.table} was changed while it was read: start a new backfill")
        refuse_unknown_columns(after, self._order.columns)
        log.info("backfill.altered", consumer=self._order.consumer, table=self._order.table)
        return after

    def _adapt(self, seconds: float, size: int, looked_at: int) -> None:
        """Choose the number of rows of the next chunk, so that reading it takes READ_SECONDS and its bytes fit."""
        factor = min(2.0, READ_SECONDS / max(seconds, 0.001), CHUNK_BYTES / max(size, 1))
        most = min(READ_ROWS_BESIDE if self._session.gentle else READ_ROWS, self._order.rate or READ_ROWS)
        self._size = int(min(most, max(FEWEST_ROWS, looked_at * max(0.1, factor))))

    # state in the store

    def _note(self, store: Connection, note: str | None) -> None:
        with store_errors():
            store.execute("update backfills set note = %s where id = %s", (note, self._order.backfill_id))


def connect_reader(config: Config) -> Connection:
    """Connect to the server from which rows are read: source.read_dsn, which may be a standby, or else the source.

    Raises:
        SourceUnavailable: The server cannot be reached.
    """
    return connect_source(config.read_dsn, "cdcbridge backfill", reads=config.source.read_dsn is not None)


def prepare_reader(reader: Connection) -> None:
    """Make the planner read a table along its key, even if its statistics are missing."""
    for setting in ("enable_seqscan = off", "enable_bitmapscan = off"):
        reader.execute(f"set {setting}".encode())


def wanted_of(order: Order, subscription: Subscription, since: Snapshot | None) -> Wanted:
    """Return the part of the table to read for a consumer.

    Only queue and fifo consumers have a size limit, and not if their filter may need the whole row.
    """
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
    """Return whether each row version younger than `since` arrives as a change, and is known by its transaction ID.

    If not, a row may arrive both as a change and as a read.
    """
    return (
        since.xmax < _COMPARABLE
        and {"insert", "update"} <= subscription.operations
        and (subscription.filter is None or not _TELLS_OPERATIONS.search(subscription.filter.source))
    )
