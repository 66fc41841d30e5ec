"""Rows as COPY gave them become rows for COPY, and their fields are read."""

from __future__ import annotations

from cdcbridge.changes.keys import partition_of
from cdcbridge.routing.copy_format import read_fields, read_part, read_row, read_rows

NULL, SHARED = b"\xff\xff\xff\xff", read_part("public.t", 7, None, 1)


def field(value: bytes | None) -> bytes:
    return NULL if value is None else len(value).to_bytes(4) + value


def test_rows_of_a_backfill() -> None:
    given = [field(key) + field(data) for key, data in ((b"1", b"{}"), (None, b"{ }"), ("ü".encode(), b""))]
    read = read_rows(given, {"1", None}, 5, SHARED, 16)
    assert read.keys == [None, "ü"], "a row without a key is never stale"
    assert read.sizes == [3, 0]
    assert read.partitions == [0, partition_of("ü".encode(), 16)]
    assert read.rows == [read_row(5, 0, given[1], SHARED), read_row(6, read.partitions[1], given[2], SHARED)]
    assert read.rows[0] == (b"\0\0\0\4\0\0\0\5" + b"\0\0\0\4\0\0\0\0" + given[1] + SHARED)


def test_fields_of_a_row() -> None:
    start = field(b"1") + field(b"{}")
    assert read_fields(start, keyed=False, sized=False) == (start, b"1", b"{}", None, None)
    assert read_fields(start + field(b"k"), keyed=True, sized=False) == (start, b"1", b"{}", "k", None)
    row = start + NULL + field((900).to_bytes(8))
    assert read_fields(row, keyed=True, sized=True) == (start, b"1", b"{}", None, 900)
    assert read_fields(NULL + field(b"{}") + NULL, keyed=False, sized=True)[1:] == (None, b"{}", None, None)
