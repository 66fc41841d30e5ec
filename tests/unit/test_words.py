"""Values and names as people read them."""

from __future__ import annotations

import datetime as dt

import pytest

from cdcbridge.changes.position import START, Position
from cdcbridge.words import as_given, as_text, did_you_mean, one_line, one_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"), (False, "no"), (None, "-"), (3, "3"), (1.0, "1"), (0.25, "0.25"), ("a b", "a b"), ("", ""),
        ((), "-"), (("billing",), "billing"), (["a", "b"], "a, b"), ([None, True, ("x",)], "-, yes, [x]"), ({}, "-"),
        ({"exclude": ["a", "b"], "of": None}, "exclude: [a, b], of: -"), ([{"a": 1}], "{a: 1}"),
        (Position(0x16B374D848, 3), "16/B374D848#3"), (Position(5, -1), "0/5"), (START, "0/0"),
        (dt.datetime(2026, 5, 1, 12, 0, 1, 5, dt.UTC), "2026-05-01 12:00:01 UTC"),
    ],
)  # fmt: skip
def test_a_value_for_people(value: object, text: str) -> None:
    assert as_text(value) == text


def test_words() -> None:
    assert one_of(["a"]) == "a" and one_of(["a", "b"]) == "a or b" and one_of(["a", "b", "c"]) == "a, b or c"
    assert did_you_mean("modde", ["mode", "tables"]) == "; did you mean mode?"
    assert did_you_mean("zzz", ["mode"]) == "" and did_you_mean("mode", ["mode"]) == ""
    assert [as_given(v) for v in (None, True, "x", 5, ["a"], {"k": None})] == [
        "nothing", "true", "'x'", "5", "['a']", "{k: nothing}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [("a b é☃", "a b é☃"), ("a\nb", "a\\nb"), ("\x1b[31mred", "\\u001b[31mred"), ("\x00", "\\u0000"), ("", "")],
)
def test_one_line_has_nothing_that_a_terminal_would_obey(text: str, line: str) -> None:
    assert one_line(text) == line and one_line(text).isprintable()
