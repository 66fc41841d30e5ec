"""wal2json, message by message. tests/golden has a whole stream, tests/properties/test_decoders.py damaged ones."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.changes.events import Begin, Change, Commit, Ignored, LogicalMessage, Relation, Truncate
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.wal2json import TableShape, Wal2jsonDecoder, postgres_microseconds
from cdcbridge.errors import DecodeError

ID = frozenset({"id"})
T = TableShape(Relation("public", "t", "public.t", ("id",), ID), True, toastable=("v",), primary_key=("id",))


class Catalog:
    def __init__(self, table: TableShape) -> None:
        self._table = table

    def advance(self, begin: Begin) -> bool:
        return False

    def captures(self, schema: str, table: str) -> bool:
        return self._table.captured

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        return self._table


def columns(**values: tuple[int, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "typeoid": oid, "value": value} for name, (oid, value) in values.items()]


def message(action: str, **members: Any) -> bytes:
    head = {"action": action, "xid": 7, "timestamp": "2024-01-01 00:00:00.5+00", "lsn": "0/64", "nextlsn": "0/70"}
    return json.dumps({**head, "schema": "public", "table": "t", **members}, separators=(",", ":")).encode()


def decoded(*messages: bytes, table: TableShape = T, numbers_as_text: bool = False) -> list[Any]:
    return list(Wal2jsonDecoder(Types(), Catalog(table), numbers_as_text=numbers_as_text).events(messages))


def row(given: list[dict[str, Any]], *, numbers_as_text: bool = False) -> bytes:
    (found,) = decoded(message("I", columns=given), numbers_as_text=numbers_as_text)
    return orjson.dumps(found.record)


@pytest.mark.parametrize(
    ("oid", "value", "text"),
    [
        (23, 1, "1"),
        (25, "1.50", '"1.50"'),
        (16, True, "true"),
        (17, "00ff", '"\\\\x00ff"'),
        (26, 4294967295, '"4294967295"'),
        (1114, "2024-01-01 00:00:00", '"2024-01-01T00:00:00"'),
        (1184, "2024-01-01 00:00:00+00", '"2024-01-01T00:00:00+00:00"'),
        (3802, '{"a": 1.0}', '{"a": 1.0}'),
        (1007, "{1,NULL}", "[1,null]"),
        (25, None, "null"),
        (-294967296, "x", '"x"'),  # an OID above 2 ** 31, as wal2json prints it
    ],
)
def test_a_value_is_what_to_jsonb_gives(oid: int, value: Any, text: str) -> None:
    assert row(columns(a=(oid, value))).decode() == f'{{"a":{text}}}'


@given(st.decimals(allow_nan=False, allow_infinity=False, places=5).map(lambda d: f"{d:f}"))
def test_a_number_keeps_its_digits(digits: str) -> None:
    bare = message("I", columns=columns(a=(1700, "@"))).replace(b'"@"', digits.encode())
    (found,) = decoded(bare)
    assert orjson.dumps(found.record).decode() == f'{{"a":{digits}}}'
    assert row(columns(a=(1700, digits)), numbers_as_text=True).decode() == f'{{"a":{digits}}}'


def test_numbers_as_text() -> None:
    assert row(columns(a=(701, "NaN"), b=(20, "9")), numbers_as_text=True) == b'{"a":"NaN","b":9}'


@pytest.mark.parametrize(
    ("new", "identity", "old", "unchanged"),
    [
        ({"id": (23, 1), "v": (25, "a")}, {"id": (23, 1)}, None, ()),
        ({"id": (23, 1), "v": (25, "a")}, {"id": (23, 2)}, {"id": 2}, ()),
        ({"id": (23, 1)}, {"id": (23, 1)}, None, ("v",)),
        ({"id": (23, 1)}, {"id": (23, 2)}, {"id": 2}, ("v",)),
    ],
)
def test_an_update(new: Any, identity: Any, old: Any, unchanged: tuple[str, ...]) -> None:
    (found,) = decoded(message("U", columns=columns(**new), identity=columns(**identity)))
    assert (found.op, found.old, found.unchanged) == ("update", old, unchanged)


def test_a_delete_a_truncate_and_the_rest() -> None:
    found = decoded(
        message("B"), message("D", identity=columns(id=(23, 1))), message("T"),
        message("M", transactional=True, prefix="p", content="é"), message("C"),
    )  # fmt: skip
    relation = found[1].relation
    assert found == [
        Begin(100, 7, postgres_microseconds("2024-01-01 00:00:00.5+00")), Change("delete", relation, {"id": 1}),
        Truncate((relation,), 1), LogicalMessage(True, "p", "é".encode(), 100), Commit(112, 100),
    ]  # fmt: skip
    part = TableShape(T.relation, True, partition=True)
    assert decoded(message("T"), table=part) == [Truncate((), 1)], "the root's truncate counts"
    assert decoded(message("I", columns=[]), table=TableShape(T.relation, False)) == [Ignored()]


def test_the_key_is_the_one_that_the_row_had() -> None:
    given = columns(id=(23, 1), v=(25, "a"))
    (found,) = decoded(message("I", columns=given, pk=[{"name": "v", "type": "text"}]))
    assert found.relation.key == ("v",) and found.relation.topic == "public.t"
    before, after = decoded(*[message("I", columns=given, pk=[{"name": "v", "type": "text"}])] * 2)
    assert before.relation is after.relation, "one version of a table is one relation"


@pytest.mark.parametrize(
    ("stamp", "microseconds"),
    [("2000-01-01 00:00:00+00", 0), ("2000-01-01 00:00:00.000001+00", 1), ("1999-12-31 23:59:59+00", -1_000_000),
     ("2000-01-01 02:00:00+02", 0)],
)  # fmt: skip
def test_times_count_from_2000(stamp: str, microseconds: int) -> None:
    assert postgres_microseconds(stamp) == microseconds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b'{"action":"I"', "not JSON"),
        (b'{"action":"Z"}', "not a message of format 2: KeyError"),
        (b"[]", "not a message of format 2"),
        (message("B").replace(b"0/64", b"64"), "not an LSN"),
        (message("I", columns=[{"name": "id"}]), "not a message of format 2"),
    ],
)
def test_what_is_no_message_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        decoded(text)


def test_the_place_of_an_error_is_that_in_the_message() -> None:
    """Not in the text with quotes put around its numbers."""
    text = message("I", columns=columns(a=(1700, 1.5), b=(1700, 2.5)))[:-1] + b"!"
    with pytest.raises(DecodeError) as raised:
        decoded(text)
    assert raised.value.offset == len(text) - 1
