"""Each verdict, on changes, messages of the log, rows of backfills and published messages.

The verdict on a change is that on its message in the log, and its delete has the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from cdcbridge.changes.events import Begin, Change, Relation
from cdcbridge.routing.copy_format import encode_data
from cdcbridge.routing.filters import Filter
from cdcbridge.routing.judged import Changed, Logged
from cdcbridge.routing.logical_messages import read_published
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import PASS, Bury, Pass, Take, Verdict, verdict

PAID = "record.status == 'paid'"
ID = frozenset({"id"})
BIG = orjson.Fragment("9007199254740993.10")
T = Relation("public", "t", "public.t", ("id",), ID)


def wanted(source: str | None, *, on_leave: bool = True, **more: Any) -> Subscription:
    operations = frozenset({"insert", "update", "delete"})
    condition = None if source is None else Filter(source)
    return Subscription(1, "c", ("public.t",), operations, condition, on_leave=on_leave, **more)


def row(status: str, **more: Any) -> dict[str, Any]:
    return {"id": 1, "status": status, "amount": BIG, **more}


def both(op: str, record: Any, old: Any, unchanged: Sequence[str] = (), its_key: str | None = None) -> list[Any]:
    """A change as it arrives, and the message of the log that it becomes."""
    key, old_key = (None if values is None else str(values["id"]) for values in (record, old))
    change = Change(op, T, record, old, tuple(unchanged))
    data = encode_data(op, record, old, unchanged)
    place, size = ("0/1", 0, 7), len(data)
    before = None if old_key == key else old_key
    logged = Logged(data.decode(), "public.t", key, *place, before, its_key=its_key, identity=ID, size=size)
    return [Changed(change, key, old_key, Begin(1, 7, 0), 0), logged]


def word(said: Verdict) -> str:
    """The verdict in a word, of a message that is no dead letter."""
    assert not isinstance(said, Bury)
    return "passed" if isinstance(said, Pass) else "taken" if said.data is None else "left"


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
    (PAID, "truncate", None, None, (), "taken"),  # undecidable
    ("op != 'truncate'", "truncate", None, None, (), "passed"),
])  # fmt: skip
def test_both_ways(source: str, op: str, record: Any, old: Any, unchanged: tuple[str, ...], expected: str) -> None:
    change, logged = both(op, record, old, unchanged)
    said = verdict(wanted(source), change)
    assert word(said) == expected
    assert verdict(wanted(source), logged) == said, "with the same key and the same bytes"
    for message in (change, logged):
        without = word(verdict(wanted(source, on_leave=False), message))
        assert without == ("passed" if expected == "left" else expected)
    if isinstance(said, Take) and said.data is not None:
        assert said.key == "1", "the consumer knows the row by its key before"
        assert orjson.loads(said.data)["record"].keys() == (old or {"id": 1}).keys()


ORDER, LEFT = row("paid", customer=7), (row("open", customer=8), row("paid", customer=7))
SIZE = len(encode_data("insert", ORDER, None, ()))
DELETE = encode_data("delete", LEFT[1], None, ())
FAILS = (
    "filter_error: record.status > 1: a text cannot be compared with an integer. Write double(record.status)"
    ' (record.status is the text "paid")'
)


@pytest.mark.parametrize(("settings", "op", "record", "old", "expected"), [
    ({}, "insert", ORDER, None, Take("1")),
    ({}, "truncate", None, None, Take(None)),
    ({"key": ("customer",)}, "insert", ORDER, None, Take("7")),
    ({"key": ("customer", "id")}, "insert", ORDER, None, Take('["7","1"]')),
    ({"key": ("customer",)}, "truncate", None, None, Take(None)),
    ({"max_bytes": SIZE}, "insert", ORDER, None, Take("1")),
    ({"max_bytes": SIZE - 1}, "insert", ORDER, None, Bury(f"oversized: data has {SIZE} bytes, max_message_bytes is {SIZE - 1}", "1")),
    ({"max_bytes": 9, "key": ("customer",)}, "insert", ORDER, None, Bury(f"oversized: data has {SIZE} bytes, max_message_bytes is 9", "7")),
    ({"source": "record.status == 'open'", "max_bytes": 9}, "insert", ORDER, None, PASS),
    ({"source": "record.status > 1"}, "insert", ORDER, None, Bury(FAILS, "1")),
    ({"source": "record.status > 1", "key": ("customer",)}, "insert", ORDER, None, Bury(FAILS, "7")),
    ({"source": "record.status > 1", "max_bytes": 9}, "insert", ORDER, None, Bury(f"oversized: data has {SIZE} bytes, max_message_bytes is 9", "1")),
    ({"source": PAID}, "update", *LEFT, Take("1", DELETE)),
    ({"source": PAID, "key": ("customer",)}, "update", *LEFT, Take("7", DELETE)),  # not 8, by which nobody knows it
    ({"source": PAID, "max_bytes": len(DELETE)}, "update", *LEFT, Take("1", DELETE)),  # though the update is larger
    ({"source": PAID, "max_bytes": 9}, "update", *LEFT, Bury(f"oversized: data has {len(DELETE)} bytes, max_message_bytes is 9", "1", DELETE)),
])  # fmt: skip
def test_keys_sizes_and_failures(settings: dict[str, Any], op: str, record: Any, old: Any, expected: Verdict) -> None:
    source, key = settings.get("source"), settings.get("key")
    of = wanted(source, on_leave=source is not None, **{k: v for k, v in settings.items() if k != "source"})
    its_key = key and record and {1: "7", 2: '["7","1"]'}[len(key)]
    assert [verdict(of, message) for message in both(op, record, old, (), its_key)] == [expected, expected]


def test_a_row_of_a_backfill_that_was_not_loaded() -> None:
    part = Logged(
        b'{"op":"read","record":{"id":1},"old":null,"unchanged":[]}', "public.t", "1", "0/1", 0, None, least=900
    )
    too_large = "oversized: data has at least 900 bytes, max_message_bytes is 80: the row was not loaded"
    assert verdict(wanted(None, max_bytes=80), part) == Bury(too_large, "1")
    assert verdict(wanted("record.id == 2", max_bytes=80), part) == PASS, "the filter reads what was loaded"
    assert verdict(wanted("record.id.x == 1", max_bytes=80), part) == Bury(too_large, "1")
    assert verdict(wanted(None, max_bytes=80, key=("c",)), part._replace(its_key="k")) == Bury(too_large, "k")


@pytest.mark.parametrize(("content", "settings", "expected"), [
    ('{"key":"5","data":{"c":9}}', {}, Take("5")),
    ('{"key":5,"data":[]}', {}, Take("5")),
    ('{"data":1}', {}, Take(None)),
    ('{"key":"5","data":{"c":9}}', {"key": ("c",)}, Take("9")),
    ('{"key":"5","data":[1]}', {"key": ("c",)}, Take(None)),  # it has no members
    ('{"key":"5","data":{"c":9}}', {"source": "false"}, Take("5")),  # filters are of tables
    ('{"key":"5","data":{}}', {"max_bytes": 53}, Bury("oversized: data has 54 bytes, max_message_bytes is 53", "5")),
    ('{"key":"5","data":{}}', {"max_bytes": 54}, Take("5")),
    ("{", {}, Bury("undecodable: not JSON: unexpected end of data", None)),
    ("[]", {"max_bytes": 1}, Bury('undecodable: expected {"key": ..., "data": ..., "deliver_at": ...}', None)),
    ('{"key":true,"data":1}', {"key": ("c",)}, Bury("undecodable: the key is not a text, a number or null", None)),
])  # fmt: skip
def test_published_messages(content: str, settings: dict[str, Any], expected: Verdict) -> None:
    of = wanted(settings.get("source"), **{k: v for k, v in settings.items() if k != "source"})
    assert verdict(of, read_published(content.encode())) == expected


@pytest.mark.parametrize("topic", ["invoices", "cdcbridge.gap"])
def test_no_filter_applies_to_published_and_gap_messages_of_the_log(topic: str) -> None:
    message = Logged('{"op":"message","record":1,"old":null,"unchanged":[]}', topic, "k", None, None, None, size=53)
    assert verdict(wanted("false"), message) == Take("k")
    assert isinstance(verdict(wanted("false", max_bytes=52), message), Bury)


@pytest.mark.parametrize(("text", "source", "expected"), [
    ('{"op":"insert","record":{"id":1,"n":1e999},"old":null,"unchanged":[]}', "record.id == 1", Take("1")),
    ('{"op":"insert","record":{"id":1,"n":1e999},"old":null,"unchanged":[]}', "record.id == 2", PASS),
    ('{"op":"insert","record":{"id":1,"n":1e999},"old":null,"unchanged":[]}', "record.n == 2",
     Bury("filter_error: a value that CEL cannot hold: record.n: number is infinity when parsed as double", "1")),
    ('{"op":1e999}', "true", Bury("filter_error: a value that CEL cannot hold: number is infinity when parsed as double", "1")),
    ("[1e999]", "true", Bury("filter_error: a value that CEL cannot hold: number is infinity when parsed as double", "1")),
])  # fmt: skip
def test_data_that_is_no_object_or_has_what_cel_cannot_hold(text: str, source: str, expected: Verdict) -> None:
    said = verdict(wanted(source), Logged(text, "public.t", "1", "0/1", 0, 7))
    if isinstance(said, Bury) and isinstance(expected, Bury):
        said = said._replace(reason=said.reason.split(": line")[0])
    assert said == expected


def test_a_value_keeps_its_text_and_a_table_without_known_identity_its_row() -> None:
    _, logged = both("update", row("open"), row("paid"))
    said = verdict(wanted(PAID), logged)
    assert isinstance(said, Take) and said.data is not None
    assert b'"amount":9007199254740993.10' in said.data
    _, alone = both("update", row("open"), None)
    said = verdict(wanted(PAID), alone._replace(identity=frozenset()))
    assert isinstance(said, Take) and said.data is not None
    assert orjson.loads(said.data)["record"]["status"] == "open"


def test_what_nobody_takes_is_not_encoded() -> None:
    change, _ = both("insert", row("open"), None)
    change.encode = None
    assert verdict(wanted(PAID), change) == PASS


def test_one_row_is_judged_for_each_consumer_alone() -> None:
    change, _ = both("update", *LEFT)
    of = wanted(PAID)
    consumers = [of, replace(of, on_leave=False), replace(of, key=("customer",)), replace(of, filter=None, key=None)]
    assert [verdict(consumer, change) for consumer in consumers] == [
        Take("1", DELETE), PASS, Take("7", DELETE), Take("1"),
    ]  # fmt: skip
