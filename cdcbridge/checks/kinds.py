"""Check the operations of a filter by the types of the columns, without a row.

For example, `record.status + 1` fails whenever it is evaluated, and `record.price / 2` gives 1 for 3 and 1.5 for 3.0.
The module never reports an operation on a value of unknown type, except for a division with a value in a json document.
It never accesses a database.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from cdcbridge.problem import Severity
from cdcbridge.routing.comparisons import Comparison, Literal
from cdcbridge.routing.filter_tree import Node
from cdcbridge.source.tables import Column, Table

_INTEGER, _DOUBLE, _EITHER, _DOCUMENT, _UNKNOWN = "integer", "double", "either", "document", ""
_NUMBERS: Final = frozenset({_INTEGER, _DOUBLE, _EITHER})
_WHOLE: Final = frozenset({"smallint", "integer", "bigint", "oid", "xid", "cid"})
_SCALE: Final = re.compile(r"numeric\(\d+,(-?\d+)\)")
_GIVES: Final = {"int": _INTEGER, "uint": _INTEGER, "size": _INTEGER, "double": _DOUBLE, "string": "text"}
_GIVES_BOOLEAN: Final = frozenset({"startsWith", "endsWith", "contains", "matches", "has", "exists", "all"})
_ARITHMETIC: Final = frozenset("+-*/%")
_ORDERED: Final = frozenset({"<", "<=", ">", ">="})
_EQUAL: Final = frozenset({"==", "!="})
_JOINED: Final = frozenset({"text", "list"})
_NAMED: Final = {"true": "boolean", "false": "boolean", "op": "text", "topic": "text"}
_SHOWN: Final = {_INTEGER: "an integer", _DOUBLE: "a number", _EITHER: "a number", "text": "a text", "list": "a list"}
_LITERALS: Final = frozenset({"number", "string", "list"})


class KindFault(NamedTuple):
    """A problem of one operation, and its fix."""

    code: str
    severity: Severity
    said: str
    fix: str


def faults(tree: Node | None, source: str, table: Table) -> Iterator[KindFault]:
    """Yield the operations that cannot work on this table's rows, or that depend on how a number is written."""
    if tree is None:
        return
    columns = {column.name: column for column in table.columns}
    for node in tree.walk():
        if node.kind != "binary":
            continue
        left, right = (_kind(part, columns) for part in node.parts)
        if node.word == "/" and (fault := _division(node, source, table, left, right)):
            yield fault
        elif _UNKNOWN not in (left, right) and _DOCUMENT not in (left, right):
            yield from _mismatch(node, source, table, left, right)


def _mismatch(node: Node, source: str, table: Table, left: str, right: str) -> Iterator[KindFault]:
    numbers = {left, right} <= _NUMBERS
    text, where = node.text(source), f"on rows of {table.topic}"
    a, b = _SHOWN.get(left, f"a {left}"), _SHOWN.get(right, f"a {right}")
    if node.word in _ARITHMETIC and not numbers and not (node.word == "+" and left == right and left in _JOINED):
        fix = _converted(node, source, left, right)
        yield KindFault("filter_type", "error", f"`{text}` fails {where}: CEL has no {node.word} for {a} and {b}", fix)
    if left == right or numbers or _plain(node):
        return
    fix = _converted(node, source, left, right)
    if node.word in _ORDERED:
        yield KindFault("filter_type", "error", f"`{text}` fails {where}: {a} cannot be compared with {b}", fix)
    elif node.word in _EQUAL:
        then = "never true" if node.word == "==" else "always true"
        yield KindFault("filter_type", "error", f"`{text}` is {then} {where}: {a} never equals {b}", fix)


def _plain(node: Node) -> bool:
    """Return whether the node compares a column with a literal.

    checks/filters.py reports those comparisons, because it knows the values of the literals.
    """
    return any(part.kind in _LITERALS or part.word in ("true", "false") for part in node.parts) and any(
        part.kind in ("member", "index", "name") for part in node.parts
    )


def _converted(node: Node, source: str, left: str, right: str) -> str:
    for part, kind, other in zip(node.parts, (left, right), (right, left), strict=True):
        text = part.text(source)
        if kind in _NUMBERS and other == "text" and node.word == "+":
            return f"Write `string({text})` instead of `{text}`."
        if kind == "text" and other in _NUMBERS and node.word != "+":
            return f"Write `double({text})` instead of `{text}`, if it always holds a number."
    return "Correct the filter."


def _division(node: Node, source: str, table: Table, left: str, right: str) -> KindFault | None:
    """Return the fault of a division that gives 1 for 3 / 2, but 1.5 for 3.0 / 2."""
    kinds = {left, right}
    if not kinds <= {_INTEGER, _EITHER, _DOCUMENT} or kinds == {_INTEGER}:
        return None
    above, below = (part.text(source) for part in node.parts)
    doubled = f"{below}.0" if below.isdigit() else f"double({below})"
    wholes = [f"int({text})" if kind != _INTEGER else text for text, kind in ((above, left), (below, right))]
    said = (
        f"`{above} / {below}` depends on how {table.topic} has the number: 3 / 2 is 1, for CEL divides integers without"
        " a rest, and 3.0 / 2 is 1.5"
    )
    fix = f"Write `{above} / {doubled}` for a result with decimals, or `{wholes[0]} / {wholes[1]}` for a whole number."
    return KindFault("filter_division", "error" if _EITHER in kinds else "warning", said, fix)


def _kind(node: Node, columns: Mapping[str, Column]) -> str:
    if node.kind == "number":
        return _INTEGER if re.fullmatch(r"(0[xX][\da-fA-F]+|\d+)[uU]?", node.word) else _DOUBLE
    if node.kind == "string":
        return "text" if node.word[0] not in "bB" else _UNKNOWN
    if node.kind in ("list", "name"):
        return "list" if node.kind == "list" else _NAMED.get(node.word, _UNKNOWN)
    if node.kind in ("member", "index"):
        return _of_column(node, columns)
    if node.kind == "unary":
        return "boolean" if node.word == "!" else _kind(node.parts[0], columns)
    if node.kind in ("call", "macro"):
        return "boolean" if node.word in _GIVES_BOOLEAN else _GIVES.get(node.word, _UNKNOWN)
    if node.kind == "ternary":
        yes, no = (_kind(part, columns) for part in node.parts[1:])
        return yes if yes == no else _UNKNOWN
    if node.kind == "binary" and node.word not in _ARITHMETIC:
        return "boolean"
    return (
        _of_operation(node.word, {_kind(part, columns) for part in node.parts}) if node.kind == "binary" else _UNKNOWN
    )


def _of_operation(operator: str, kinds: set[str]) -> str:
    if kinds <= _NUMBERS:
        return _DOUBLE if _DOUBLE in kinds else _EITHER if _EITHER in kinds else _INTEGER
    if _DOCUMENT in kinds and kinds <= {_DOCUMENT, *_NUMBERS}:
        return _DOUBLE if _DOUBLE in kinds else _DOCUMENT
    return kinds.pop() if operator == "+" and len(kinds) == 1 and kinds <= _JOINED else _UNKNOWN


def _of_column(node: Node, columns: Mapping[str, Column]) -> str:
    """Return the kind of a column, for example `record.a`.

    A value inside a json column, for example `record.extra.n`, is a document: its kind is not known.
    """
    inner = node.parts[0]
    name = node.word if node.kind == "member" else node.parts[1].word.strip("'\"")
    if inner.kind == "name" and inner.word in ("record", "old"):
        column = columns.get(name)
        return _UNKNOWN if column is None else _of_type(column)
    if inner.kind in ("member", "index"):
        return _DOCUMENT if _of_column(inner, columns) == _DOCUMENT else _UNKNOWN
    return _UNKNOWN


def _of_type(column: Column) -> str:
    if column.kind == "any":
        return _DOCUMENT
    if column.kind != "number":
        return column.kind
    if column.type in _WHOLE:
        return _INTEGER
    scale = _SCALE.fullmatch(column.type)
    return _EITHER if scale is None else _DOUBLE if int(scale[1]) > 0 else _INTEGER


def numbers_of(column: Column) -> list[Any]:
    """Return sample values of a number column, as in JSON: whole numbers, numbers with decimals, or both."""
    kind = _of_type(column)
    whole: list[Any] = [1, 3, 0, -1]
    decimals: list[Any] = [1.5, 3.0, 0.0, -1.5]
    return whole if kind == _INTEGER else decimals if kind == _DOUBLE else [1, 3.0, 1.5, 0, 3, -1.5]


_FULL: Final = {
    "uuid": r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}",
    "date": r"(\d{4,}-\d\d-\d\d( BC)?|-?infinity)",
    "timestamp without time zone": r"(\d{4,}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,5}[1-9])?( BC)?|-?infinity)",
    "timestamp with time zone": r"(\d{4,}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,5}[1-9])?\+00:00( BC)?|-?infinity)",
    "time without time zone": r"\d\d:\d\d:\d\d(\.\d{0,5}[1-9])?",
    "bytea": r"\\x([\da-f]{2})*",
}
_EXAMPLES: Final = {
    "uuid": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
    "date": "2026-01-31",
    "timestamp without time zone": "2026-01-31T09:30:00",
    "timestamp with time zone": "2026-01-31T09:30:00+00:00",
    "time without time zone": "09:30:00",
    "bytea": "\\x01ff",
}


def other_form(one: Comparison, literal: Literal, column: Column) -> KindFault | None:
    """Return the fault of a literal in a form that no value of the column has, for example a uuid in upper case."""
    plain = re.sub(r"\(\d\)", "", column.type)
    form = _FULL.get(plain)
    if form is None or one.operator not in ("==", "!=", "in") or re.fullmatch(form, literal.value):
        return None
    then = "this is always true" if one.operator == "!=" else "this is never true"
    said = f"the filter compares {one.subject} with {literal.text}, and {column.type} is written as"
    said += f" '{_EXAMPLES[plain]}' in `record`: {then}"
    lower = literal.value.lower()
    if lower != literal.value and re.fullmatch(form, lower):
        return KindFault("filter_form", "warning", said, f"Write '{lower}' instead of {literal.text}.")
    if plain == "timestamp with time zone":
        return KindFault(
            "filter_form", "warning", said, f"Compare times: `timestamp({one.subject}) == timestamp('…')`."
        )
    return KindFault("filter_form", "warning", said, f"Write it as '{_EXAMPLES[plain]}' is written.")
