"""A chunk that a backfill read → rows of a batch: for its one consumer, less what the stream has overtaken. Pure."""

from __future__ import annotations

import struct
from typing import Any, Final

import orjson

from cdcbridge.batch import Batch
from cdcbridge.encode import partition_of, read_part, read_row
from cdcbridge.filters import Filter, FilterError
from cdcbridge.lsn import format_lsn
from cdcbridge.position import Position
from cdcbridge.reads import Chunk

_LENGTH: Final = struct.Struct("!i")
_ROW_OVERHEAD: Final = 100  # as the collector has it


def inject(batch: Batch, chunk: Chunk, behind: Position, commit_time: int | None, partitions: int) -> Position:
    """Put the chunk's rows into the batch, with positions behind the one given; the last of them."""
    watch = chunk.watch
    wanted = watch.subscription
    consumer = wanted.consumer_id
    if watch.early is None:
        chunk.early = watch.begin()
    stale = watch.stale(chunk.snapshot)
    shared = read_part(watch.topic, behind.commit_lsn, commit_time, consumer)
    first, ordinal = len(batch.rows), behind.ordinal
    taken: list[int] = []
    own_keys: list[str | None] = []
    for row in chunk.rows:
        body, key, data, own_key = _fields(row, wanted.key is not None)
        text = None if key is None else key.decode()
        if text is not None and text in stale:
            continue
        try:
            reason = None
            here = Position(behind.commit_lsn, ordinal + 1)
            if wanted.filter and not _matches(wanted.filter, watch.topic, data, text, here):
                continue
        except FilterError as error:
            reason = f"filter_error: {error}"
        if len(data) > wanted.max_bytes:
            reason = f"oversized: data has {len(data)} bytes, max_message_bytes is {wanted.max_bytes}"
        ordinal += 1
        partition = partition_of(key, partitions)
        index = len(batch.rows)
        batch.rows.append(read_row(ordinal, partition, body, shared))
        batch.keys.append(text)
        batch.partitions.append(partition)
        batch.size += len(body) + len(shared) + _ROW_OVERHEAD
        if reason is None:
            taken.append(index)
            own_keys.append(own_key)
        else:
            batch.dead.append((consumer, index, reason, text if wanted.key is None else own_key))
    if wanted.reads_log:
        batch.streams.add(consumer)
    elif wanted.key is not None:
        indexes, keys = batch.keyed.setdefault(consumer, ([], []))
        indexes += taken
        keys += own_keys
    else:
        batch.groups.setdefault((consumer,), []).extend(taken)
    batch.chunks.append((chunk, len(batch.rows) - first))
    return Position(behind.commit_lsn, ordinal)


def _fields(row: bytes, keyed: bool) -> tuple[bytes, bytes | None, bytes, str | None]:
    """(key and data as COPY has them, key, data, the consumer's own key) of a chunk's row."""
    (length,) = _LENGTH.unpack_from(row)
    start = 4 + max(0, length)
    key = None if length < 0 else row[4:start]
    end = start + 4 + _LENGTH.unpack_from(row, start)[0]
    if not keyed:
        return row, key, row[start + 4 :], None
    own = None if _LENGTH.unpack_from(row, end)[0] < 0 else row[end + 4 :].decode()
    return row[:end], key, row[start + 4 : end], own


def _matches(condition: Filter, topic: str, data: bytes, key: str | None, position: Position) -> bool:
    try:
        environment: dict[str, Any] = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise FilterError(f"a value that CEL cannot hold: {error.msg}") from error
    schema, _, table = topic.partition(".")
    commit_lsn, ordinal = format_lsn(position.commit_lsn), position.ordinal
    meta = {"schema": schema, "table": table, "commit_lsn": commit_lsn, "ordinal": ordinal, "xid": None}
    unchanged = environment.pop("unchanged")
    return condition.wants({**environment, "topic": topic, "key": key, "meta": meta}, unchanged)
