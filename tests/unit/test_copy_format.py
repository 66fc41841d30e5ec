"""Rows for COPY, and rows as COPY gave them."""

from __future__ import annotations

import struct

import pytest

from cdcbridge.changes.keys import partition_of
from cdcbridge.routing.copy_format import (
    CHUNK_SIZE,
    MESSAGE_COLUMNS,
    chunk_rows,
    encode_data,
    for_reader,
    message_row,
    message_rows,
    published_row,
    read_fields,
    read_part,
    read_row,
    read_rows,
    shared_part,
    with_old_key,
)


def test_fan_out_rows_are_small_for_small_appends_and_shared_for_large_ones() -> None:
    def rows(count: int) -> int:
        data, position, found = chunk_rows((1,), range(1, count + 1), None, count), 0, 0
        while position < len(data):
            position += 2 + 4 + 4 + 4 + 8
            for _ in range(2):
                size = int.from_bytes(data[position : position + 4], signed=True)
                position += 4 + max(size, 0)
            found += 1
        return found

    assert rows(100) == 100
    assert rows(1000) == 1000 / CHUNK_SIZE


def test_rows_of_a_partition_stand_beside_each_other_where_groups_read_and_keep_their_seqs() -> None:
    rows = [b"<%d>" % n for n in range(5)]
    plain = message_rows(rows, 100)
    grouped = message_rows(rows, 100, [1, 0, 1, 0, 2])
    pieces = {n: plain[plain.index(rows[n]) - 14 : plain.index(rows[n]) + 3] for n in range(5)}
    assert grouped == b"".join(pieces[n] for n in (1, 3, 0, 2, 4))


def fields(row: bytes) -> dict[str, bytes | None]:
    """The columns of a row whose seq is left out, read as the server reads them."""
    found: list[bytes | None] = []
    position = 0
    while position < len(row):
        (size,) = struct.unpack_from("!i", row, position)
        position += 4
        found.append(None if size < 0 else row[position : position + size])
        position += max(size, 0)
    return dict(zip(MESSAGE_COLUMNS.split(", ")[1:], found, strict=True))


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, signed=True)


SHARED = shared_part("public.t", 0x100, 7, -5)


@pytest.mark.parametrize("key", [None, b"", "é".encode()])
def test_a_row_of_the_log(key: bytes | None) -> None:
    assert fields(message_row(3, key, 9, b"{}", SHARED)) == {
        "ordinal": number(3), "partition": number(9), "key": key, "data": b"{}", "topic": b"public.t",
        "commit_lsn": number(0x100, 8), "xid": number(7, 8), "commit_time": number(-5, 8), "old_key": None, "reader": None,
    }  # fmt: skip


def test_an_old_key_and_a_reader_take_their_places() -> None:
    assert fields(message_row(0, None, 0, b"", with_old_key(SHARED, "é")))["old_key"] == "é".encode()
    assert fields(message_row(0, None, 0, b"", for_reader(SHARED, 4)))["reader"] == number(4)
    both = fields(message_row(0, None, 0, b"", for_reader(with_old_key(SHARED, "k"), 4)))
    assert (both["old_key"], both["reader"], both["xid"]) == (b"k", number(4), number(7, 8))


@pytest.mark.parametrize("time", [None, 5])
def test_a_row_that_a_backfill_read_has_no_transaction(time: int | None) -> None:
    found = fields(message_row(0, b"k", 1, b"{}", read_part("public.t", 0x100, time, 4)))
    assert (found["xid"], found["old_key"], found["reader"]) == (None, None, number(4))
    assert (found["topic"], found["commit_lsn"]) == (b"public.t", number(0x100, 8))
    assert found["commit_time"] == (None if time is None else number(5, 8))


def test_a_published_message_has_no_position() -> None:
    found = fields(published_row("news", b"k", 2, b"{}"))
    assert {name for name, value in found.items() if value is None} == {
        "ordinal", "commit_lsn", "xid", "commit_time", "old_key", "reader",
    }  # fmt: skip
    assert (found["topic"], found["key"], found["partition"], found["data"]) == (b"news", b"k", number(2), b"{}")


def test_data_has_its_members_in_the_order_of_the_contract() -> None:
    assert (
        encode_data("update", {"a": 1}, None, ("b",))
        == b'{"op":"update","record":{"a":1},"old":null,"unchanged":["b"]}'
    )


NULL, READ = b"\xff\xff\xff\xff", read_part("public.t", 7, None, 1)


def field(value: bytes | None) -> bytes:
    return NULL if value is None else len(value).to_bytes(4) + value


def test_rows_of_a_backfill() -> None:
    given = [field(key) + field(data) for key, data in ((b"1", b"{}"), (None, b"{ }"), ("ü".encode(), b""))]
    read = read_rows(given, {"1", None}, 5, READ, 16)
    assert read.keys == [None, "ü"], "a row without a key is never stale"
    assert read.sizes == [3, 0]
    assert read.partitions == [0, partition_of("ü".encode(), 16)]
    assert read.rows == [read_row(5, 0, given[1], READ), read_row(6, read.partitions[1], given[2], READ)]
    assert read.rows[0] == (b"\0\0\0\4\0\0\0\5" + b"\0\0\0\4\0\0\0\0" + given[1] + READ)


def test_fields_of_a_row() -> None:
    start = field(b"1") + field(b"{}")
    assert read_fields(start, keyed=False, sized=False) == (start, b"1", b"{}", None, None)
    assert read_fields(start + field(b"k"), keyed=True, sized=False) == (start, b"1", b"{}", "k", None)
    row = start + NULL + field((900).to_bytes(8))
    assert read_fields(row, keyed=True, sized=True) == (start, b"1", b"{}", None, 900)
    assert read_fields(NULL + field(b"{}") + NULL, keyed=False, sized=True)[1:] == (None, b"{}", None, None)
