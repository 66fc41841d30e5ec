"""Find the comparisons of a filter with literals: `record.status == 'paid'`, `op in ['insert', 'update']`.

These can be judged without a row. All others are passed over, for example `record.a + record.b > 5`. The module is pure
and never judges a comparison itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from cdcbridge.routing.filters import tokens_of

_OPERATORS: Final = frozenset({"==", "!=", "<", "<=", ">", ">="})
_MEMBERSHIP: Final = frozenset({"in"})
_ARITHMETIC: Final = frozenset("+-*/%.[?:")
_WORDS: Final = {"true": True, "false": False, "null": None}
_MIRRORED: Final = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


class Literal(NamedTuple):
    """A literal as it is written, and its value."""

    text: str
    value: Any


class Comparison(NamedTuple):
    """A variable, an operator and literals, for example `record.status == 'paid'`.

    Attributes:
        variable: `op`, `topic`, `key`, or the map that has the member, for example `record`.
        member: The name of the member, for example `status`. None: the variable has none.
        operator: As if the variable were on the left: `5 < record.a` has `>`.
        literals: One literal, or for `in` all literals of the list.
    """

    variable: str
    member: str | None
    operator: str
    literals: tuple[Literal, ...]

    @property
    def subject(self) -> str:
        return self.variable if self.member is None else f"{self.variable}.{self.member}"


def comparisons(source: str) -> Iterator[Comparison]:
    """Find the comparisons of a filter in which one side is a variable and the other a literal."""
    tokens = tokens_of(source)
    for at, token in enumerate(tokens):
        if token in _OPERATORS:
            left, right = _before(tokens, at), _after(tokens, at + 1)
            literal, mirrored = _literal(tokens, at + 1), _literal_before(tokens, at)
            if left and literal:
                yield Comparison(*left, token, (literal,))
            elif right and mirrored:
                yield Comparison(*right, _MIRRORED.get(token, token), (mirrored,))
        elif token in _MEMBERSHIP and (left := _before(tokens, at)) and (literals := _list(tokens, at + 1)):
            yield Comparison(*left, "in", literals)


def _before(tokens: Sequence[str], end: int) -> tuple[str, str | None] | None:
    """Return the variable that ends before this token, if it is the whole operand."""
    for length in (4, 3, 1):
        if (found := _variable(tokens[max(0, end - length) : end])) and end >= length:
            previous = tokens[end - length - 1] if end > length else ""
            return None if previous in _ARITHMETIC and previous not in ("?", ":", "[") else found
    return None


def _after(tokens: Sequence[str], start: int) -> tuple[str, str | None] | None:
    """Return the variable that begins at this token, if it is the whole operand."""
    for length in (4, 3, 1):
        if found := _variable(tokens[start : start + length]):
            following = tokens[start + length : start + length + 1]
            return None if following and (following[0] in _ARITHMETIC or following[0] == "(") else found
    return None


def _variable(tokens: Sequence[str]) -> tuple[str, str | None] | None:
    match tokens:
        case ["op" | "topic" | "key" as name]:
            return name, None
        case ["record" | "old" | "meta" as name, ".", member] if member.isidentifier():
            return name, member
        case ["record" | "old" | "meta" as name, "[", member, "]"] if member[0] in "'\"":
            return name, member[1:-1]
    return None


def _literal(tokens: Sequence[str], start: int) -> Literal | None:
    """Return the literal that begins at this token, if it is the whole operand."""
    sign = tokens[start : start + 1] == ["-"]
    place = start + sign
    if place >= len(tokens) or (place + 1 < len(tokens) and tokens[place + 1] in _ARITHMETIC - {"?", ":"}):
        return None
    return _value(("-" if sign else "") + tokens[place])


def _literal_before(tokens: Sequence[str], end: int) -> Literal | None:
    if not end or (end > 1 and tokens[end - 2] in _ARITHMETIC):
        return None
    return _value(tokens[end - 1])


def _list(tokens: Sequence[str], start: int) -> tuple[Literal, ...] | None:
    if tokens[start : start + 1] != ["["] or "]" not in tokens[start:]:
        return None
    inside = tokens[start + 1 : tokens.index("]", start)]
    found = [_value(token) for token in inside[::2]]
    if set(inside[1::2]) - {","} or not all(found):
        return None
    return tuple(literal for literal in found if literal)


def _value(text: str) -> Literal | None:
    if text in _WORDS:
        return Literal(text, _WORDS[text])
    try:
        value = ast.literal_eval(text.rstrip("uU") if text[:1].isdigit() else text)
    except (ValueError, SyntaxError):
        return None
    return Literal(text, value) if isinstance(value, str | int | float) else None
