"""Explain why a filter failed on a row: the part that failed, its values, and the text to write instead.

The library reports "No such overload" and names neither the operation nor the values. The module is pure. It must never
raise: where it has no better words, it returns the first line of the library's message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from cdcbridge.routing.filter_tree import Node

_ROW: Final = frozenset({"record", "old"})
_LONGEST: Final = 60  # characters of a value in a reason
_ORDERED: Final = frozenset({"<", "<=", ">", ">="})
_ARITHMETIC: Final = frozenset("+-*/%")
_NUMBERS: Final = frozenset({"an integer", "a number with decimals"})
_SIGNS: Final = {"plus": "+", "minus": "-", "times": "*", "over": "/", "modulo": "%"}
_ONE_ARITHMETIC: Final = re.compile(r"Function '(plus|minus|times|over|modulo)__' error")
_WORDS: Final = {
    bool: "a boolean",
    str: "a text",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
    type(None): "null",
}
_OF_TYPES: Final = (
    "No such overload",
    "Unsupported operation",
    "no such field",
    "Undefined variable or function",
    "Unexpected type",
    "Value of type",
)


class Reason(NamedTuple):
    """Why a filter failed.

    Attributes:
        text: The reason, for people.
        of_types: Whether it fails on each row with values of these types, unlike int('x') or a division by zero.
    """

    text: str
    of_types: bool


class Failed(Exception):
    """The exception that `evaluate()` raises.

    Its text is the library's message.
    """


Evaluate = Callable[[Node], Any]


def failure(
    message: str,
    tokens: Sequence[str],
    environment: Mapping[str, Any],
    field: str | None,
    operation: Reason | None,
) -> Reason:
    """Return why an expression failed on a row: the library's reason in words, and the values that the expression read.

    Args:
        message: The library's message.
        tokens: The tokens of the expression.
        environment: The value of each variable.
        field: The name that a map did not have. None: the reason is another one.
        operation: The result of `operation_reason()`.
    """
    values = ", ".join(_values(tokens, environment))
    of_types = field is not None or message.startswith(_OF_TYPES)
    if field is not None:
        said = f"no such field: {field}"
        if _is_column(tokens, field):
            return Reason(said, True)
    elif operation is not None:
        said, of_types = operation
    elif message.startswith("No such overload"):
        said = "No such overload: values of these types cannot be compared or read so"
    elif message.startswith("Unexpected type: got 'string', want 'int|uint'"):
        said = "a list was read by a name, like an object"
    elif message.startswith("Undefined variable or function"):
        said = f"{message}, of a value of this type"
    elif found := _ONE_ARITHMETIC.match(message):
        said, of_types = f"CEL has no {_SIGNS[found[1]]} for these values", True
    else:
        said = " ".join(message.split()).rstrip(".")
    return Reason(f"{said} ({values})" if values else said, of_types)


def failing_node(tree: Node, evaluate: Evaluate) -> Node:
    """Return the innermost part that fails, in a tree that fails as a whole.

    `evaluate` returns the value of a part, or raises Failed.
    """
    for part in _evaluated(tree, evaluate):
        try:
            evaluate(part)
        except Failed:
            return failing_node(part, evaluate)
    return tree


def _evaluated(node: Node, evaluate: Evaluate) -> Iterator[Node]:
    """Yield the parts that CEL evaluates by themselves.

    The body of a macro is left out, because it has a variable of its own. Only one branch of a ternary is included: the
    one that its condition selects.
    """
    if node.kind == "macro":
        yield node.parts[0]
    elif node.kind == "ternary":
        condition, yes, no = node.parts
        yield condition
        yield yes if evaluate(condition) is True else no
    elif not (node.kind == "call" and node.word == "has"):
        yield from node.parts


def operation_reason(node: Node, source: str, evaluate: Evaluate) -> Reason | None:
    """Return the fault of an operation such as `record.a + 1`.

    Returns:
        The fault. None: the part is no operation, its operands fail themselves, or nothing is wrong with it.
    """
    if node.kind not in ("binary", "unary", "ternary"):
        return None
    text = " ".join(node.text(source).split())
    try:
        kinds = [_kind(evaluate(part)) for part in node.parts[: 1 if node.kind == "ternary" else 2]]
        zero = node.word in ("/", "%") and evaluate(node.parts[1]) == 0
    except Failed:
        return None
    if node.word in ("&&", "||", "!", "?"):
        wrong = next((kind for kind in kinds if kind != "a boolean"), None)
        return Reason(f"{text}: {node.word} needs true or false, and not {wrong}", True) if wrong else None
    if node.word in _ORDERED:
        return Reason(f"{text}: {kinds[0]} cannot be compared with {kinds[1]}{_instead(node, source, kinds)}", True)
    if node.word not in _ARITHMETIC:
        return None
    if _NUMBERS.issuperset(kinds):
        return Reason(
            f"{text}: division by zero" if zero else f"{text}: the result does not fit into 64 bits. Write double(…)",
            False,
        )
    if node.kind == "unary":
        return Reason(f"{text}: CEL has no - for {kinds[0]}", True)
    return Reason(f"{text}: CEL has no {node.word} for {kinds[0]} and {kinds[1]}{_instead(node, source, kinds)}", True)


def _instead(node: Node, source: str, kinds: Sequence[str]) -> str:
    """Return what to write instead of the operand that does not fit, or an empty text."""
    for part, kind, other in zip(node.parts, kinds, reversed(kinds), strict=True):
        operand = part.text(source)
        if kind == "null":
            return f". Write {operand} != null && …"
        if kind in _NUMBERS and other == "a text" and node.word == "+":
            return f". Write string({operand})"
        if kind == "a text" and other in _NUMBERS and node.word != "+":
            return f". Write double({operand})"
    return ""


def _kind(value: Any) -> str:
    if type(value) is float:
        return "a number with decimals"
    return _WORDS.get(type(value), "an integer" if type(value) is int else f"a {type(value).__name__}")


def _is_column(tokens: Sequence[str], field: str) -> bool:
    """Return whether the expression uses the name as a column of the row."""
    return any(tokens[at - 1] in (".", "[") and tokens[at - 2] in _ROW for at, token in enumerate(tokens)
               if at >= 2 and token.strip("'\"") == field)  # fmt: skip


def _values(tokens: Sequence[str], environment: Mapping[str, Any]) -> Iterator[str]:
    """Yield texts such as `record.a is null`, one for each column that the expression reads."""
    seen: set[str] = set()
    for at, token in enumerate(tokens[:-2]):
        if token not in _ROW or (at and tokens[at - 1] == ".") or tokens[at + 1] not in (".", "["):
            continue
        name = tokens[at + 2].strip("'\"")
        row = environment.get(token)
        place = f"{token}.{name}"
        if place in seen or not isinstance(row, Mapping) or name not in row:
            continue
        seen.add(place)
        yield f"{place} is {_described(row[name])}"


def _described(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value[: _LONGEST + 1] if isinstance(value, str) else value, ensure_ascii=False, default=str)
    kind = {bool: "the boolean", str: "the text", list: "the list", dict: "the object"}.get(type(value), "the number")
    return f"{kind} {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"
