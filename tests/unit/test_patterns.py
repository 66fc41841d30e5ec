"""Which tables patterns take."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.config import Consumer
from cdcbridge.routing.patterns import like, take, whole
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription


@pytest.mark.parametrize(("patterns", "topics"), [
    (["public.orders"], "public.orders"),
    (["public.*"], "public.orders public.seen public.tmp_a"),
    (["public.*", "!public.seen"], "public.orders public.tmp_a"),
    (["!public.seen", "public.*"], "public.orders public.tmp_a"),
    (["public.*", "!public.tmp_*", "public.tmp_a"], "public.orders public.seen"),
    (["*.*", "!public.*"], "sales.orders sales.o.dot"),
    (["*.*", "!*.orders"], "public.seen public.tmp_a sales.o.dot"),
    (["sales.o*"], "sales.orders sales.o.dot"),
    (["sales.*.dot", "public.t*_a"], "sales.o.dot public.tmp_a"),
    (["public.tmp.a"], ""),
    (["public.tmp%a", "public._rders"], ""),
])  # fmt: skip
def test_take(patterns: list[str], topics: str) -> None:
    every = ["public.orders", "public.seen", "public.tmp_a", "sales.orders", "sales.o.dot"]
    assert {topic for topic in every if take(patterns, topic)} == set(topics.split())
    router = Router([Subscription(1, "c", tuple(patterns), frozenset({"insert"}))])
    assert {t for t in every if router.subscriptions(*t.split(".", 1))} == set(topics.split())


def test_what_has_to_be_published() -> None:
    assert whole(["public.orders", "sales.o_*", "sales.*", "!sales.tmp_*", "x.*"]) == [
        "public.orders",
        "sales.*",
        "x.*",
    ]
    assert whole(["public.seen", "public.orders", "!public.seen", "*.*"]) == ["public.orders", "*.*"]


def test_a_pattern_as_like_has_it() -> None:
    assert like("a_b.100%*") == "a\\_b.100\\%%"


@pytest.mark.parametrize(("tables", "said"), [
    (["orders"], "is not a table"), (["!orders"], "is not a table"), ([".a"], "is not a table"),
    (["!public.seen"], "has nothing to leave out"), (["te*.orders"], "a schema's name takes no"), (["!", "public.a"], "is not a table"),
])  # fmt: skip
def test_what_is_refused(tables: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Consumer(name="c", tables=tables)
