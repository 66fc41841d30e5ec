"""Why a filter failed on a row, in words. test_filter_words.py and test_filter_numbers.py have whole filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.routing.filter_failures import Failed, Reason, failing_node, failure, operation_reason
from cdcbridge.routing.filter_tree import Node, tree_of
from cdcbridge.routing.filters import placed_tokens, tokens_of


def parsed(source: str) -> Node:
    tree = tree_of(placed_tokens(source))
    assert tree is not None
    return tree


class Values:
    """Values of the parts of an expression, by their texts. What is not there fails."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source, self.values = source, values

    def __call__(self, node: Node) -> Any:
        text = node.text(self.source)
        if text not in self.values:
            raise Failed(text)
        return self.values[text]


@pytest.mark.parametrize(
    ("source", "values", "expected"),
    [
        ("a + 1 > 2", {"a": "x", "1": 1, "2": 2}, "a + 1"),
        ("a.b.c", {"a": {}}, "a.b"),
        ("a && b + 1", {"a": True, "b": 1, "1": 1}, "b + 1"),
        ("c ? a.x : b.y", {"c": True, "a": 1, "b": 1}, "a.x"),
        ("c ? a.x : b.y", {"c": False, "a": 1, "b": 1}, "b.y"),
        ("c ? a : b", {"a": 1, "b": 1}, "c"),
        ("a.map(x, x.y)", {"a": [1]}, "a.map(x, x.y)"),  # x has a value only inside
        ("has(a.b)", {}, "has(a.b)"),
    ],
)
def test_the_innermost_part_that_fails(source: str, values: dict[str, Any], expected: str) -> None:
    assert failing_node(parsed(source), Values(source, values)).text(source) == expected


@pytest.mark.parametrize(
    ("source", "a", "b", "said", "of_types"),
    [
        ("a + b", 1, "x", "a + b: CEL has no + for an integer and a text. Write string(a)", True),
        ("a - b", "x", 1.5, "a - b: CEL has no - for a text and a number with decimals. Write double(a)", True),
        ("a * b", None, 1, "a * b: CEL has no * for null and an integer. Write a != null && …", True),
        ("a  <  b", True, [1], "a < b: a boolean cannot be compared with a list", True),
        ("a > b", {}, 1, "a > b: an object cannot be compared with an integer", True),
        ("a / b", 1, 0, "a / b: division by zero", False),
        ("a % b", 1, 0, "a % b: division by zero", False),
        ("a * b", 1 << 62, 4, "a * b: the result does not fit into 64 bits. Write double(…)", False),
        ("a && b", True, "x", "a && b: && needs true or false, and not a text", True),
        ("-a", "x", None, "-a: CEL has no - for a text", True),
        ("!a", 1, None, "!a: ! needs true or false, and not an integer", True),
        ("a ? b : b", 1, 2, "a ? b : b: ? needs true or false, and not an integer", True),
    ],
)
def test_what_is_wrong_with_an_operation(source: str, a: Any, b: Any, said: str, of_types: bool) -> None:
    assert operation_reason(parsed(source), source, Values(source, {"a": a, "b": b})) == Reason(said, of_types)


@pytest.mark.parametrize("source", ["a.b", "f(a)", "[a]", "a == b", "a && b", "a in b", "c + a"])
def test_of_other_parts_nothing_is_said(source: str) -> None:
    assert operation_reason(parsed(source), source, Values(source, {"a": True, "b": False})) is None


SOURCE = "record.a > 1 && old['b'].c == record.a && x.record.d"
ROW = {"record": {"a": None, "d": 1}, "old": {"b": "t" * 70}}


@pytest.mark.parametrize(
    ("message", "field", "said", "of_types"),
    [
        ("No such overload", None, "No such overload: values of these types cannot be compared or read so", True),
        ("Unexpected type: got 'string', want 'int|uint' …", None, "a list was read by a name, like an object", True),
        ("Undefined variable or function: 'f'", None, "Undefined variable or function: 'f', of a value of this type", True),
        ("Function 'times__' error: x", None, "CEL has no * for these values", True),
        ("invalid digit\n found.", None, "invalid digit found", False),
        ("whatever", "c", "no such field: c", True),
    ],
)  # fmt: skip
def test_a_reason_and_the_values_that_were_read(message: str, field: str | None, said: str, of_types: bool) -> None:
    values = f'(record.a is null, old.b is the text "{"t" * 59}…)'
    assert failure(message, tokens_of(SOURCE), ROW, field, None) == Reason(f"{said} {values}", of_types)


def test_a_column_that_the_row_does_not_have_needs_no_values() -> None:
    assert failure("x", tokens_of("record.a + record.b"), {"record": {"a": 1}}, "b", None) == Reason(
        "no such field: b", True
    )
    known = Reason("a + 1: better words", False)
    assert failure("No such overload", tokens_of("1 + 1"), {}, None, known) == known


@given(st.text(), st.none() | st.text(), st.dictionaries(st.text(), st.text()))
def test_it_never_raises(message: str, field: str | None, row: dict[str, str]) -> None:
    assert failure(message, tokens_of(SOURCE), {"record": row, "old": None}, field, None).text is not None
