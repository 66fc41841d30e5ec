"""Keys of rows, and their partitions."""

from __future__ import annotations

import zlib

import orjson

from cdcbridge.changes.keys import key_text, partition_of


def test_keys_are_texts_or_compact_arrays_of_texts() -> None:
    row = {"i": 1, "t": 'a"b', "n": None, "b": True, "m": orjson.Fragment(b"12.50"), "m2": None}
    assert key_text(row, ("i",)) == "1"
    assert key_text(row, ("t",)) == 'a"b'
    assert key_text(row, ("b",)) == "true"
    assert key_text(row, ("m",)) == "12.50"
    assert key_text(row, ("i", "t", "n")) == '["1","a\\"b",null]'
    assert key_text(row, ("n",)) is key_text(row, ("n", "m2")) is key_text(row, None) is key_text(None, ("i",)) is None


def test_the_partition_is_crc32_of_the_key() -> None:
    assert zlib.crc32(b"123456789") == 0xCBF43926, "the check value of CRC-32"
    assert partition_of(b"123456789", 16) == 0xCBF43926 % 16
    assert partition_of(None, 16) == 0
