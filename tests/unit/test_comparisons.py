"""The comparisons of a filter with literals that can be judged without a row."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.routing.comparisons import comparisons


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("record.a == 1", [("record.a", "==", [1])]),
        ("1 < record.a", [("record.a", ">", [1])]),
        ("1 >= old['b c']", [("old.b c", "<=", [1])]),
        ("'x' == op", [("op", "==", ["x"])]),
        ("record.a == -1.5", [("record.a", "==", [-1.5])]),
        ("record.a != null && meta.xid == 7u", [("record.a", "!=", [None]), ("meta.xid", "==", [7])]),
        ("op in ['insert', \"update\"]", [("op", "in", ["insert", "update"])]),
        ("record.a in []", []),
        ("record.ok == true || key == 'k'", [("record.ok", "==", [True]), ("key", "==", ["k"])]),
        ("record.a > 1 ? record.b == 2 : record.c == 3", [("record.a", ">", [1]), ("record.b", "==", [2]), ("record.c", "==", [3])]),
        ("has(record.a) && record['a'] == 'it\\'s'", [("record.a", "==", ["it's"])]),
        ("record.a == 1 // record.b == 2", [("record.a", "==", [1])]),
    ],
)  # fmt: skip
def test_found(source: str, found: list[tuple[str, str, list[Any]]]) -> None:
    said = [(one.subject, one.operator, [literal.value for literal in one.literals]) for one in comparisons(source)]
    assert said == found


@pytest.mark.parametrize(
    "source",
    [
        "record.a + 1 == 2",
        "2 == record.a * 2",
        "record.a == 1 + 1",
        "record.a.b == 1",
        "x.record.a == 1",
        "record.a == record.b",
        "1 == 1",
        "record.a.startsWith('x') == true",
        "[1].exists(n, n == 1)",
        "record.a in [record.b]",
        "record.a in [1 + 1]",
        "record.a in record.b",
        "- record.a == 1",
        "",
    ],
)
def test_what_cannot_be_judged_is_passed_over(source: str) -> None:
    assert list(comparisons(source)) == []


def test_a_literal_keeps_how_it_is_written() -> None:
    (one,) = comparisons('record.a in ["x", 0x10, 1e3]')
    assert [literal.text for literal in one.literals] == ['"x"', "0x10", "1e3"]
    assert [literal.value for literal in one.literals] == ["x", 16, 1000.0]
    assert (one.variable, one.member) == ("record", "a")
