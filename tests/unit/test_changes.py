"""Messages of the log are cut into their parts, without a parser in most cases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.mirrors.changes import MirrorRow, columns_of, effective_time, take_apart

NAMES = ["id", "old", "unchanged", "record", "op", '},"old":', ',"unchanged":[]}', "null"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4)


def row(document: dict[str, Any], **fields: Any) -> MirrorRow:
    return MirrorRow(1, "public.t", orjson.dumps(document).decode(), "1", None, 0x16B374D848, 3, **fields)


@given(st.sampled_from(["insert", "update", "read"]), ROWS, st.none() | ROWS, st.lists(st.sampled_from(NAMES)))
def test_the_parts_of_a_row_are_those_that_were_written(
    op: str, record: dict[str, Any], old: dict[str, Any] | None, unchanged: list[str]
) -> None:
    found = take_apart(row({"op": op, "record": record, "old": old, "unchanged": unchanged}))
    assert found.op == op
    assert found.record == orjson.dumps(record).decode()
    assert found.old == (None if old is None else orjson.dumps(old).decode())
    assert found.unchanged == tuple(unchanged)


@given(ROWS, ROWS, ROWS)
def test_an_annotation_changes_nothing(record: dict[str, Any], old: dict[str, Any], more: dict[str, Any]) -> None:
    found = take_apart(row({"op": "update", "record": record, "old": old, "unchanged": [], "annotation": more}))
    assert (found.record, found.old) == (orjson.dumps(record).decode(), orjson.dumps(old).decode())


@given(ROWS)
def test_a_delete_has_an_old_row_alone(record: dict[str, Any]) -> None:
    found = take_apart(row({"op": "delete", "record": record, "old": None, "unchanged": []}))
    assert (found.record, found.old) == (None, orjson.dumps(record).decode())


def test_a_truncate_has_no_row() -> None:
    found = take_apart(row({"op": "truncate", "record": None, "old": None, "unchanged": []}))
    assert (found.op, found.record, found.old) == ("truncate", None, None)


@pytest.mark.parametrize(("op", "ordinal", "own"), [("read", 4, True), ("insert", 4, False), ("gap", -1, True)])
def test_a_row_of_a_backfill_is_no_change_of_the_transaction_before_it(op: str, ordinal: int, own: bool) -> None:
    one = row({"op": op, "record": {}, "old": None, "unchanged": []})._replace(ordinal=ordinal)
    assert one.is_own is own


def test_a_position_is_for_people() -> None:
    assert (
        take_apart(row({"op": "read", "record": {"id": 1}, "old": None, "unchanged": []})).position == "16/B374D848#3"
    )


@pytest.mark.parametrize("text", ['{"a":1,"b":{"c":2}}', '{"a":1e400,"b":null}'])
def test_columns_are_named_in_their_order(text: str) -> None:
    assert columns_of(text) == ("a", "b")


def test_a_commit_time_is_in_microseconds() -> None:
    at = datetime(2000, 1, 2, 0, 0, 1, 5, tzinfo=UTC)
    assert effective_time(row({"op": "read", "record": {}, "old": None, "unchanged": []}, commit_time=at)) == (
        86_401_000_005
    )
    assert effective_time(row({"op": "read", "record": {}, "old": None, "unchanged": []})) == 0
