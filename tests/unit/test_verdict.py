"""The verdict on a change is that on its message in the log, and its delete has the same bytes."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from cdcbridge.routing.copy_format import encode_data
from cdcbridge.routing.filters import Filter
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import (
    Logged,
    deletion,
    environment_of,
    row_that_left,
    text_that_left,
    verdict,
    verdict_of_text,
)

PAID = "record.status == 'paid'"
ID = frozenset({"id"})
BIG = orjson.Fragment("9007199254740993.10")


def wanted(source: str, *, on_leave: bool = True) -> Subscription:
    operations = frozenset({"insert", "update", "delete"})
    return Subscription(1, "c", ("public.t",), operations, Filter(source), on_leave=on_leave)


def row(status: str, **more: Any) -> dict[str, Any]:
    return {"id": 1, "status": status, "amount": BIG, **more}


@pytest.mark.parametrize(("source", "op", "record", "old", "unchanged", "expected"), [
    (PAID, "insert", row("paid"), None, (), "taken"),
    (PAID, "insert", row("open"), None, (), "passed"),
    (PAID, "update", row("paid"), row("open"), (), "taken"),
    (PAID, "update", row("open"), row("paid"), (), "left"),
    (PAID, "update", row("open"), row("open"), (), "passed"),
    (PAID, "update", row("open"), None, (), "left"),
    (PAID, "update", row("open", id=2), {"id": 1}, (), "left"),
    (PAID, "update", {"id": 1, "amount": BIG}, None, ("status",), "taken"),  # undecidable
    (PAID, "delete", row("open"), None, (), "passed"),
    (PAID, "delete", {"id": 1}, None, (), "taken"),  # undecidable
    (PAID, "read", row("open"), None, (), "passed"),
    ("record.id == 2", "update", row("open"), None, (), "passed"),
    ("record.id == 1", "update", row("open", id=2), {"id": 1}, (), "left"),
    ("record.amount > 5", "update", row("x", amount=1), row("x", amount=None), (), "left"),  # it cannot be told
    ("op == 'insert'", "update", row("open"), row("open"), (), "left"),
    ("op == 'read' && record.status == 'paid'", "update", row("x"), row("paid"), (), "left"),
    ("op == 'delete'", "update", row("open"), row("open"), (), "passed"),
    ("key == '1'", "update", row("open", id=2), {"id": 1}, (), "left"),
])  # fmt: skip
def test_both_ways(source: str, op: str, record: Any, old: Any, unchanged: tuple[str, ...], expected: str) -> None:
    text = encode_data(op, record, old, unchanged).decode()
    key, old_key = str(record["id"]), str(old["id"]) if old and old["id"] != record["id"] else None
    logged = Logged(text, "public.t", key, "0/1", 0, 7, old_key)
    environment, _ = environment_of(logged)
    assert verdict(wanted(source), environment, unchanged, ID, old_key) == expected
    assert verdict_of_text(wanted(source), logged, ID) == expected
    without = wanted(source, on_leave=False)
    assert verdict_of_text(without, logged, ID) == ("passed" if expected == "left" else expected)
    if expected == "left":
        data = deletion(row_that_left(record, old, ID))
        assert data == deletion(text_that_left(text, ID))
        assert orjson.loads(data)["record"].keys() == (old or {"id": 1}).keys()


def test_a_value_keeps_its_text_and_a_table_without_known_identity_its_row() -> None:
    text = encode_data("update", row("open"), row("paid"), ()).decode()
    assert b'"amount":9007199254740993.10' in deletion(text_that_left(text, ID))
    alone = encode_data("update", row("open"), None, ()).decode()
    assert orjson.loads(deletion(text_that_left(alone, frozenset())))["record"]["status"] == "open"
