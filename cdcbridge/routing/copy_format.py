"""Encode messages and fan-out rows as bytes: the JSON text `data`, and rows in COPY's binary format.

Source: PostgreSQL manual, "COPY", Binary Format. The format is binary because it needs no escaping, and because the
server does not have to parse timestamps and LSNs. The module is pure and never sends a row itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Container, Sequence
from typing import Final, NamedTuple

import orjson

from cdcbridge.changes.events import Row

COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + b"\0" * 8
COPY_TRAILER: Final = b"\xff\xff"
ROW_HEAD: Final = 2  # the bytes before the fields of a row, which hold the number of its fields
_NULL: Final = -1  # the length of a field that is null
_NULL_FIELD: Final = b"\xff\xff\xff\xff"
_SEQ = struct.Struct("!HIq")
_MESSAGE = struct.Struct("!IiIii")
_READ = struct.Struct("!IiIi")  # ordinal and partition of a row that a backfill read; its other fields follow
_TRANSACTION = struct.Struct("!IqIqIq")
_CHUNK_HEAD = struct.Struct("!HIiIq")
_ARRAY_HEAD = struct.Struct("!iiIii")
_LENGTH = struct.Struct("!I")
_SIGNED_LENGTH = struct.Struct("!i")
_NULL_LENGTH: Final = 0xFFFFFFFF  # _NULL as an unsigned number
_INT8_OID, _TEXT_OID = 20, 25

MESSAGE_COLUMNS: Final = "seq, ordinal, partition, key, data, topic, commit_lsn, xid, commit_time, old_key, reader"
CHUNK_COLUMNS: Final = "consumer_id, ord, seqs, keys"
COPY_MESSAGES: Final = f"copy messages ({MESSAGE_COLUMNS}) from stdin (format binary)"
COPY_WAITING: Final = f"copy waiting ({CHUNK_COLUMNS}) from stdin (format binary)"
COPY_SPILLED: Final = "copy spilled (xid, n, block) from stdin (format binary)"
GAP_TOPIC: Final = "cdcbridge.gap"  # the topic of gap messages, which report changes that are missing from the log
# Messages per fan-out row of a large append. Such a row is below TOAST's 2 KB, and a receive of 100 takes whole rows.
CHUNK_SIZE: Final = 50
SMALL_APPEND: Final = 128  # messages; up to here each has a row of its own, so that concurrent receivers share them


def encode_data(op: str, record: Row | None, old: Row | None, unchanged: Sequence[str]) -> bytes:
    """Return the `data` of a message as JSON text."""
    return orjson.dumps({"op": op, "record": record, "old": old, "unchanged": unchanged})


def shared_part(topic: str, commit_lsn: int, xid: int, commit_time: int) -> bytes:
    """Return the columns that all messages of a topic share within a transaction, with a null `old_key` and `reader`.

    Only a few messages have one of these two: see `with_old_key()` and `for_reader()`.
    """
    return _sized(topic.encode()) + _TRANSACTION.pack(8, commit_lsn, 8, xid, 8, commit_time) + 2 * _NULL_FIELD


def message_row(ordinal: int, key: bytes | None, partition: int, data: bytes, shared: bytes) -> bytes:
    """Return a row for COPY messages (MESSAGE_COLUMNS) from its ordinal on.

    `message_rows()` adds the seq.

    Args:
        ordinal: The place of the change in its transaction.
        key: The log's key, or None.
        partition: The number of the key's partition.
        data: The message's `data`.
        shared: The result of `shared_part()` for the topic and the transaction.
    """
    length = _LENGTH.pack(len(data))
    if key is None:
        return b"".join((_MESSAGE.pack(4, ordinal, 4, partition, _NULL), length, data, shared))
    return b"".join((_MESSAGE.pack(4, ordinal, 4, partition, len(key)), key, length, data, shared))


def with_old_key(shared: bytes, old_key: str) -> bytes:
    """Return the shared part for an update that changed the key from `old_key` to another one."""
    return shared[: -2 * len(_NULL_FIELD)] + _sized(old_key.encode()) + _NULL_FIELD


def for_reader(shared: bytes, reader: int) -> bytes:
    """Return the shared part for a message that is for one consumer alone, whose id is `reader`."""
    return shared[: -len(_NULL_FIELD)] + struct.pack("!Ii", 4, reader)


def read_part(topic: str, commit_lsn: int, commit_time: int | None, reader: int) -> bytes:
    """Return the shared part of rows that a backfill read for the consumer `reader`.

    The rows are placed after the transaction that committed at `commit_lsn`.
    """
    time = _NULL_FIELD if commit_time is None else struct.pack("!Iq", 8, commit_time)
    lsn = struct.pack("!Iq", 8, commit_lsn)
    return _sized(topic.encode()) + lsn + _NULL_FIELD + time + _NULL_FIELD + struct.pack("!Ii", 4, reader)


def read_row(ordinal: int, partition: int, fields: bytes, shared: bytes) -> bytes:
    """Return a row for COPY messages of a row that a backfill read.

    `fields` has its key and data as COPY gave them.
    """
    return _READ.pack(4, ordinal, 4, partition) + fields + shared


class ReadRows(NamedTuple):
    """Rows that a backfill read, as rows for COPY messages.

    The other lists have the key, the partition and the size of the data in bytes of each row.
    """

    rows: list[bytes]
    keys: list[str | None]
    partitions: list[int]
    sizes: list[int]


def read_rows(
    given: Sequence[bytes], stale: Container[str | None], ordinal: int, shared: bytes, partitions: int
) -> ReadRows:
    """Turn rows that a backfill read into rows for COPY messages, without those whose key is stale.

    Most rows of a backfill are made here, so the loop is as short as it can be.

    Args:
        given: The key and data of each row, as COPY gave them.
        stale: The keys of the rows to leave out. A row without a key is never left out.
        ordinal: The ordinal of the first row of the result.
        shared: The result of `read_part()`.
        partitions: The number of partitions of the log.
    """
    found = ReadRows([], [], [], [])
    rows, keys, numbers, sizes = found
    pack, crc = _READ.pack, zlib.crc32
    for body in given:
        length = int.from_bytes(body[:4])
        key = None if length == _NULL_LENGTH else body[4 : 4 + length]
        text = None if key is None else key.decode()
        if text is not None and text in stale:
            continue
        partition = crc(key) % partitions if key is not None else 0
        rows.append(b"".join((pack(4, ordinal, 4, partition), body, shared)))
        ordinal += 1
        keys.append(text)
        numbers.append(partition)
        sizes.append(len(body) - 8 - (0 if key is None else length))
    return found


def read_fields(row: bytes, *, keyed: bool, sized: bool) -> tuple[bytes, bytes | None, bytes, str | None, int | None]:
    """Split a row that a backfill read into its fields.

    Args:
        row: The fields as COPY gave them: key, data, and then those below.
        keyed: Whether the consumer's own key follows.
        sized: Whether the least size of a row that was not loaded follows, or null.

    Returns:
        The key and data as COPY gave them, the key, the data, the consumer's own key, and the least size in bytes.
    """
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
    """Return the value of the field that begins at `start`, and the place where the next one begins."""
    (length,) = _SIGNED_LENGTH.unpack_from(row, start)
    start += 4
    return (None, start) if length < 0 else (row[start : start + length], start + length)


def published_row(topic: str, key: bytes | None, partition: int, data: bytes) -> bytes:
    """Return the row of a published message, which has no position."""
    fields = (None, struct.pack("!i", partition), key, data, topic.encode(), None, None, None, None, None)
    return b"".join([_NULL_FIELD if field is None else _sized(field) for field in fields])


def message_rows(rows: Sequence[bytes], first: int, partitions: Sequence[int] = ()) -> bytes:
    """Return complete rows for COPY messages, with consecutive seqs from `first` on.

    Args:
        rows: The rows, without their seqs.
        first: The seq of the first row.
        partitions: The partition of each row, if stream consumers read some of them. Then the rows are sorted by
            partition, so that the table stores those of a partition together, as group members read them. Each row
            keeps its seq.
    """
    pieces = [b""] * (2 * len(rows))
    pack = _SEQ.pack
    if partitions:
        order = sorted(range(len(rows)), key=partitions.__getitem__)
        pieces[::2] = [pack(11, 8, first + index) for index in order]
        pieces[1::2] = [rows[index] for index in order]
    else:
        pieces[::2] = [pack(11, 8, seq) for seq in range(first, first + len(rows))]
        pieces[1::2] = rows
    return b"".join(pieces)


def chunk_rows(
    consumer_ids: Sequence[int], seqs: Sequence[int], keys: Sequence[str | None] | None, appended: int
) -> bytes:
    """Return rows for COPY waiting (CHUNK_COLUMNS) that fan messages out to each of the consumers.

    Args:
        consumer_ids: The ids of the consumers.
        seqs: The seqs of the messages, in rising order.
        keys: The key of each message. None: the consumers use the log's keys.
        appended: The number of messages in the whole append.
    """
    size = 1 if appended <= SMALL_APPEND else CHUNK_SIZE
    tails = []
    for start in range(0, len(seqs), size):
        chunk = seqs[start : start + size]
        chunk_keys = _NULL_FIELD if keys is None else _text_array(keys[start : start + size])
        tails.append((chunk[0], _int8_array(chunk) + chunk_keys))
    head = _CHUNK_HEAD.pack
    return b"".join([head(4, 4, consumer, 8, ord_) + tail for consumer in consumer_ids for ord_, tail in tails])


def _sized(value: bytes) -> bytes:
    """Return a field of a row: its length, then its bytes."""
    return _LENGTH.pack(len(value)) + value


def _int8_array(values: Sequence[int]) -> bytes:
    interleaved = [8] * (2 * len(values))
    interleaved[1::2] = values
    body = struct.pack("!" + "Iq" * len(values), *interleaved)
    return _LENGTH.pack(20 + len(body)) + _ARRAY_HEAD.pack(1, 0, _INT8_OID, len(values), 1) + body


def _text_array(values: Sequence[str | None]) -> bytes:
    body = b"".join([_NULL_FIELD if value is None else _sized(value.encode()) for value in values])
    return _LENGTH.pack(20 + len(body)) + _ARRAY_HEAD.pack(1, 1, _TEXT_OID, len(values), 1) + body
