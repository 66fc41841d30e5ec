"""What applications write into the WAL: read as PostgreSQL would, or told, and never raised."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.routing.logical_messages import members, read_published

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), values), st.sampled_from([None, 0, 3]), st.booleans())
def test_members_are_the_texts_as_they_are_written(
    document: dict[str, object], indent: int | None, escape: bool
) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=escape)
    found = list(members(text))
    assert [name for name, _ in found] == list(document)
    assert [json.loads(value) for _, value in found] == list(document.values())
    assert all(value == value.strip() and value in text for _, value in found)


@pytest.mark.parametrize(
    ("content", "key", "record"),
    [
        ('{"data":1}', None, "1"),
        ('{"key":"42","data":{"a":1.10}}', "42", '{"a":1.10}'),
        ('{"key":42,"data":null}', "42", "null"),
        ('{"key":1e400,"data":[1e400]}', "1e400", "[1e400]"),
        ('{"key":12345678901234567890123,"data":0}', "12345678901234567890123", "0"),
        ('{"key":null,"data":"x"}', None, '"x"'),
        ('{\n "data" : {\n"a": 1\r\n} }', None, '{ "a": 1  }'),
        ('{"data":1,"data":2}', None, "2"),
        ('{"key":"\\u00e9","data":"é"}', "é", '"é"'),
    ],
)
def test_a_message(content: str, key: str | None, record: str) -> None:
    message = read_published(content.encode())
    assert (message.key, message.record.decode(), message.malformed, message.deliver_at) == (key, record, None, None)
    assert message.data.decode() == f'{{"op":"message","record":{record},"old":null,"unchanged":[]}}'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"data":NaN}', "not JSON"),
        (b'{"data":1} x', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "expected {"),
        (b"{}", "expected {"),
        (b'{"data":1,"topic":"t"}', "expected {"),
        (b'{"key":true,"data":1}', "the key is not a text, a number or null"),
        (b'{"key":[1],"data":1}', "the key is not a text, a number or null"),
        (b'{"key":"\\u0000","data":1}', "PostgreSQL cannot hold"),
        (b'{"data":1,"deliver_at":"soon"}', "deliver_at is not a time"),
        (b'{"data":1,"deliver_at":5}', "deliver_at is not a time"),
        (b'{"data":1,"deliver_at":"2026-05-01T10:00:00"}', "deliver_at is not a time"),
    ],
)
def test_what_is_malformed_keeps_its_content_and_says_why(content: bytes, why: str) -> None:
    message = read_published(content)
    assert message.malformed is not None and why in message.malformed and message.key is None
    assert json.loads(message.record) == content.decode(errors="replace") and message.record.isascii()
    assert orjson.loads(message.data)["malformed"] == message.malformed


@given(st.binary() | values.map(lambda value: json.dumps({"data": value, "key": value}).encode()))
def test_nothing_that_anybody_writes_raises(content: bytes) -> None:
    orjson.loads(read_published(content).data)


@pytest.mark.parametrize("time", ["2026-05-01T10:00:00Z", "2026-05-01 12:00:00+02:00"])
def test_a_time_has_its_zone(time: str) -> None:
    found = read_published(json.dumps({"data": 1, "deliver_at": time}).encode()).deliver_at
    assert found is not None and found.endswith(("+00:00", "+02:00"))


@pytest.mark.parametrize(
    ("data", "columns", "key"),
    [
        ('{"a":1.50,"b":"x"}', ("a",), "1.50"),
        ('{"a":1.50,"b":"x"}', ("b", "a"), '["x","1.50"]'),
        ('{"a":null}', ("a",), None),
        ('{"a":{"c":1}}', ("a",), '{"c":1}'),
        ('{"b":1}', ("a",), None),
        ("[1]", ("a",), None),
        ('"a"', ("a",), None),
    ],
)
def test_a_consumers_own_key_comes_from_the_members_of_the_data(
    data: str, columns: tuple[str, ...], key: str | None
) -> None:
    assert read_published(f'{{"key":"k","data":{data}}}'.encode()).own_key(columns) == key
