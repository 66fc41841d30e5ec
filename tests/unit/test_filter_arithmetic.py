"""One arithmetic for both kinds of numbers. test_filter_numbers.py has whole filters."""

from __future__ import annotations

import datetime as dt
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.routing.filter_arithmetic import is_mixable, with_one_arithmetic
from cdcbridge.routing.filter_tree import tree_of
from cdcbridge.routing.filters import placed_tokens

NAMES = {"+": "plus__", "-": "minus__", "*": "times__", "/": "over__", "%": "modulo__"}
HOUR, NEW_YEAR = dt.timedelta(hours=1), dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
integers, numbers = st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1) | st.floats()


def written(source: str) -> tuple[str, dict[str, Any]]:
    return with_one_arithmetic(source, tree_of(placed_tokens(source)))


def of(operator: str, a: Any, b: Any) -> Any:
    """The result, or None where it fails."""
    _, functions = written(f"a {operator} b")
    result = functions[NAMES[operator]](a, b)
    return None if type(result) is object else result


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("record.a * 1.5 > 4", "times__(record.a, 1.5) > 4"),
        ("(a + b) * c", "times__(plus__(a, b), c)"),
        ("a - b - c", "minus__(minus__(a, b), c)"),
        ("f(a % 2)[b / 3] == -c", "f(modulo__(a, 2))[over__(b, 3)] == -c"),
        ("x.exists(n, n + 1 > 2)", "x.exists(n, plus__(n, 1) > 2)"),
        ("a + 'x' == b + [1]", "a + 'x' == b + [1]"),
        ("timestamp(a) - timestamp(b) > duration('1h')", "timestamp(a) - timestamp(b) > duration('1h')"),
        ("a > 1 && b", "a > 1 && b"),
        ("a  +  b // c + d", "plus__(a, b) // c + d"),
    ],
)
def test_operations_that_may_mix_numbers_become_calls(source: str, expected: str) -> None:
    text, functions = written(source)
    assert text == expected and {name for name in NAMES.values() if f"{name}(" in text} == set(functions)


def test_without_a_tree_the_source_stays() -> None:
    assert with_one_arithmetic("a + ", None) == ("a + ", {})
    tree = tree_of(placed_tokens("a == b"))
    assert tree is not None and not is_mixable(tree)


@given(integers, integers)
def test_integers_are_exact_or_fail_beyond_64_bits(a: int, b: int) -> None:
    for operator, exact in (("+", a + b), ("-", a - b), ("*", a * b)):
        assert of(operator, a, b) == (exact if -(2**63) <= exact < 2**64 else None)
    quotient, rest = of("/", a, b), of("%", a, b)
    if b == 0:
        assert quotient is None and rest is None
    elif quotient is not None:
        assert quotient * b + rest == a and abs(rest) < abs(b) and (rest == 0 or (rest < 0) == (a < 0))


@given(st.integers(-(2**53), 2**53), st.floats(allow_nan=False))
def test_a_number_with_decimals_makes_it_one_of_doubles(a: int, b: float) -> None:
    assert of("+", a, b) == of("+", float(a), b) and type(of("*", a, b)) is float
    assert of("-", b, a) == b - float(a)


@given(numbers, numbers, st.sampled_from(list(NAMES)))
def test_no_operation_of_numbers_raises(a: float, b: float, operator: str) -> None:
    result = of(operator, a, b)
    assert result is None or type(result) is (int if type(a) is type(b) is int else float)


@pytest.mark.parametrize(
    ("a", "b", "result"),
    [(1.0, 0, math.inf), (-1.0, 0, -math.inf), (1, 0.0, math.inf), (1.0, -0.0, -math.inf), (7.5, 2, 3.75), (-3, 2, -1)],
)
def test_division(a: float, b: float, result: float) -> None:
    assert of("/", a, b) == result
    assert math.isnan(of("/", 0.0, 0))


@pytest.mark.parametrize(
    ("a", "operator", "b", "result"),
    [
        ("a", "+", "b", "ab"), ([1], "+", [2], [1, 2]), (b"a", "+", b"b", b"ab"), (NEW_YEAR, "+", HOUR, NEW_YEAR + HOUR),
        (NEW_YEAR + HOUR, "-", NEW_YEAR, HOUR), (HOUR, "-", HOUR, dt.timedelta()), ("a", "+", 1, None), (None, "+", 1, None),
        (True, "+", 1, None), (HOUR, "-", NEW_YEAR, None), ("a", "*", 2, None), ([1], "*", 2, None), ("a", "%", 2, None),
        (NEW_YEAR, "+", dt.timedelta.max, None), (1, "/", "1", None), (math.inf, "%", 2, None),
    ],
)  # fmt: skip
def test_other_values(a: Any, operator: str, b: Any, result: Any) -> None:
    assert of(operator, a, b) == result
