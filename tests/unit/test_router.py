"""Which consumers want which table."""

from __future__ import annotations

import sys

from cdcbridge.changes.events import Relation
from cdcbridge.routing.filters import Filter
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.routing.subscription import Subscription


def subscription(number: int, *tables: str, **given_: object) -> Subscription:
    return Subscription(number, f"c{number}", tables, frozenset(OPERATIONS), **given_)  # type: ignore[arg-type]


def test_patterns_match_tables_schemas_and_everything_but_our_own() -> None:
    router = Router(
        [subscription(1, "public.t"), subscription(2, "public.*"), subscription(3, "*.*"), subscription(4, "x.t")]
    )
    assert [s.consumer_id for s in router.subscriptions("public", "t")] == [1, 2, 3]
    assert [s.consumer_id for s in router.subscriptions("x", "t")] == [3, 4]
    assert router.subscriptions("cdcbridge", "messages") == []
    both = Router([subscription(1, "public.t", "public.*")])
    assert len(both.subscriptions("public", "t")) == 1, "a consumer gets a message once"


def test_500_consumers_on_500_tables_cost_as_one() -> None:
    """Routing looks at the consumers of the table, not at all: a plan per relation, found by one look-up."""
    router = Router([subscription(n, f"public.t{n}") for n in range(500)])
    relation = Relation("public", "t7", "public.t7", None, frozenset())
    plan = router.plan(relation, "insert")
    assert plan is not None and plan.plain == (7,) and plan.special == ()
    assert router.plan(relation, "insert") is plan


T = Relation("public", "t", "public.t", None, frozenset())


def test_a_plan_sorts_consumers_by_what_they_need() -> None:
    router = Router([
        subscription(1, "public.t", max_bytes=50), subscription(2, "public.t", key=("a",)), subscription(3, "*.*", reads_log=True),
        subscription(4, "public.t", filter=Filter("true"), max_bytes=20), Subscription(5, "c5", ("public.t",), frozenset({"delete"})),
    ])  # fmt: skip
    plan = router.plan(T, "insert")
    assert plan is not None
    assert (plan.plain, [s.consumer_id for s in plan.special], plan.streams) == ((1,), [2, 4], (3,))
    assert plan.limits == ((1, 50),) and plan.smallest_limit == 50, "the special ones have a verdict of their own"
    deletes = router.plan(T, "delete")
    assert deletes is not None and deletes.plain == (1, 5)
    assert Router([subscription(1, "x.t")]).plan(T, "insert") is None
    only = Router([subscription(1, "public.t", reads_log=True, max_bytes=1)]).plan(T, "insert")
    assert only is not None and only.smallest_limit == sys.maxsize, "a stream has no limit"


def test_what_is_never_taken() -> None:
    router = Router([subscription(1, "*.*")], own_schema="mine")
    for schema in ("mine", "mine_internal", "cdcbridge_identity", "a.b"):
        assert router.subscriptions(schema, "t") == []
    assert router.subscriptions("cdcbridge", "t")


def test_readers_of_a_published_topic() -> None:
    router = Router(
        [subscription(1, topics=("news", "news")), subscription(2, "news.*"), subscription(3, topics=("news",))]
    )
    assert [s.consumer_id for s in router.readers("news")] == [1, 3] and router.readers("other") == []
