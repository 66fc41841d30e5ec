"""Texts of the dashboard: JSON that keeps its digits, the changes of a row, words."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.web.pages.wording import changes, indented, plural, sentence

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values, st.booleans())
def test_indented_json_is_the_same_json(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert indented(text) == json.dumps(value, ensure_ascii=ascii_only, indent=2)


def test_indented_json_keeps_each_digit_and_has_an_end() -> None:
    assert indented('{"n": 12345678901234567890.10}') == '{\n  "n": 12345678901234567890.10\n}'
    assert indented('"' + "x" * 30_000 + '"').endswith("… (30,002 characters)")


def test_changes_between_versions() -> None:
    found = changes('{"id": 1, "a": "x", "gone": 1.10}', '{"id": 1, "a": "y", "new": null}')
    assert [(one.column, one.before, one.after) for one in found] == [
        ("a", '"x"', '"y"'),
        ("gone", "1.10", None),
        ("new", None, "null"),
    ]
    assert changes(None, None) == [] and changes("[1]", '"text"') == []
    assert [one.after for one in changes(None, '{"id": 1}')] == ["1"]


def test_words() -> None:
    assert plural(1, "delivery") == "1 delivery" and plural(2, "delivery") == "2 deliveries"
    assert plural(1200, "message") == "1,200 messages"
    assert sentence("nobody: [Errno 111]") == "Nobody: [Errno 111]" and sentence("") == ""
