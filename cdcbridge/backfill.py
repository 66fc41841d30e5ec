"""Backfills: rows that were in a table before, read beside the stream and handed to it in chunks. Part of the rim.

The store says what is asked for and how far it is; each backfill is a thread with sessions of its own, and holds a
snapshot for one chunk. It begins with a watermark in the WAL, from which on the collector watches the table, and waits
for the transactions that were writing into it then: what they did before the watermark must be visible to the first
chunk. After each chunk it writes another watermark; the rows enter the log where the stream comes past that. Never
appends by itself, and never reads further ahead than a few chunks.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, Self

import psycopg
import structlog

from cdcbridge import chunks
from cdcbridge.collect import READ_ROWS, READ_ROWS_BESIDE
from cdcbridge.config import Config
from cdcbridge.consumers import all_subscriptions
from cdcbridge.database import Connection, connect_source, connect_store, source_errors, store_errors
from cdcbridge.errors import CdcbridgeError, OperatorNeeded, SourceUnavailable, StoreUnavailable, UsageError
from cdcbridge.lsn import parse_lsn
from cdcbridge.reads import EARLY_LIMIT, WATERMARK_PREFIX, Chunk, Snapshot, Watch
from cdcbridge.route import Router, Subscription

AT_ONCE: Final = 2  # backfills
AHEAD: Final = 3  # chunks of each that are read and not yet durable
READ_SECONDS: Final = 0.2  # what a chunk's reading should take
FEWEST_ROWS, FIRST_ROWS = 20, 200
MOST_BYTES: Final = 8 << 20
_POLL: Final = 0.5
_RETRY: Final = 2.0
_COMPARABLE: Final = 1 << 31  # while a database has used fewer transaction IDs, no old row's looks young
_TELLS_OPERATIONS: Final = re.compile(r"\b(op|old|meta)\b")
log = structlog.get_logger()


class Order(NamedTuple):
    """What is asked for: a row of backfills, with how far it is."""

    backfill_id: int
    consumer_id: int
    consumer: str
    table: str
    condition: str | None
    columns: list[str] | None
    rate: int | None
    after_seq: int | None
    since: str | None
    early: list[str | None] | None
    place: list[Any] | None


_ORDERS: Final = """
    select b.id, b.consumer_id, c.name, b.table_name, b.condition, b.columns, b.rate, b.after_seq, b.since, b.early,
           p.place
    from backfills b join consumers c on c.id = b.consumer_id left join lateral newest_progress(b.id) p on true
    where b.state in ('waiting', 'running') order by b.id
"""


def refuse_order(
    config: Config,
    source: Connection,
    store: Connection,
    consumer: str,
    table: str,
    condition: str | None,
    columns: list[str] | None,
) -> None:
    """Raise what would make such a backfill fail: UsageError for an unknown consumer, a table that is not there or that
    the consumer does not take, columns that it has not, a condition that does not parse; OperatorNeeded without rights.
    """
    with store_errors():
        row = store.execute("select (consumer_named(%s)).id", (consumer,)).fetchone()
    schema, _, name = table.partition(".")
    shape = chunks.describe(source, schema, name)
    router = Router(all_subscriptions(store), config.store.schema_)
    _subscription(router, row[0] if row else 0, consumer, schema, name)
    _refuse_unknown_columns(shape, columns)
    try:
        chunks.try_condition(source, shape, condition)
    except psycopg.errors.InsufficientPrivilege as error:
        reader = source.info.user
        raise OperatorNeeded(
            f"the role {reader} may not read {table}: {error.diag.message_primary}",
            hint=f"grant select on {table} to {reader}; grant usage on schema {schema} to {reader};",
        ) from error
    except psycopg.Error as error:
        raise UsageError(f"the condition {condition!r} cannot be used: {error.diag.message_primary}") from error


def _subscription(router: Router, consumer_id: int, consumer: str, schema: str, name: str) -> Subscription:
    for subscription in router.subscriptions(schema, name):
        if subscription.consumer_id == consumer_id:
            return subscription
    raise UsageError(
        f"consumer {consumer!r} does not take {schema}.{name}",
        hint="Its `tables` in the configuration say what it takes; `cdcbridge consumers show` what the store knows.",
    )


def _refuse_unknown_columns(shape: chunks.Shape, columns: Iterable[str] | None) -> None:
    unknown = set(columns or ()) - {column.name for column in shape.columns}
    if unknown:
        raise UsageError(f"{shape.schema}.{shape.name} has no column {min(unknown)!r}")


class Backfiller:
    """Works from entry to exit of its `with` block. `handed`: what the stream is to come past, by watermark."""

    def __init__(self, config: Config, epoch: int, router: Router, *, idle: bool = False) -> None:
        self._config = config
        self._epoch = epoch
        self._router = router
        self._idle = idle
        self.handed: dict[bytes, Watch | Chunk] = {}
        self.gentle = False  # there are changes, which have to wait for each chunk's append
        self._stop = threading.Event()
        self._over = threading.Event()  # the session is: what was not appended by now never will be
        self._running: dict[int, _Backfill] = {}
        self._not_before: dict[int, float] = {}
        self._thread = threading.Thread(target=self._work, name="backfiller", daemon=True)

    def __enter__(self) -> Self:
        if not self._idle:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._over.set()
        if not self._idle:
            self._thread.join(timeout=10)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                with connect_store(self._config.store_dsn, self._config.store.schema_, "cdcbridge backfills") as store:
                    while not self._stop.is_set():
                        self._look(store)
                        self._stop.wait(_POLL)
            except (CdcbridgeError, psycopg.Error) as error:
                log.warning("backfill.failed", error=" ".join(str(error).split()))
                self._stop.wait(_RETRY)
        for running in self._running.values():
            running.stop()
        for running in self._running.values():
            running.join(5)

    def _look(self, store: Connection) -> None:
        """Start what is asked for, stop what is not any more."""
        for backfill_id, running in list(self._running.items()):
            if not running.alive:
                del self._running[backfill_id]
                self._not_before[backfill_id] = time.monotonic() + _RETRY * running.failed
        # After that: of those that no thread works on, the progress is what it is.
        with store_errors():
            orders = {row[0]: Order(*row) for row in store.execute(_ORDERS).fetchall()}
        for backfill_id, running in self._running.items():
            if backfill_id not in orders:
                running.stop()
        for backfill_id, order in orders.items():
            if len(self._running) >= AT_ONCE:
                return
            if backfill_id not in self._running and self._not_before.get(backfill_id, 0) <= time.monotonic():
                self._running[backfill_id] = _Backfill(
                    self._config, self._epoch, self._router, order, self.handed, self._over, lambda: self.gentle
                )


class _Backfill:
    """One of them, in a thread."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        config: Config,
        epoch: int,
        router: Router,
        order: Order,
        handed: dict[bytes, Watch | Chunk],
        over: threading.Event,
        gentle: Callable[[], bool],
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._router = router
        self._order = order
        self._handed = handed
        self._over = over
        self._gentle = gentle
        self._reader: Connection | None = None
        self._place = order.place or []
        self._watch: Watch | None = None
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._outstanding: set[bytes] = set()
        self._size = FIRST_ROWS
        self.failed = False
        self._thread = threading.Thread(target=self._run, name=f"backfill-{order.backfill_id}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._reader is not None:
            self._reader.cancel()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        order = self._order
        try:
            with (
                connect_source(self._config.read_dsn, "cdcbridge backfill") as reader,
                connect_source(self._config.source_dsn, "cdcbridge watermark") as marker,
                connect_store(self._config.store_dsn, self._config.store.schema_, "cdcbridge backfill") as store,
            ):
                self._reader = reader
                for setting in ("enable_seqscan = off", "enable_bitmapscan = off", "jit = off", "timezone = 'UTC'",
                                "datestyle = 'ISO'", "intervalstyle = 'postgres'", "bytea_output = 'hex'"):  # fmt: skip
                    reader.execute(f"set {setting}".encode())
                try:
                    self._read(reader, marker, store)
                except (UsageError, psycopg.Error, CdcbridgeError) as error:
                    if isinstance(error, SourceUnavailable | StoreUnavailable):
                        raise
                    self._fail(store, error)
        except (CdcbridgeError, psycopg.Error) as error:
            self.failed = True
            log.warning(
                "backfill.interrupted", consumer=order.consumer, table=order.table, error=" ".join(str(error).split())
            )
        finally:
            self._withdraw()

    # reading

    def _read(self, reader: Connection, marker: Connection, store: Connection) -> None:
        order = self._order
        schema, _, name = order.table.partition(".")
        subscription = _subscription(self._router, order.consumer_id, order.consumer, schema, name)
        shape = chunks.describe(reader, schema, name)
        _refuse_unknown_columns(shape, order.columns)
        self._watch = Watch(subscription, order.table)
        going_on = order.since is not None and order.place is not None
        if going_on:
            self._watch.early = frozenset(order.early or ())
        begun = self._mark(marker, self._watch)
        self._wait_for_writers(reader, marker, store, shape, begun)
        since = self._begin(reader, store, shape, going_on=going_on)
        if not going_on:
            # Rows that a transaction which runs now has written in a savepoint, `since` cannot tell; the watch can.
            self._wait_for_writers(reader, marker, store, shape, begun)
            self._watch.before = self._came_as_changes(store, subscription, begun)
        wanted = chunks.Wanted(
            order.condition,
            tuple(order.columns) if order.columns else None,
            subscription.key,
            since if _comes_as_change(subscription, since) else None,
        )
        log.info("backfill.reading", consumer=order.consumer, table=order.table, rows=shape.rows, behind=self._place)
        paced = time.monotonic()
        last = False
        while not (last or self._stopping.is_set()):
            started = time.monotonic()
            with source_errors(), reader.transaction():
                reader.execute("set transaction isolation level repeatable read, read only")
                seen = chunks.snapshot(reader)
                if not chunks.is_still(reader, shape):
                    shape = self._altered(shape, chunks.describe(reader, schema, name))
                size = self._size if shape.key else max(1, self._size // 50)
                end, looked_at, last = chunks.next_place(reader, shape, self._place, size)
                rows = chunks.copy_rows(reader, chunks.rows_query(shape, wanted, self._place, end)) if end else []
            self._adapt(time.monotonic() - started, sum(map(len, rows)))
            if not self._has_room():
                return
            self._place = end
            self._mark(marker, self._watch, seen, rows, looked_at, last)
            if self._gentle():
                self._wait_for_all()
                self._stopping.wait(time.monotonic() - started)
            if order.rate:
                paced = max(paced + looked_at / order.rate, time.monotonic() - 1)
                self._stopping.wait(max(0.0, paced - time.monotonic()))
        self._wait_for_all()
        if last and not self._outstanding:
            log.info("backfill.done", consumer=order.consumer, table=order.table)

    def _begin(self, reader: Connection, store: Connection, shape: chunks.Shape, *, going_on: bool) -> Snapshot:
        """Row versions younger than this come as changes: since the backfill first began, whatever stopped since."""
        now = chunks.snapshot(reader)
        text = f"{now.xmin}:{now.xmax}:{','.join(map(str, sorted(now.running)))}"
        with store_errors():
            row = store.execute(
                "update backfills set state = 'running', note = null, "
                " since = case when %s then since else %s end,"
                " total = coalesce(total, %s), started_at = coalesce(started_at, moment())"
                " where id = %s and state in ('waiting', 'running') returning since",
                (going_on, text, shape.rows, self._order.backfill_id),
            ).fetchone()
        if row is None:
            self._stopping.set()  # paused or cancelled meanwhile
        return Snapshot.parse(row[0]) if row else now

    def _came_as_changes(self, store: Connection, subscription: Subscription, begun: int) -> frozenset[str | None]:
        """Keys that the consumer got before the watch began, where it was made for this."""
        if self._order.after_seq is None:
            return frozenset()
        while not self._stopping.is_set():
            with store_errors():
                end = store.execute("select end_lsn::text from positions order by id desc limit 1").fetchone()
            if end and parse_lsn(end[0]) >= begun:
                break
            self._stopping.wait(0.02)
        with store_errors():
            rows = store.execute(
                "select changed_behind(%s, %s, %s, %s)",
                (self._order.table, self._order.after_seq, sorted(subscription.operations), EARLY_LIMIT),
            ).fetchall()
        return frozenset(key for (key,) in rows)

    def _wait_for_writers(
        self, reader: Connection, marker: Connection, store: Connection, shape: chunks.Shape, begun: int
    ) -> None:
        """Until what was committed before the watermark is visible to the reader."""
        waiting_since = time.monotonic()
        told: str | None = None
        first = chunks.writers(marker, shape)
        on_standby = reader.execute("select pg_is_in_recovery()").fetchone() == (True,)
        while not self._stopping.is_set():
            if on_standby:
                row = reader.execute("select pg_last_wal_replay_lsn()::text").fetchone()
                blockers = [] if row and parse_lsn(row[0]) >= begun else ["the standby to replay the WAL"]
            else:
                now = chunks.writers(marker, shape)
                blockers = [text for writer, text in now.items() if writer in first]
            if not blockers:
                break
            note = "waits for " + "; ".join(blockers)
            if time.monotonic() - waiting_since > 1 and note != told:
                told = note
                log.info("backfill.waiting", consumer=self._order.consumer, table=self._order.table, on=blockers)
                self._note(store, note)
            self._stopping.wait(0.05)

    def _altered(self, before: chunks.Shape, after: chunks.Shape) -> chunks.Shape:
        """A table that was altered meanwhile: read on by its new columns, if its key is the same."""
        if [(c.name, c.type) for c in before.key] != [(c.name, c.type) for c in after.key] or (
            not before.key and before.leaves != after.leaves
        ):
            raise UsageError(f"the key of {self._order.table} was changed while it was read: start the backfill anew")
        _refuse_unknown_columns(after, self._order.columns)
        log.info("backfill.altered", consumer=self._order.consumer, table=self._order.table)
        return after

    def _adapt(self, seconds: float, size: int) -> None:
        """The next chunk's rows: so that reading takes the time it should, and they fit."""
        factor = min(2.0, READ_SECONDS / max(seconds, 0.001), MOST_BYTES / max(size, 1))
        most = READ_ROWS_BESIDE if self._gentle() else READ_ROWS
        self._size = int(min(most, max(FEWEST_ROWS, self._size * max(0.1, factor))))

    # handing over

    def _mark(
        self, marker: Connection, watch: Watch, seen: Snapshot | None = None, rows: list[bytes] | None = None,
        looked_at: int = 0, last: bool = False,
    ) -> int:  # fmt: skip
        """Hand the watch, or a chunk, to the stream with a watermark; its LSN."""
        token = f"{self._epoch}/{self._order.backfill_id}/{next(self._numbers)}".encode()
        if seen is None or rows is None:
            self._handed[token] = watch
        else:
            with self._changed:
                self._outstanding.add(token)
            self._handed[token] = Chunk(
                watch, self._order.backfill_id, seen, rows, self._place, looked_at, last, self._releaser(token)
            )
        with source_errors():
            row = marker.execute(
                "select pg_logical_emit_message(true, %s, %s)::text", (WATERMARK_PREFIX, token.decode()), prepare=True
            ).fetchone()
        return parse_lsn(row[0]) if row else 0

    def _releaser(self, token: bytes) -> Callable[[], None]:
        def release() -> None:
            with self._changed:
                self._outstanding.discard(token)
                self._changed.notify_all()

        return release

    def _has_room(self) -> bool:
        """Wait until few enough chunks are on their way; False when stopped meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._outstanding) < AHEAD or self._stopping.is_set())
        return not self._stopping.is_set()

    def _wait_for_all(self) -> None:
        """Until nothing is on its way, or it is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: not self._outstanding or self._stopping.is_set())

    def _withdraw(self) -> None:
        """Nothing more of this thread's may enter the log when it has ended: what is on its way is taken back, and what
        is being appended is waited for. So the next one knows where to go on.
        """
        if self._watch is None:
            return
        with self._changed:
            tokens = list(self._outstanding)
        self._watch.over = True
        for token in tokens:
            if self._handed.pop(token, None) is not None:
                self._releaser(token)()
        with self._changed:
            while self._outstanding and not self._over.is_set():
                self._changed.wait(0.1)

    # telling

    def _note(self, store: Connection, note: str | None) -> None:
        with store_errors():
            store.execute("update backfills set note = %s where id = %s", (note, self._order.backfill_id))

    def _fail(self, store: Connection, error: Exception) -> None:
        message = " ".join(str(error).split())
        log.error("backfill.failed", consumer=self._order.consumer, table=self._order.table, error=message)
        with store_errors():
            store.execute(
                "update backfills set state = 'failed', note = %s, finished_at = moment(), since = null"
                " where id = %s and state in ('waiting', 'running')",
                (message, self._order.backfill_id),
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
