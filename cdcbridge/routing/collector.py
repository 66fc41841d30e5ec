"""Turn events into batches for the store: give each change its position, route it, and encode it.

Changes up to the position that the store already has are recognised here and left out. The module is pure, never
appends a batch itself, and is the part of the bridge that runs for every change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from cdcbridge.changes.events import Begin, Change, Commit, Event, LogicalMessage, Relation, Truncate
from cdcbridge.changes.keys import key_text, partition_of
from cdcbridge.changes.position import Position
from cdcbridge.errors import DecodeError
from cdcbridge.routing.annotations import PLAIN, PREFIX, read_annotation
from cdcbridge.routing.backfill_rows import inject
from cdcbridge.routing.batch import ROW_OVERHEAD, AppendBatch
from cdcbridge.routing.copy_format import message_row, published_row, shared_part, with_old_key
from cdcbridge.routing.dead_reasons import oversized
from cdcbridge.routing.judged import Changed
from cdcbridge.routing.logical_messages import TOPIC_PREFIX, Published, read_published
from cdcbridge.routing.mirror_marks import MARKER_PREFIX, PROBE_PREFIX, Marker, TransactionMark
from cdcbridge.routing.overtaken import WATERMARK_PREFIX, Chunk, Watch
from cdcbridge.routing.router import Route, Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.table_guard import TableGuard
from cdcbridge.routing.verdict import Bury, Pass, Take, verdict, verdicts

# The most rows of a chunk. A chunk that would raise the rows of a batch above this waits for the next batch.
READ_ROWS = 10000
READ_BYTES = 4 << 20  # a batch with more bytes takes no further chunk
READ_ROWS_BESIDE = 300  # the most rows of a chunk while there are changes, because they wait for its append


class Collector:
    """A builder of batches: `feed()` takes events, and `take()` returns all that they made as one batch."""

    def __init__(
        self,
        router: Router,
        partitions: int,
        done: Position,
        end_lsn: int,
        handed: Callable[[bytes], Watch | Chunk | None] = lambda _token: None,
        guard: TableGuard | None = None,
        effective_time: int = 0,
    ) -> None:
        """Begin after the position that the store has.

        Args:
            router: Knows the consumers of each table and topic.
            partitions: The number of partitions of the log.
            done: The position that the store has. Changes up to it are skipped.
            end_lsn: The LSN at which the last complete transaction in the store ends.
            handed: Returns the watch or chunk that a backfill handed over with a watermark, by the watermark's token.
                None for a token that is not known.
            guard: Looks at each version of a table that the stream brings. None: one without knowledge of earlier
                versions.
            effective_time: The greatest commit time of the transactions before, in microseconds since 2000-01-01 UTC.
        """
        self._router = router
        self._partitions = partitions
        self._done = done
        self._begin: Begin | None = None
        self._relation: Relation | None = None  # of the last change, as are the next two
        self._op = ""
        self._plan: Route | None = None
        self._shared: dict[str, bytes] = {}  # the columns that rows of the open transaction share, by topic
        self._encode = PLAIN  # adds the annotation of the open transaction, if it has one
        self._ordinal = -1
        self._skip_through = -1
        self._position = done
        self.end_lsn = end_lsn
        self._batch = AppendBatch()
        self._commit_time: int | None = None
        self._effective_time = effective_time
        self._handed = handed
        self._guard = guard or TableGuard(router)
        self._watches: dict[str, list[Watch]] = {}  # by topic
        self._chunks: deque[Chunk] = deque()  # those whose watermark the stream has passed
        self._awaited = False  # a watermark arrived: the store must have its position soon
        self.changes = 0  # rows made of changes, without those of backfills and published messages

    @property
    def open(self) -> bool:
        """True while a transaction is open: after its Begin and before its Commit."""
        return self._begin is not None

    @property
    def position(self) -> Position:
        """The position of the last change that was read, or the one that the store has if nothing newer was read."""
        begin = self._begin
        if begin is None or begin.commit_lsn is None:
            return self._position
        return max(self._position, Position(begin.commit_lsn, self._ordinal))

    @property
    def rows(self) -> int:
        return len(self._batch.rows)

    @property
    def waiting(self) -> bool:
        """True if there are rows or chunks to append, or if the store must soon have the position of a watermark."""
        return bool(self._batch.rows or self._batch.chunks or self._batch.marks or self._awaited)

    @property
    def size(self) -> int:
        return self._batch.size

    def take(self) -> AppendBatch:
        """Return everything that was collected since the last call, with the position up to which it is complete."""
        batch, self._batch = self._batch, AppendBatch()
        self._awaited = False
        batch.position, batch.end_lsn, batch.open = self.position, self.end_lsn, self.open
        batch.in_order = self._router.in_order
        batch.commit_time = self._commit_time
        batch.effective_time = self._effective_time
        return batch

    def add_reads(self, *, beside: bool) -> None:
        """Move chunks whose watermark has passed into the batch, after the last transaction.

        Nothing is moved while a transaction is open. An empty batch takes at least one chunk, however large.

        Args:
            beside: Whether a chunk may share its batch, up to READ_ROWS rows and READ_BYTES bytes. If not, a chunk is
                added only to an empty batch.
        """
        while self._chunks and self._begin is None:
            full = self.rows + len(self._chunks[0].rows) > READ_ROWS or self.size > READ_BYTES
            if self.rows and (not beside or full):
                return
            chunk = self._chunks.popleft()
            if chunk.watch.over:
                chunk.release()
                continue
            self._position = inject(self._batch, chunk, self._position, self._commit_time, self._partitions)
            if chunk.last:
                self._watches[chunk.watch.topic].remove(chunk.watch)

    def spill(self, xid: int, n: int, block: bytes) -> None:
        """Add block `n` of a transaction in progress to the batch, so that the next append stores it."""
        self._batch.spilled.append((xid, n, block))
        self._batch.size += len(block)

    @property
    def at_hand(self) -> tuple[AppendBatch, Begin | None]:
        """The batch as it is so far, and the Begin of the open transaction or None."""
        return self._batch, self._begin

    def unspill(self, xid: int) -> None:
        """Let the next append delete the blocks of this transaction: they are not needed once it is durable."""
        self._batch.unspilled.append(xid)

    def idle(self, wal_end: int) -> None:
        """Note that the source has sent everything up to the LSN `wal_end`.

        Call it only while no transaction is open and nothing waits to be appended.
        """
        self.end_lsn = max(self.end_lsn, wal_end)
        self._commit_time = None

    def feed(self, events: Iterable[Event]) -> None:
        """Take events in their order.

        Raises:
            DecodeError: The order makes no sense, for example a change outside a transaction.
            IdentityLost: A table that a consumer names has lost its replica identity.
            OperatorNeeded: A column that a consumer needs was renamed or dropped.
        """
        for event in events:
            if type(event) is Change:
                self._ordinal += 1
                if self._ordinal > self._skip_through:
                    self._change(event)
            else:
                self._feed_other(event)

    def _feed_other(self, event: Event) -> None:
        if type(event) is Begin:
            self._begin_transaction(event)
        elif type(event) is Commit:
            self._end_transaction(event)
        elif type(event) is Truncate:
            self._truncate(event)
        elif type(event) is Relation:
            self._guard.require_identity(event, self.position)
        elif type(event) is LogicalMessage and not event.transactional:
            self._outside(event)
        else:
            self._ordinal += 1
            if type(event) is LogicalMessage and event.prefix == PREFIX:
                self._annotate(event)
            elif type(event) is LogicalMessage and self._ordinal > self._skip_through:
                self._published(event)

    # transactions

    def _begin_transaction(self, event: Begin) -> None:
        if self._begin is not None or event.commit_lsn is None or event.xid is None or event.commit_time is None:
            raise DecodeError("stream", f"unexpected {event!r}", lsn=event.commit_lsn)
        self._begin = event
        self._commit_time = event.commit_time
        self._effective_time = max(self._effective_time, event.commit_time)
        self._ordinal = -1
        self._shared = {}
        self._encode = PLAIN
        if event.commit_lsn < self._done.commit_lsn:
            self._skip_through = 1 << 62
        else:
            self._skip_through = self._done.ordinal if event.commit_lsn == self._done.commit_lsn else -1

    def _end_transaction(self, event: Commit) -> None:
        if self._begin is None or event.end_lsn is None:
            raise DecodeError("stream", f"unexpected {event!r}", lsn=event.commit_lsn)
        self._position = self.position
        self.end_lsn = max(self.end_lsn, event.end_lsn)
        self._begin = None
        self._shared = {}

    # messages

    def _change(self, change: Change) -> None:
        """Route a change, encode it, and add it to the batch for each consumer that takes or buries it."""
        relation = change.relation
        if relation is not self._relation or change.op != self._op:
            self._guard.require_columns(relation, self.position)
            self._relation, self._op = relation, change.op
            self._plan = self._router.plan(relation, change.op)
        plan = self._plan
        if plan is None:
            return
        key = key_text(change.record, relation.key)
        old_key = None if change.old is None else key_text(change.old, relation.key)
        if self._watches:
            self._note(change, key, old_key)
        message = Changed(change, key, old_key, self._begin, self._ordinal, self._encode) if plan.special else None
        wanted = None if message is None else verdicts(plan.special, message)
        if wanted is not None and not wanted and not plan.plain and not plan.streams:
            return
        data = self._encode(change.op, change.record, change.old, change.unchanged) if message is None else message.data
        shared = self._shared.get(relation.topic) or self._share(relation.topic)
        if old_key is not None and old_key != key:
            shared = with_old_key(shared, old_key)
        text = None if key is None else key.encode()
        partition = partition_of(text, self._partitions)
        row = message_row(self._ordinal, text, partition, data, shared)
        batch = self._batch
        index = len(batch.rows)
        self.changes += 1
        batch.rows.append(row)
        batch.keys.append(key)
        batch.partitions.append(partition)
        batch.size += len(row) + ROW_OVERHEAD
        batch.streams.update(plan.streams)
        plain = plan.plain
        if len(data) > plan.smallest_limit:
            plain = self._bury_oversized(plan, key, index, len(data))
        if plain:
            group = batch.groups.get(plain)
            if group is None:
                group = batch.groups[plain] = []
            group.append(index)
        if wanted:
            self._fan_out(wanted, index)

    def _truncate(self, event: Truncate) -> None:
        for index in range(event.named):
            self._ordinal += 1
            if index < len(event.relations) and self._ordinal > self._skip_through:
                before = len(self._batch.rows)
                self._change(Change("truncate", event.relations[index], None))
                self._batch.barriers.extend(range(before, len(self._batch.rows)))

    def _note(self, change: Change, key: str | None, old_key: str | None) -> None:
        """Note the keys in the watches of the table: rows of these keys that a backfill has read may be stale now."""
        begin = self._begin
        for watch in self._watches.get(change.relation.topic, ()):
            watch.note(change.op, (key, old_key), (begin and begin.xid) or 0)

    def _watermark(self, token: bytes) -> None:
        """Take over the watch or chunk that a backfill handed over with this watermark.

        The stream has reached the place where the backfill began, or a place after it read the chunk. A token that is
        not known any more brings nothing, for example that of a chunk which the backfill took back.
        """
        self._awaited = True
        handed = self._handed(token)
        if isinstance(handed, Watch):
            watches = self._watches.setdefault(handed.topic, [])
            watches[:] = [watch for watch in watches if not watch.over] + [handed]
        elif handed is not None:
            self._chunks.append(handed)

    def _mark(self, marker: Marker | None) -> None:
        """Note that a mirror applied the open transaction."""
        begin = self._begin
        if marker is not None and begin is not None and begin.commit_lsn is not None:
            self._batch.marks[begin.commit_lsn] = TransactionMark(begin.commit_lsn, marker, None)

    def _outside(self, event: LogicalMessage) -> None:
        """Handle a message that belongs to no transaction: a mirror's question how far the log is, or a mistake."""
        if event.prefix == PROBE_PREFIX and self._begin is None and event.lsn is not None:
            self.end_lsn = max(self.end_lsn, event.lsn)  # the store soon has this place
            self._awaited = True
        elif event.prefix.startswith(TOPIC_PREFIX):  # it has no position, so it is dropped
            self._refuse("published.outside", event, "it was not transactional, and does not belong to a transaction")

    def _published(self, event: LogicalMessage) -> None:
        """Add a message that an application wrote into the WAL, if a consumer lists its topic.

        Watermarks of backfills arrive here, too. Messages with other prefixes are ignored.
        """
        if event.prefix == WATERMARK_PREFIX:
            self._watermark(event.content)
        elif event.prefix == MARKER_PREFIX:
            self._mark(Marker.read(event.content))
        if not event.prefix.startswith(TOPIC_PREFIX):
            return
        topic = event.prefix.removeprefix(TOPIC_PREFIX)
        readers = self._router.readers(topic)
        if not readers:
            self._refuse("published.unlisted", event, "no consumer lists the topic")
            return
        message = read_published(event.content)
        if message.malformed is not None:
            self._refuse("published.malformed", event, message.malformed)
        data = message.data
        batch = self._batch
        index = len(batch.rows)
        text = None if message.key is None else message.key.encode()
        partition = partition_of(text, self._partitions)
        batch.rows.append(published_row(topic, text, partition, data))
        batch.keys.append(message.key)
        batch.partitions.append(partition)
        batch.size += len(data) + ROW_OVERHEAD
        for reader in readers:
            if reader.reads_log:
                batch.streams.add(reader.consumer_id)
            else:
                self._give(reader, message, index)

    def _annotate(self, event: LogicalMessage) -> None:
        """Annotate the changes that follow, also if the store has the first part of their transaction already."""
        encode, malformed = read_annotation(event.content)
        if malformed is None:
            self._encode = encode
        elif self._ordinal > self._skip_through:
            self._refuse("published.malformed", event, malformed)

    def _give(self, reader: Subscription, message: Published, index: int) -> None:
        """Fan a published message out to a queue or fifo consumer: at once, at a later time, or as a dead letter."""
        said = verdict(reader, message)
        if isinstance(said, Pass):
            return
        if isinstance(said, Take) and message.deliver_at is not None:
            self._batch.later.append((reader.consumer_id, index, said.key, message.deliver_at))
            if not reader.in_order:
                return  # a fifo consumer keeps it in its group: waiting_rows() ends a run of messages there
        self._fan_out([(reader, said)], index)

    def _refuse(self, what: str, event: LogicalMessage, why: str) -> None:
        """Count a message of the WAL that is not delivered as it was written, for the log and the metrics."""
        self._batch.refused[what, event.prefix.removeprefix(TOPIC_PREFIX), why] += 1

    def _share(self, topic: str) -> bytes:
        begin = self._begin
        if begin is None or begin.commit_lsn is None or begin.xid is None or begin.commit_time is None:
            raise DecodeError("stream", f"a change of {topic} outside a transaction")
        if begin.commit_time < self._effective_time and self._router.two_way:
            late = TransactionMark(begin.commit_lsn, None, self._effective_time)
            self._batch.marks.setdefault(begin.commit_lsn, late)
        shared = self._shared[topic] = shared_part(topic, begin.commit_lsn, begin.xid, begin.commit_time)
        return shared

    def _bury_oversized(self, plan: Route, key: str | None, index: int, size: int) -> tuple[int, ...]:
        """Bury the message for the plain consumers for which it is too large, and return the other plain consumers."""
        for consumer, limit in plan.limits:
            if size > limit:
                self._batch.dead.append((consumer, index, oversized(size, limit), key))
        return tuple(consumer for consumer, limit in plan.limits if size <= limit)

    def _fan_out(self, wanted: list[tuple[Subscription, Take | Bury]], index: int) -> None:
        """Add a message to the batch for these consumers, by their verdicts."""
        batch = self._batch
        for subscription, said in wanted:
            consumer = subscription.consumer_id
            if said.data is not None:
                batch.own.append((consumer, index, said.key, said.data))
                batch.size += len(said.data) + ROW_OVERHEAD
            if isinstance(said, Bury):
                batch.dead.append((consumer, index, said.reason, said.key))
            elif subscription.own_keys:
                indexes, keys = batch.keyed.setdefault(consumer, ([], []))
                indexes.append(index)
                keys.append(said.key)
            else:
                batch.groups.setdefault((consumer,), []).append(index)
