"""Which consumers want which table."""

from __future__ import annotations

from cdcbridge.changes.events import Relation
from cdcbridge.routing.router import OPERATIONS, Router, Subscription


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
