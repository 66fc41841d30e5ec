"""The first start at speed: tables copied from the slot's own snapshot, before the stream begins. Part of the rim.

The slot's creation exports a snapshot which sees exactly what the stream will not bring. Tables are read from it by
two sessions at once and appended as they come, each in a chunk's own commit; so whatever interrupts it, the next start
goes on from there, with a watermark for each chunk. Its price is one snapshot, and the slot's WAL, for all that time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

import psycopg
import structlog
from psycopg import sql

from cdcbridge import chunks
from cdcbridge.backfill import MOST_BYTES, prepare_reader
from cdcbridge.batch import Batch
from cdcbridge.check_sessions import refuse_row_security
from cdcbridge.collect import READ_ROWS
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, source_errors
from cdcbridge.errors import CdcbridgeError, SourceUnavailable, StoreUnavailable
from cdcbridge.inject import inject
from cdcbridge.orders import Order, begin, fail, subscription_of, unfinished
from cdcbridge.position import Position
from cdcbridge.reads import Chunk, Snapshot, Watch
from cdcbridge.route import Router
from cdcbridge.store import Store

READERS: Final = 2
_AHEAD: Final = 4  # chunks that are read and not yet appended
_FIRST_ROWS: Final = 1000
log = structlog.get_logger()


def copy_tables(
    config: Config, store: Store, router: Router, snapshot: str, lsn: int, stopped: Callable[[], bool]
) -> None:
    """Fill all consumers that wait for their first rows, from the exported snapshot of the slot that begins at `lsn`.

    Returns early when stopped. A table that cannot be read is marked as failed; SourceUnavailable and StoreUnavailable
    are raised.
    """
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    for order in unfinished(store.connection).values():
        orders.put(order)
    read: queue.Queue[Chunk | BaseException | None] = queue.Queue(_AHEAD)
    over = threading.Event()
    threads = [
        threading.Thread(target=_read, args=(config, router, snapshot, orders, read, over), daemon=True)
        for _ in range(READERS)
    ]
    for thread in threads:
        thread.start()
    # Before all that the stream brings, whose commits begin at the slot's first position.
    position = Position(lsn - 1, -1)
    partitions = store.partitions()
    try:
        ended = 0
        while ended < READERS and not stopped():
            try:
                chunk = read.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(chunk, BaseException):
                raise chunk
            if chunk is None:
                ended += 1
                continue
            batch = Batch(end_lsn=lsn, in_order=router.in_order)
            position = batch.position = inject(batch, chunk, position, None, partitions)
            store.append(batch, None)
    finally:
        over.set()
        for thread in threads:
            thread.join(10)


def _read(
    config: Config,
    router: Router,
    snapshot: str,
    orders: queue.SimpleQueue[Order],
    read: queue.Queue[Chunk | BaseException | None],
    over: threading.Event,
) -> None:
    """One reader: table after table, until none is left."""
    try:
        with (
            connect_source(config.source_dsn, "cdcbridge backfill") as reader,
            connect_store(config.store_dsn, config.store.schema_, "cdcbridge backfill") as store,
        ):
            prepare_reader(reader)
            while not over.is_set():
                try:
                    order = orders.get_nowait()
                except queue.Empty:
                    break
                try:
                    with source_errors(), reader.transaction():
                        reader.execute("set transaction isolation level repeatable read, read only")
                        reader.execute(sql.SQL("set transaction snapshot {}").format(sql.Literal(snapshot)))
                        _read_table(router, order, reader, store, read, over)
                except CdcbridgeError as error:
                    if isinstance(error, SourceUnavailable | StoreUnavailable):
                        raise
                    fail(store, order, error)
        _put(read, None, over)
    except (CdcbridgeError, psycopg.Error) as error:
        _put(read, error, over)


def _read_table(
    router: Router,
    order: Order,
    reader: Connection,
    store: Connection,
    read: queue.Queue[Chunk | BaseException | None],
    over: threading.Event,
) -> None:
    schema, _, name = order.table.partition(".")
    subscription = subscription_of(router, order.consumer_id, order.consumer, schema, name)
    shape = chunks.describe(reader, schema, name)
    refuse_row_security(reader, schema, name)
    seen: Snapshot = chunks.snapshot(reader)
    begin(store, order, seen, chunks.estimate(reader, shape), going_on=False)
    watch = Watch(subscription, order.table, early=frozenset())
    log.info("backfill.copying", consumer=order.consumer, table=order.table)
    place, last, size = order.place or [], False, _FIRST_ROWS
    while not last and not over.is_set():
        end, looked_at, last = chunks.next_place(reader, shape, place, size)
        wanted = chunks.Wanted(own_key=subscription.key)
        rows = chunks.copy_rows(reader, chunks.rows_query(shape, wanted, place, end)) if end else []
        place = end
        _put(read, Chunk(watch, order.backfill_id, seen, rows, place, looked_at, last, lambda: None), over)
        bytes_read = max(1, sum(map(len, rows)))
        size = int(min(READ_ROWS, size * min(2.0, MOST_BYTES / bytes_read)))


def _put(
    read: queue.Queue[Chunk | BaseException | None], item: Chunk | BaseException | None, over: threading.Event
) -> None:
    while not over.is_set():
        try:
            read.put(item, timeout=0.5)
        except queue.Full:
            continue
        return
