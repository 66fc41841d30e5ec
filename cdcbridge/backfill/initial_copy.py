"""Copy tables fast at the first start, from the snapshot that the slot exports, before the stream begins.

PostgreSQL exports a snapshot when it creates the slot. That snapshot shows exactly those changes that the stream will
not send. Two sessions read tables from it at once. The chunks are appended as they arrive, each in a commit of its own.
If the copy is interrupted, the next start continues from that place, with a watermark for each chunk (worker.py). The
price is that the snapshot and the slot's WAL are kept for all that time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import psycopg
import structlog
from psycopg import sql

from cdcbridge.backfill.requests import Order, begin, fail, subscription_of, unfinished
from cdcbridge.backfill.table_reader import CHUNK_BYTES, read_chunk
from cdcbridge.backfill.watermarks import Room
from cdcbridge.backfill.worker import FEWEST_ROWS, prepare_reader, wanted_of
from cdcbridge.background import Background
from cdcbridge.changes.position import Position
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, source_errors
from cdcbridge.errors import CdcbridgeError, SourceUnavailable, StoreUnavailable
from cdcbridge.instants import reach
from cdcbridge.mailbox import Mailbox
from cdcbridge.routing.backfill_rows import inject
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.collector import READ_ROWS
from cdcbridge.routing.overtaken import Chunk, Snapshot, Watch
from cdcbridge.routing.router import Router
from cdcbridge.source import shapes
from cdcbridge.source.sessions import refuse_row_security
from cdcbridge.store.log import BridgeStore

READERS: Final = 2
_ALTERED: Final = ("42703", "42P01", "42704", "42804")  # no such column, table or type, or a column of another type
_AHEAD: Final = 4  # chunks that are read and not yet appended
_FIRST_ROWS: Final = 1000
log = structlog.get_logger()


def copy_tables(
    config: Config, store: BridgeStore, router: Router, snapshot: str, lsn: int, stopped: Callable[[], bool]
) -> None:
    """Fill all consumers that wait for their first rows, from the snapshot that was exported with the slot.

    This returns early when the bridge is stopped. A table that cannot be read is marked as failed, and the others are
    copied.

    Args:
        config: The configuration.
        store: The bridge's session on the store.
        router: The router of the consumers.
        snapshot: The name of the exported snapshot.
        lsn: The LSN at which the slot begins.
        stopped: A function that returns whether the bridge was stopped.

    Raises:
        SourceUnavailable: The source was lost.
        StoreUnavailable: The store was lost.
    """
    orders: Mailbox[Order] = Mailbox()
    for order in unfinished(store.connection).values():
        orders.put(order)
    shared = _Shared(config, router, snapshot, orders, Mailbox(_AHEAD), Room())
    readers = [_CopyReader(number, shared) for number in range(1, READERS + 1)]
    for reader in readers:
        reader.start()
    # This is before all changes of the stream, because their commits begin at the slot's LSN.
    position = Position(lsn - 1, -1)
    partitions = store.partitions()
    try:
        ended = 0
        while ended < READERS and not stopped():
            chunk = shared.read.wait(0.5)
            if chunk is None:
                continue
            if isinstance(chunk, BaseException):
                raise chunk
            if isinstance(chunk, _CopyReader):
                ended += 1
                continue
            batch = AppendBatch(end_lsn=lsn, in_order=router.in_order)
            position = batch.position = inject(batch, chunk, position, None, partitions)
            store.append(batch, None)
            chunk.release()
            del batch, chunk  # so that their memory is free before the next chunk arrives
    finally:
        for reader in readers:
            reader.stop()
        for reader in readers:
            reader.join(10)


@dataclass(slots=True, frozen=True)
class _Shared:
    """The state that the readers share with the main loop, which fills `orders` before they start.

    Attributes:
        read: Chunks, the error that ended a reader, or a reader that has nothing left to read. The readers put them,
            and the main loop takes them.
    """

    config: Config
    router: Router
    snapshot: str
    orders: Mailbox[Order]
    read: Mailbox[Chunk | BaseException | _CopyReader]
    room: Room


class _CopyReader(Background):
    """A thread that reads one table after another, until none is left.

    If one reader is stopped, all of them end.
    """

    def __init__(self, number: int, shared: _Shared) -> None:
        super().__init__(f"copy-{number}")
        self._shared = shared

    def stop(self) -> None:
        super().stop()
        self._shared.read.end()
        self._shared.room.close()

    def _work(self) -> None:
        shared, config = self._shared, self._shared.config
        try:
            with (
                connect_source(config.source_dsn, "cdcbridge backfill") as reader,
                connect_store(config.store_dsn, config.store.schema_, "cdcbridge backfill") as store,
            ):
                prepare_reader(reader)
                while not shared.read.ended and (order := shared.orders.take()) is not None:
                    try:
                        with source_errors(), reader.transaction():
                            reader.execute("set transaction isolation level repeatable read, read only")
                            reader.execute(sql.SQL("set transaction snapshot {}").format(sql.Literal(shared.snapshot)))
                            self._read_table(order, reader, store)
                    except CdcbridgeError as error:
                        if isinstance(error, SourceUnavailable | StoreUnavailable):
                            raise
                        if isinstance(error.__cause__, psycopg.Error) and error.__cause__.sqlstate in _ALTERED:
                            _later(order, "the table was altered after the snapshot began")
                            continue
                        fail(store, order, error)
            shared.read.put(self)
        except BaseException as error:  # noqa: BLE001 - raised again by the main loop
            shared.read.put(error)

    def _read_table(self, order: Order, reader: Connection, store: Connection) -> None:
        shared = self._shared
        schema, _, name = order.table.partition(".")
        subscription = subscription_of(shared.router, order.consumer_id, order.consumer, schema, name)
        shape = shapes.describe(reader, schema, name)
        reach("table described")
        refuse_row_security(reader, schema, name)
        shapes.lock(reader, shape)
        if shapes.replaced_since_snapshot(reader, shape):
            _later(order, "the table was rewritten after the snapshot began")
            return
        seen: Snapshot = shapes.snapshot(reader)
        begin(store, order, seen, shapes.estimate(reader, shape), going_on=False)
        watch = Watch(subscription, order.table, early=frozenset())
        log.info("backfill.copying", consumer=order.consumer, table=order.table)
        wanted = wanted_of(order, subscription, None)
        place, last, size = order.place or [], False, _FIRST_ROWS
        while not last and not shared.read.ended:
            part = read_chunk(reader, shape, wanted, place, size)
            place, last, bytes_read = part.end, part.last, max(1, sum(map(len, part.rows)))
            size = part.looked_at if part.bounded else size
            size = int(max(FEWEST_ROWS, min(READ_ROWS, size * min(2.0, CHUNK_BYTES / bytes_read))))
            leave = partial(shared.room.leave, bytes_read)
            chunk = Chunk(watch, order.backfill_id, seen, part.rows, place, part.looked_at, last, leave, part.sized)
            del part
            shared.room.enter(bytes_read)
            shared.read.put(chunk)
            reach("chunk handed over")
            del chunk


def _later(order: Order, reason: str) -> None:
    """Leave the backfill waiting, because the snapshot does not show the table as it is now.

    It is read later, while the stream continues.
    """
    log.info("backfill.later", consumer=order.consumer, table=order.table, reason=reason)
