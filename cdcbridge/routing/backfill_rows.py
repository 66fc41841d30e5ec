"""Turn a chunk that a backfill read into rows of a batch, for the one consumer of the backfill.

Rows that the stream has overtaken are left out. The module is pure and never appends anything itself.
"""

from __future__ import annotations

import sys

from cdcbridge.changes.keys import partition_of
from cdcbridge.changes.position import Position
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.batch import ROW_OVERHEAD, AppendBatch
from cdcbridge.routing.copy_format import read_fields, read_part, read_row, read_rows
from cdcbridge.routing.dead_reasons import oversized
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.overtaken import Chunk, Stale
from cdcbridge.routing.verdict import Pass, Take, verdict


def inject(batch: AppendBatch, chunk: Chunk, behind: Position, commit_time: int | None, partitions: int) -> Position:
    """Add the chunk's rows to the batch, at positions after the given one, and return the last position.

    Args:
        batch: The batch. It also gets the chunk itself, so that the append stores the progress of the backfill.
        chunk: The chunk. Its `rows` are empty afterwards.
        behind: The position after which the rows are placed. They have its commit LSN and the next ordinals.
        commit_time: The time of the last transaction, in microseconds since 2000-01-01 UTC, or None.
        partitions: The number of partitions of the log.
    """
    watch = chunk.watch
    wanted = watch.subscription
    consumer = wanted.consumer_id
    if watch.early is None:
        chunk.early = watch.begin()
    stale = watch.stale(chunk.snapshot)
    shared = read_part(watch.topic, behind.commit_lsn, commit_time, consumer)
    first = len(batch.rows)
    if wanted.filter is None and wanted.key is None and not chunk.sized:
        taken = _plain(batch, chunk, stale, behind.ordinal, shared, partitions)
        own_keys: list[str | None] = []
    else:
        taken, own_keys = _looked_at(batch, chunk, stale, behind, shared, partitions)
    if wanted.reads_log:
        batch.streams.add(consumer)
    elif wanted.own_keys:
        indexes, keys = batch.keyed.setdefault(consumer, ([], []))
        indexes += taken
        keys += own_keys
    else:
        batch.groups.setdefault((consumer,), []).extend(taken)
    sent = len(batch.rows) - first
    batch.chunks.append((chunk, sent))
    chunk.rows = []  # the batch has them; large rows would not fit into memory twice
    return Position(behind.commit_lsn, behind.ordinal + sent)


def _plain(batch: AppendBatch, chunk: Chunk, stale: Stale, ordinal: int, shared: bytes, partitions: int) -> list[int]:
    """Add all rows as they are, without the stale ones, and return the indexes of the rows that are not too large."""
    wanted = chunk.watch.subscription
    limit = sys.maxsize if wanted.reads_log else wanted.max_bytes
    first = len(batch.rows)
    read = read_rows(chunk.rows, stale, ordinal + 1, shared, partitions)
    batch.rows += read.rows
    batch.keys += read.keys
    batch.partitions += read.partitions
    batch.size += sum(read.sizes) + len(read.rows) * (len(shared) + ROW_OVERHEAD)
    if max(read.sizes, default=0) <= limit:
        return list(range(first, len(batch.rows)))
    taken = []
    for index, (size, key) in enumerate(zip(read.sizes, read.keys, strict=True), first):
        if size <= limit:
            taken.append(index)
        else:
            batch.dead.append((wanted.consumer_id, index, oversized(size, limit), key))
    return taken


def _looked_at(
    batch: AppendBatch, chunk: Chunk, stale: Stale, behind: Position, shared: bytes, partitions: int
) -> tuple[list[int], list[str | None]]:
    """Add the rows that the consumer takes or buries, and return the indexes and keys of those that it takes.

    This is for consumers with a filter or a key of their own, and for chunks with rows that were too large to be
    loaded.
    """
    watch, wanted = chunk.watch, chunk.watch.subscription
    lsn, ordinal = format_lsn(behind.commit_lsn), behind.ordinal
    taken: list[int] = []
    own_keys: list[str | None] = []
    for row in chunk.rows:
        body, key, data, own_key, least = read_fields(row, keyed=wanted.key is not None, sized=chunk.sized)
        text = None if key is None else key.decode()
        if text is not None and text in stale:
            continue
        message = Logged(data, watch.topic, text, lsn, ordinal + 1, None, its_key=own_key, size=len(data), least=least)
        said = verdict(wanted, message)
        if isinstance(said, Pass):
            continue
        ordinal += 1
        partition = partition_of(key, partitions)
        index = len(batch.rows)
        batch.rows.append(read_row(ordinal, partition, body, shared))
        batch.keys.append(text)
        batch.partitions.append(partition)
        batch.size += len(body) + len(shared) + ROW_OVERHEAD
        if isinstance(said, Take):
            taken.append(index)
            own_keys.append(said.key)
        else:
            batch.dead.append((wanted.consumer_id, index, said.reason, said.key))
    return taken, own_keys
