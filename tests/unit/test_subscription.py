"""A subscription is built from a consumer's stored settings, dumped as JSON and loaded again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import orjson
import pytest

from cdcbridge.config import Consumer
from cdcbridge.routing.subscription import Subscription
from cdcbridge.store.consumers import stored_config

FILTER = "record.status == 'paid'"
RICH: dict[str, Any] = {
    "tables": ["public.orders", "!public.orders_old"], "topics": ["invoices"], "operations": ["insert", "update"],
    "filter": FILTER, "on_leave": "delete", "key": ["customer", "id"], "max_message_bytes": "2kB",
    "columns": {"include": ["id", "customer", "status"]},
}  # fmt: skip


def built(mode: str, **settings: Any) -> Subscription:
    consumer = Consumer.model_validate({"name": "c", "mode": mode, **settings})
    return Subscription.from_config(7, consumer.name, consumer.mode, stored_config(consumer))


def values(of: Subscription) -> dict[str, Any]:
    """Its fields, with the filter as its text: a compiled one equals itself alone."""
    found = {field.name: getattr(of, field.name) for field in fields(of)}
    return {**found, "filter": of.filter and of.filter.source}


def test_from_config() -> None:
    rich = built("fifo", **RICH)
    assert values(rich) == {
        "consumer_id": 7, "name": "c", "tables": ("public.orders", "!public.orders_old"), "topics": ("invoices",),
        "operations": frozenset({"insert", "update"}), "filter": FILTER, "key": ("customer", "id"), "max_bytes": 2048,
        "in_order": True, "reads_log": False, "columns": frozenset({"id", "customer", "status"}), "on_leave": True,
        "two_way": False,
    }  # fmt: skip
    assert rich.own_keys and not rich.plain
    stream = built("stream", tables=["public.*"])
    assert stream.reads_log and stream.plain and not stream.in_order and not stream.own_keys
    assert (stream.filter, stream.key, stream.columns) == (None, None, frozenset())


@pytest.mark.parametrize(
    ("mode", "settings"), [("fifo", RICH), ("queue", {"tables": ["a.*"]}), ("stream", {"topics": ["t"]})]
)
def test_a_dump_survives_json(mode: str, settings: dict[str, Any]) -> None:
    subscription = built(mode, **settings)
    again = Subscription.load(orjson.loads(orjson.dumps(subscription.dump())))
    assert values(again) == values(subscription)


def test_what_an_older_version_dumped_is_loaded() -> None:
    old = {"consumer_id": 1, "name": "c", "tables": ["a.b"], "operations": ["insert"], "filter": None, "key": None}
    assert Subscription.load({**old, "max_bytes": 5}) == Subscription(
        1, "c", ("a.b",), frozenset({"insert"}), max_bytes=5
    )
