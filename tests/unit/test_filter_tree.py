"""The tree of a filter: what binds stronger, where each part stands, and forms that are not known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.routing.filter_tree import Node, tree_of
from cdcbridge.routing.filters import Filter, placed_tokens


def tree(source: str) -> Node | None:
    return tree_of(placed_tokens(source))


def shown(node: Node) -> str:
    """With brackets around each part that has parts."""
    parts = " ".join(map(shown, node.parts))
    return f"({node.kind} {node.word} {parts})".replace("  ", " ") if node.parts else node.word or f"({node.kind})"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a + b * c", "(binary + a (binary * b c))"),
        ("a - b - c", "(binary - (binary - a b) c)"),
        ("(a + b) * c", "(binary * (binary + a b) c)"),
        ("a || b && c == d", "(binary || a (binary && b (binary == c d)))"),
        ("!a && -b < 1", "(binary && (unary ! a) (binary < (unary - b) 1))"),
        ("a ? b : c ? d : e", "(ternary ? a b (ternary ? c d e))"),
        ("record.a.b['c'][0]", "(index (index (member b (member a record)) 'c') 0)"),
        ("size(a) > a.size()", "(binary > (call size a) (call size a))"),
        ("a.exists(x, x > 1)", "(macro exists a x (binary > x 1))"),
        ("a in [1, 2]", "(binary in a (list 1 2))"),
        ("{'k': 1, 'l': []}", "(map 'k' 1 'l' (list))"),
        ("!!a", "(unary ! (unary ! a))"),
        ("f()", "f"),
    ],
)
def test_what_binds_stronger(source: str, expected: str) -> None:
    found = tree(source)
    assert found is not None and shown(found) == expected


@pytest.mark.parametrize("source", ["", "a +", "(a", "a b", "a ? b", "a.1", "[1, 2", "a[", "=", "{1: 2", ")", "a[1"])
def test_an_unknown_form_has_no_tree(source: str) -> None:
    assert tree(source) is None


@pytest.mark.parametrize("nested", ["(" * 5000 + "a" + ")" * 5000, "-" * 5000 + "a", "a?b:" * 5000 + "c", "[" * 5000])
def test_what_is_nested_too_deeply_has_no_tree_and_raises_nothing(nested: str) -> None:
    assert tree(nested) is None


names = st.sampled_from(["record.a", "record.b", "1", "2.5", "'x y'", "old.c"])
expressions = st.recursive(
    names,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "*", "&&", "==", "in"]), inner)
        | st.builds("{} ? {} : {}".format, st.builds("({})".format, inner), inner, inner).map(lambda t: f"({t})")
        | st.builds("size({})".format, inner)
        | st.builds("[{}, {}]".format, inner, inner)
    ),
    max_leaves=12,
)


@given(expressions)
def test_each_part_stands_where_it_says_and_is_an_expression_by_itself(source: str) -> None:
    found = tree(source)
    assert found is not None
    for node in found.walk():
        text = node.text(source)
        alone = tree(text)
        assert alone is not None and shown(alone) == shown(node), text
        assert all(node.start <= part.start < part.end <= node.end for part in node.parts)


def test_the_innermost_is_walked_first() -> None:
    source = "record.a + 1 > 2"
    found = Filter(source).tree
    assert found is not None
    assert [node.text(source) for node in found.walk()] == ["record", "record.a", "1", "record.a + 1", "2", source]
