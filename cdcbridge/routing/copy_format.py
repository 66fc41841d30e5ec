"""Messages and fan-out rows → bytes: `data`, and COPY's binary format. Pure.

Source: PostgreSQL manual, "COPY", Binary Format. Binary, because it needs no escaping, and because the server
parses neither timestamps nor LSNs.
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
ROW_HEAD: Final = 2  # bytes before the fields of a row: how many there are
_NULL: Final = -1  # as the length of a field
_NULL_FIELD: Final = b"\xff\xff\xff\xff"
_SEQ = struct.Struct("!HIq")
_MESSAGE = struct.Struct("!IiIii")
_READ = struct.Struct("!IiIi")  # ordinal and partition of a row that a backfill read; the rest follows
_TRANSACTION = struct.Struct("!IqIqIq")
_CHUNK_HEAD = struct.Struct("!HIiIq")
_ARRAY_HEAD = struct.Struct("!iiIii")
_LENGTH = struct.Struct("!I")
_SIGNED_LENGTH = struct.Struct("!i")
_NULL_LENGTH: Final = 0xFFFFFFFF  # that of a null without its sign
_INT8_OID, _TEXT_OID = 20, 25

MESSAGE_COLUMNS: Final = "seq, ordinal, partition, key, data, topic, commit_lsn, xid, commit_time, old_key, reader"
CHUNK_COLUMNS: Final = "consumer_id, ord, seqs, keys"
COPY_MESSAGES: Final = f"copy messages ({MESSAGE_COLUMNS}) from stdin (format binary)"
COPY_WAITING: Final = f"copy waiting ({CHUNK_COLUMNS}) from stdin (format binary)"
COPY_SPILLED: Final = "copy spilled (xid, n, block) from stdin (format binary)"
GAP_TOPIC: Final = "cdcbridge.gap"  # of the messages that tell of changes left behind
# Messages per fan-out row of a large append: below TOAST's 2 KB, and a receive of 100 takes whole rows.
CHUNK_SIZE: Final = 50
SMALL_APPEND: Final = 128  # up to here each message has a row of its own, so that concurrent receivers share them


def encode_data(op: str, record: Row | None, old: Row | None, unchanged: Sequence[str]) -> bytes:
    """The message's `data`, as JSON text."""
    return orjson.dumps({"op": op, "record": record, "old": old, "unchanged": unchanged})


def shared_part(topic: str, commit_lsn: int, xid: int, commit_time: int) -> bytes:
    """The columns that all messages of a topic share within a transaction; few have an old_key, and none a reader."""
    return _sized(topic.encode()) + _TRANSACTION.pack(8, commit_lsn, 8, xid, 8, commit_time) + 2 * _NULL_FIELD


def message_row(ordinal: int, key: bytes | None, partition: int, data: bytes, shared: bytes) -> bytes:
    """One row for COPY messages (MESSAGE_COLUMNS), from the ordinal on; `shared` is its shared_part."""
    length = _LENGTH.pack(len(data))
    if key is None:
        return b"".join((_MESSAGE.pack(4, ordinal, 4, partition, _NULL), length, data, shared))
    return b"".join((_MESSAGE.pack(4, ordinal, 4, partition, len(key)), key, length, data, shared))


def with_old_key(shared: bytes, old_key: str) -> bytes:
    """The shared part for an update that took this key away."""
    return shared[: -2 * len(_NULL_FIELD)] + _sized(old_key.encode()) + _NULL_FIELD


def for_reader(shared: bytes, reader: int) -> bytes:
    """The shared part for a message that is for one consumer alone."""
    return shared[: -len(_NULL_FIELD)] + struct.pack("!Ii", 4, reader)


def read_part(topic: str, commit_lsn: int, commit_time: int | None, reader: int) -> bytes:
    """The shared part of rows that a backfill read for one consumer, behind a transaction."""
    time = _NULL_FIELD if commit_time is None else struct.pack("!Iq", 8, commit_time)
    lsn = struct.pack("!Iq", 8, commit_lsn)
    return _sized(topic.encode()) + lsn + _NULL_FIELD + time + _NULL_FIELD + struct.pack("!Ii", 4, reader)


def read_row(ordinal: int, partition: int, fields: bytes, shared: bytes) -> bytes:
    """One row for COPY messages, of a row that a backfill read: its key and its data as COPY gave them."""
    return _READ.pack(4, ordinal, 4, partition) + fields + shared


class ReadRows(NamedTuple):
    """Rows that a backfill read, for COPY messages, and of each its key, its partition and the bytes of its data."""

    rows: list[bytes]
    keys: list[str | None]
    partitions: list[int]
    sizes: list[int]


def read_rows(
    given: Sequence[bytes], stale: Container[str | None], ordinal: int, shared: bytes, partitions: int
) -> ReadRows:
    """Rows of key and data as COPY gave them → rows for COPY messages, without those whose key is stale.

    ordinal: of the first one. This is the way of most rows of a backfill, and as short as can be.
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
    """(key and data as COPY has them, key, data, the consumer's own key, bytes at least) of a backfill's row."""
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
    (length,) = _SIGNED_LENGTH.unpack_from(row, start)
    start += 4
    return (None, start) if length < 0 else (row[start : start + length], start + length)


def published_row(topic: str, key: bytes | None, partition: int, data: bytes) -> bytes:
    """The row of a published message, which has no position."""
    fields = (None, struct.pack("!i", partition), key, data, topic.encode(), None, None, None, None, None)
    return b"".join([_NULL_FIELD if field is None else _sized(field) for field in fields])


def message_rows(rows: Sequence[bytes], first: int, partitions: Sequence[int] = ()) -> bytes:
    """The same rows, whole: with consecutive seqs from `first` on.

    `partitions`: of each row, where the table should hold a partition's rows beside each other, as groups read them.
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
    """Rows for COPY waiting (CHUNK_COLUMNS): the messages `seqs`, rising, for each of the consumers.

    `appended`: how many messages the whole append has.
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
    """A field of a row: its length, its bytes."""
    return _LENGTH.pack(len(value)) + value


def _int8_array(values: Sequence[int]) -> bytes:
    interleaved = [8] * (2 * len(values))
    interleaved[1::2] = values
    body = struct.pack("!" + "Iq" * len(values), *interleaved)
    return _LENGTH.pack(20 + len(body)) + _ARRAY_HEAD.pack(1, 0, _INT8_OID, len(values), 1) + body


def _text_array(values: Sequence[str | None]) -> bytes:
    body = b"".join([_NULL_FIELD if value is None else _sized(value.encode()) for value in values])
    return _LENGTH.pack(20 + len(body)) + _ARRAY_HEAD.pack(1, 1, _TEXT_OID, len(values), 1) + body
