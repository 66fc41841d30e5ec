"""Values of the log are compared, and keep their digits."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cdcbridge.revert.messages import differs, read_message, same

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("one", "other", "equal", "changed"),
    [
        ("1.50", "1.5", True, True), ("1e+06", "1000000.0", True, True), ('"a"', '"\\u0061"', True, False),
        ('{"a":1}', '{"a": 1}', True, True), ('{"a":1,"b":2}', '{"b":2,"a":1}', False, True), ("null", '""', False, True),
        ("1", '"1"', False, True), ("[" * 5000 + "]" * 5000, "[]", False, True),
    ],
)  # fmt: skip
def test_values_are_compared_by_value_and_changes_by_text(one: str, other: str, equal: bool, changed: bool) -> None:
    assert same(one, other) == equal and differs(one, other, rounded=False) == changed
    assert differs(one, other, rounded=True) == (not equal)


def test_a_row_keeps_the_digits_of_its_numbers() -> None:
    data = '{"op":"update","record":{"n":1.500,"j":{"x":  9007199254740993}},"old":null,"unchanged":["b"]}'
    message = read_message(1, "public.t", "1", None, data, None, NOW)
    assert message.record == {"n": "1.500", "j": '{"x":  9007199254740993}'} and message.unchanged == ("b",)
