"""Keys of rows, and their partitions."""

from __future__ import annotations

import zlib

import orjson
import pytest

from cdcbridge.changes.keys import key_columns, key_text, partition_of


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


@pytest.mark.parametrize(
    ("primary", "identity", "full", "key"),
    [
        (("id",), ("id",), False, ("id",)),
        (("b", "a"), ("a", "b"), False, ("b", "a")),  # in the order of the primary key
        (("id",), ("email",), False, ("email",)),  # deletes carry no id
        (("id",), ("email", "id"), False, ("id",)),
        (("id",), (), False, ("id",)),
        (("id",), (), True, ("id",)),
        ((), ("email",), False, ("email",)),
        ((), ("email",), True, None),
        ((), (), False, None),
        ((), (), True, None),
    ],
)
def test_the_columns_of_a_key(
    primary: tuple[str, ...], identity: tuple[str, ...], full: bool, key: tuple[str, ...] | None
) -> None:
    assert key_columns(primary, identity, full=full) == key


@pytest.mark.parametrize(
    ("document", "text"),
    [(b'"a"', "a"), (b" null ", None), (b'"\\u0000"', '"\\u0000"'), (b"1.0", "1.0"), (b'{"a": 1}', '{"a": 1}'), (b'"\\"', '"\\"')],
)  # fmt: skip
def test_a_json_column_is_its_text_as_postgresql_gives_it(document: bytes, text: str | None) -> None:
    assert key_text({"j": orjson.Fragment(document)}, ("j",)) == text
