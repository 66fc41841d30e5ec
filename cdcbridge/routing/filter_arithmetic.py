"""Give filters one arithmetic for all numbers: `record.price * 1.5`, whether the price arrives as 3, 3.0 or 1.5.

CEL has no operation for an integer and a number with decimals. A numeric column holds both, for example 3 and 1.5, and
only the text of the JSON number differs. Therefore an operation of two integers is exact, as in CEL, and any other
operation of two numbers uses doubles. The module is pure, and must never change a result that CEL gives.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from typing import Any, Final

from cdcbridge.routing.filter_tree import Node

# The library cannot hold it, so the expression fails. If an operation raised an exception, that would be logged, too.
_FAILED: Final = object()
_NUMBERS: Final = frozenset({int, float})
_LEAST, _MOST = -(2**63), 2**64 - 1
_TIME, _SPAN = dt.datetime, dt.timedelta
_SUMS: Final = frozenset(
    {(str, str), (bytes, bytes), (list, list), (_TIME, _SPAN), (_SPAN, _TIME), (_SPAN, _SPAN)}
)  # fmt: skip
_DIFFERENCES: Final = frozenset({(_TIME, _SPAN), (_TIME, _TIME), (_SPAN, _SPAN)})
_NO_NUMBERS: Final = frozenset({"timestamp", "duration", "string", "bytes", "type"})  # functions that return no number
_NAMES: Final = {"+": "plus__", "-": "minus__", "*": "times__", "/": "over__", "%": "modulo__"}


def with_one_arithmetic(source: str, tree: Node | None) -> tuple[str, dict[str, Callable[[Any, Any], Any]]]:
    """Write operations as calls: `record.a * 1.5` becomes `times__(record.a, 1.5)`.

    Args:
        source: The expression.
        tree: Its tree. None: the form of the expression is not known.

    Returns:
        The new source, and the functions that it calls, by name. If no operation can mix both kinds of numbers, the
        source is unchanged and there are no functions.
    """
    used: set[str] = set()
    written = source if tree is None else _before_and_after(source, tree, _written(source, tree, used))
    return written, {_NAMES[operator]: _FUNCTIONS[operator] for operator in used}


def is_mixable(node: Node) -> bool:
    """Return whether the node is an operation that can have an integer and a number with decimals as its operands."""
    return node.kind == "binary" and node.word in _NAMES and not any(_is_no_number(part) for part in node.parts)


def _is_no_number(node: Node) -> bool:
    return node.kind in ("string", "list", "map") or (node.kind == "call" and node.word in _NO_NUMBERS)


def _before_and_after(source: str, node: Node, text: str) -> str:
    return source[: node.start] + text + source[node.end :]


def _written(source: str, node: Node, used: set[str]) -> str:
    if is_mixable(node):
        used.add(node.word)
        left, right = (_written(source, part, used) for part in node.parts)
        return f"{_NAMES[node.word]}({left}, {right})"
    pieces, at = [], node.start
    for part in node.parts:
        pieces += [source[at : part.start], _written(source, part, used)]
        at = part.end
    return "".join(pieces) + source[at : node.end]


def _whole(number: int) -> Any:
    """Return the integer if CEL can hold it in 64 bits, else a failure."""
    return number if _LEAST <= number <= _MOST else _FAILED


def _plus(a: Any, b: Any) -> Any:
    if type(a) in _NUMBERS and type(b) in _NUMBERS:
        total = a + b
        return total if type(total) is float else _whole(total)
    return _of_times(a, b, _SUMS, lambda: a + b)


def _minus(a: Any, b: Any) -> Any:
    if type(a) in _NUMBERS and type(b) in _NUMBERS:
        difference = a - b
        return difference if type(difference) is float else _whole(difference)
    return _of_times(a, b, _DIFFERENCES, lambda: a - b)


def _times(a: Any, b: Any) -> Any:
    if type(a) in _NUMBERS and type(b) in _NUMBERS:
        product = a * b
        return product if type(product) is float else _whole(product)
    return _FAILED


def _over(a: Any, b: Any) -> Any:
    """Divide.

    Two integers give an integer, cut off towards zero, as in CEL and in SQL: 3 / 2 is 1.
    """
    if type(a) not in _NUMBERS or type(b) not in _NUMBERS:
        return _FAILED
    if type(a) is int and type(b) is int:
        if b == 0:
            return _FAILED
        quotient = abs(a) // abs(b)
        return _whole(quotient if (a < 0) == (b < 0) else -quotient)
    if b:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)


def _modulo(a: Any, b: Any) -> Any:
    """Return the remainder of a division, with the sign of the number that is divided: -3 % 2 is -1."""
    if type(a) not in _NUMBERS or type(b) not in _NUMBERS or b == 0:
        return _FAILED
    if type(a) is int and type(b) is int:
        return abs(a) % abs(b) * (-1 if a < 0 else 1)
    return math.fmod(a, b) if math.isfinite(a) else _FAILED


def _of_times(a: Any, b: Any, known: frozenset[tuple[type, type]], result: Callable[[], Any]) -> Any:
    """Add or subtract texts, lists, times and durations, which a column can hold, too."""
    try:
        return result() if (type(a), type(b)) in known else _FAILED
    except OverflowError:
        return _FAILED


_FUNCTIONS: Final = {"+": _plus, "-": _minus, "*": _times, "/": _over, "%": _modulo}
