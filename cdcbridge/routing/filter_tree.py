"""Parse a filter into a tree: `record.a * 1.5 > 1` is a comparison of a product with a number.

The CEL library gives no tree. The arithmetic of filters, the reasons of their failures, and `check` need one. The
module is pure. It must never refuse an expression that the library takes: for a form that it does not know, it returns
None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

Token = tuple[str, int]  # its text, and its place in the source
_ORDER: Final = (
    ("||",),
    ("&&",),
    ("==", "!=", "<", "<=", ">", ">=", "in"),
    ("+", "-"),
    ("*", "/", "%"),
)
_MACROS: Final = frozenset({"all", "exists", "exists_one", "map", "filter"})
_PAIRS: Final = {"(": ")", "[": "]", "{": "}"}
_DEEPEST: Final = 200  # levels, far below Python's recursion limit


class Node(NamedTuple):
    """One part of an expression.

    Attributes:
        kind: binary, unary, ternary, name, number, string, list, map, call, macro, member or index.
        word: The operator, the name of the function or member, or the token itself.
        parts: The operands. For a call: the object, if there is one, and then the arguments.
        start: The place in the source where it begins, without parentheses around it.
        end: The place in the source where it ends, without parentheses around it.
    """

    kind: str
    word: str
    parts: tuple[Node, ...]
    start: int
    end: int

    def text(self, source: str) -> str:
        return source[self.start : self.end]

    def walk(self) -> Iterator[Node]:
        """Yield this node and all nodes below it, the innermost first."""
        for part in self.parts:
            yield from part.walk()
        yield self


def tree_of(tokens: Sequence[Token]) -> Node | None:
    """Parse the tokens of an expression.

    Return None for a form that is not known here.
    """
    reader = _Reader(tokens)
    try:
        node = reader.expression(0)
    except (_UnknownForm, RecursionError):
        return None
    return node if reader.at == len(tokens) else None


class _UnknownForm(Exception):
    pass


class _Reader:
    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> Token:
        if not self.peek() or (expected and self.peek() != expected):
            raise _UnknownForm
        self.at += 1
        return self.tokens[self.at - 1]

    @property
    def end(self) -> int:
        """The place where the token that was taken last ends."""
        text, start = self.tokens[self.at - 1]
        return start + len(text)

    def expression(self, depth: int) -> Node:
        if depth > _DEEPEST:
            raise _UnknownForm
        start = self.place()
        node = self.binary(0, depth)
        if self.peek() != "?":
            return node
        self.take()
        yes = self.binary(0, depth)
        self.take(":")
        no = self.expression(depth + 1)
        return Node("ternary", "?", (node, yes, no), start, self.end)

    def place(self) -> int:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else 0

    def binary(self, level: int, depth: int) -> Node:
        if level == len(_ORDER):
            return self.unary(depth)
        start = self.place()
        node = self.binary(level + 1, depth)
        while self.peek() in _ORDER[level]:
            operator, _ = self.take()
            right = self.binary(level + 1, depth)
            node = Node("binary", operator, (node, right), start, self.end)
        return node

    def unary(self, depth: int) -> Node:
        start, operator = self.place(), self.peek()
        if operator not in ("!", "-"):
            return self.member(depth)
        self.take()
        if depth > _DEEPEST:
            raise _UnknownForm
        inner = self.unary(depth + 1)
        return Node("unary", operator, (inner,), start, self.end)

    def member(self, depth: int) -> Node:
        start = self.place()
        node = self.primary(depth)
        while self.peek() in (".", "["):
            mark, _ = self.take()
            if mark == "[":
                index = self.expression(depth + 1)
                self.take("]")
                node = Node("index", "", (node, index), start, self.end)
                continue
            name = self.name()
            if self.peek() == "(":
                given = self.items("(", depth)
                kind = "macro" if name in _MACROS else "call"
                node = Node(kind, name, (node, *given), start, self.end)
            else:
                node = Node("member", name, (node,), start, self.end)
        return node

    def name(self) -> str:
        name, _ = self.take()
        if not name.isidentifier():
            raise _UnknownForm
        return name

    def primary(self, depth: int) -> Node:
        text, start = self.peek(), self.place()
        if text == "(":
            self.take()
            node = self.expression(depth + 1)
            self.take(")")
            return node
        if text in ("[", "{"):
            given = self.items(text, depth)
            return Node("list" if text == "[" else "map", "", given, start, self.end)
        self.take()
        if text[0].isdigit() or (text[0] == "." and len(text) > 1):
            return Node("number", text, (), start, self.end)
        if text[-1] in "'\"" and len(text) > 1:
            return Node("string", text, (), start, self.end)
        if not text.isidentifier():
            raise _UnknownForm
        if self.peek() == "(":
            return Node("call", text, self.items("(", depth), start, self.end)
        return Node("name", text, (), start, self.end)

    def items(self, opened: str, depth: int) -> tuple[Node, ...]:
        """Return the nodes between brackets.

        For a map, keys and values take turns.
        """
        self.take(opened)
        closed, found = _PAIRS[opened], []
        while self.peek() != closed:
            found.append(self.expression(depth + 1))
            if self.peek() in (",", ":") and (opened == "{" or self.peek() == ","):
                self.take()
            elif self.peek() != closed:
                raise _UnknownForm
        self.take(closed)
        return tuple(found)
