"""Receipts on stdin: alone on a line, in lines of `receive`, and as jq writes both."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.cli.receipts import read_receipts
from cdcbridge.errors import UsageError

documents = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("receipt"), inner, max_size=3),
    max_leaves=8,
)


def read(text: str) -> list[str]:
    return list(read_receipts(text.encode().splitlines(keepends=True)))


@given(st.lists(st.tuples(st.text(), documents), min_size=1), st.sampled_from([None, 2]), st.booleans())
def test_the_receipt_is_found_whatever_stands_in_the_message(
    messages: list[tuple[str, object]], indent: int | None, last: bool
) -> None:
    """Also where the data has a member of that name, on one line or many, before or after it."""
    lines = []
    for receipt, data in messages:
        pair = [("receipt", receipt), ("data", data)]
        lines.append(json.dumps(dict(reversed(pair) if last else pair), indent=indent))
    assert read("\n".join(lines)) == [receipt for receipt, _ in messages]


@pytest.mark.parametrize(
    ("text", "receipts"),
    [
        ("", []),
        ("1.7\n\n  2.8  \n", ["1.7", "2.8"]),
        ('"1.7"\n"a\\"b"', ["1.7", 'a"b']),
        ('{"seq":1,"receipt":"1.7"}\n2.8\n{\n"receipt" : "3.9"\n}', ["1.7", "2.8", "3.9"]),
        ('{"data":"{","receipt":"1.7"}', ["1.7"]),
        ('{"data":{"receipt":"inner"},"receipt":"outer"}', ["outer"]),
    ],
)
def test_forms(text: str, receipts: list[str]) -> None:
    assert read(text) == receipts


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("null", "line 1: not a receipt: null"),
        ('1\n"', 'line 2: not a receipt: "'),
        ('1\n\n{"seq": 1}', 'line 3: not a line of `receive`: an object without a receipt: {"seq": 1}'),
        ('{"receipt": null}', "an object without a receipt"),
        ('{"receipt": ["x"]}', "an object without a receipt"),
        ('{"receipt": "\\ud800"}', "a receipt that is not a text"),
        ('{"receipt": "x",\n', "line 1: not a line of `receive`: an object without its closing brace"),
    ],
)  # fmt: skip
def test_what_has_no_receipt_is_refused_with_its_line(text: str, error: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(text)
    assert error in str(raised.value) and str(raised.value).startswith("stdin: line ")


@given(st.binary())
def test_rubbish_is_read_or_refused(text: bytes) -> None:
    try:
        found = list(read_receipts(text.splitlines()))
    except UsageError:
        return
    assert all(orjson.dumps(receipt) for receipt in found)
