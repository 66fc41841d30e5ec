"""The identity of a message, and the operation in its text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.sinks.message import Origin, in_one_line, op_of
from tests.harness.shaping import INSERT, ORIGIN


@pytest.mark.parametrize(
    ("op", "lsn", "identity"),
    [
        ("insert", "0/16B3748", "7412/1/0/16B3748/2"),
        ("read", "0/16B3748", "7412/seq/5"),  # a row that a backfill read
        ("message", None, "7412/seq/5"),
    ],
)
def test_the_identity_follows_from_the_position(op: str, lsn: str | None, identity: str) -> None:
    assert ORIGIN.identity(5, op, lsn, 2) == identity


def test_the_identity_keeps_the_timeline_of_its_change() -> None:
    promoted = Origin("7412", "shop", "slot", [0, 100], [1, 2])
    found = [promoted.identity(seq, "insert", "0/1", 0) for seq in (5, 99, 100, 101)]
    assert found == ["7412/1/0/1/0", "7412/1/0/1/0", "7412/2/0/1/0", "7412/2/0/1/0"]


@pytest.mark.parametrize(
    ("data", "op"),
    [(INSERT, "insert"), ('{\n  "op" : "message", "record": 1}', "message"), ('{"a":1}', "message")],
)
def test_the_operation_is_found_in_the_text(data: str, op: str) -> None:
    assert op_of(data) == op


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_document_in_one_line_is_the_same_document(value: Any) -> None:
    text = json.dumps(value, indent=2)
    assert "\n" not in in_one_line(text) and json.loads(in_one_line(text)) == value
