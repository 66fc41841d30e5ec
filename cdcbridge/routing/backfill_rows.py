"""A chunk that a backfill read → rows of a batch: for its one consumer, less what the stream has overtaken. Pure."""

from __future__ import annotations

import struct
import sys
import zlib
from typing import Final

from cdcbridge.changes.keys import partition_of
from cdcbridge.changes.position import Position
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.batch import ROW_OVERHEAD, Batch
from cdcbridge.routing.copy_format import PACK_READ, read_part
from cdcbridge.routing.dead_reasons import oversized
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.overtaken import Chunk, Stale
from cdcbridge.routing.verdict import Pass, Take, verdict

_LENGTH: Final = struct.Struct("!i")
_NULL: Final = 0xFFFFFFFF


def inject(batch: Batch, chunk: Chunk, behind: Position, commit_time: int | None, partitions: int) -> Position:
    """Put the chunk's rows into the batch, with positions behind the one given; the last of them."""
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
    chunk.rows = []  # they are in the batch; of large ones memory has no place for two copies
    return Position(behind.commit_lsn, behind.ordinal + sent)


def _plain(batch: Batch, chunk: Chunk, stale: Stale, ordinal: int, shared: bytes, partitions: int) -> list[int]:
    """All of it as it is: the way of most rows, and as short as can be."""
    consumer = chunk.watch.subscription.consumer_id
    limit = sys.maxsize if chunk.watch.subscription.reads_log else chunk.watch.subscription.max_bytes
    rows, keys, numbers = batch.rows, batch.keys, batch.partitions
    first = index = len(rows)
    dead = set()
    pack, crc = PACK_READ, zlib.crc32
    size = 0
    for body in chunk.rows:
        length = int.from_bytes(body[:4])
        key = None if length == _NULL else body[4 : 4 + length]
        text = None if key is None else key.decode()
        if text is not None and text in stale:
            continue
        partition = crc(key) % partitions if key is not None else 0
        ordinal += 1
        rows.append(b"".join((pack(4, ordinal, 4, partition), body, shared)))
        keys.append(text)
        numbers.append(partition)
        data = len(body) - 8 - (0 if key is None else length)
        if data > limit:
            dead.add(index)
            batch.dead.append((consumer, index, oversized(data, limit), text))
        size += data
        index += 1
    batch.size += size + (index - first) * (len(shared) + ROW_OVERHEAD)
    return [n for n in range(first, index) if n not in dead] if dead else list(range(first, index))


def _looked_at(
    batch: Batch, chunk: Chunk, stale: Stale, behind: Position, shared: bytes, partitions: int
) -> tuple[list[int], list[str | None]]:
    """Add the rows that the consumer takes, and give their indexes and its own keys.

    For consumers with a filter or a key of their own, and for chunks with rows that were not loaded.
    """
    watch, wanted = chunk.watch, chunk.watch.subscription
    lsn, ordinal = format_lsn(behind.commit_lsn), behind.ordinal
    taken: list[int] = []
    own_keys: list[str | None] = []
    for row in chunk.rows:
        body, key, data, own_key, least = _fields(row, wanted.key is not None, chunk.sized)
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
        batch.rows.append(PACK_READ(4, ordinal, 4, partition) + body + shared)
        batch.keys.append(text)
        batch.partitions.append(partition)
        batch.size += len(body) + len(shared) + ROW_OVERHEAD
        if isinstance(said, Take):
            taken.append(index)
            own_keys.append(said.key)
        else:
            batch.dead.append((wanted.consumer_id, index, said.reason, said.key))
    return taken, own_keys


def _fields(row: bytes, keyed: bool, sized: bool) -> tuple[bytes, bytes | None, bytes, str | None, int | None]:
    """(key and data as COPY has them, key, data, the consumer's own key, bytes at least) of a chunk's row."""
    key, start = _field(row, 0)
    data, end = _field(row, start)
    own, behind = _field(row, end) if keyed else (None, end)
    least = _field(row, behind)[0] if sized else None
    return (
        row[:end],
        key,
        data or b"",
        None if own is None else own.decode(),
        None if least is None else int.from_bytes(least),
    )


def _field(row: bytes, start: int) -> tuple[bytes | None, int]:
    """A field's value, and where the next one begins."""
    (length,) = _LENGTH.unpack_from(row, start)
    start += 4
    return (None, start) if length < 0 else (row[start : start + length], start + length)
