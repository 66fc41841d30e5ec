"""Debezium's envelope."""

from __future__ import annotations

import base64
import json

import pytest

from cdcbridge.config import Consumer
from cdcbridge.routing.subscription import Subscription
from cdcbridge.sinks.debezium import UNAVAILABLE
from cdcbridge.sinks.message import SinkMessage
from cdcbridge.sinks.reading import judge
from cdcbridge.sinks.shaper import Names, Shaper, Unshaped
from cdcbridge.store.consumers import stored_config
from tests.debezium.record import FOLDER
from tests.harness.shaping import ORIGIN, body, row, shaped

EVENTS = FOLDER / "events.jsonl"


def test_debeziums_envelope() -> None:
    update = '{"op":"update","record":{"id":7,"n":2},"old":{"id":7,"n":1},"unchanged":["doc"]}'
    found = body(row(update), sink={"format": "debezium"})
    assert found["op"] == "u" and found["before"] == {"id": 7, "n": 1}
    assert found["after"] == {"id": 7, "n": 2, "doc": UNAVAILABLE.strip('"')}
    source = found["source"]
    assert (source["connector"], source["name"], source["db"]) == ("postgresql", "shop", "shopdb")
    assert (source["schema"], source["table"], source["txId"], source["lsn"]) == ("public", "orders", 900, 0x16B3748)
    assert source["ts_ms"] == 1777629600123 and source["ts_us"] == 1777629600123456
    assert source["snapshot"] == "false" and found["ts_ms"] > source["ts_ms"]


@pytest.mark.parametrize(("op", "letter"), [("insert", "c"), ("delete", "d"), ("read", "r"), ("truncate", "t")])
def test_debeziums_operations(op: str, letter: str) -> None:
    record = "null" if op == "truncate" else '{"id":7}'
    found = body(row(f'{{"op":"{op}","record":{record},"old":null,"unchanged":[]}}'), sink={"format": "debezium"})
    value = None if op == "truncate" else {"id": 7}
    rows = {"before": value, "after": None} if op == "delete" else {"before": None, "after": value}
    assert {"op": letter, **rows}.items() <= found.items()
    assert found["source"]["snapshot"] == ("true" if op == "read" else "false")


def test_debezium_has_a_tombstone_after_a_delete_in_kafka_alone() -> None:
    delete = '{"op":"delete","record":{"id":7},"old":null,"unchanged":[]}'
    kafka = {"type": "kafka", "bootstrap_servers": ["b:1"], "topic": "{topic}", "format": "debezium"}
    chosen = Consumer.model_validate({"name": "e", "tables": ["public.*"], "sink": kafka})
    wanted = Subscription.from_config(1, "e", "stream", stored_config(chosen))
    said = judge(row(delete), wanted, ORIGIN, projected=False)
    assert isinstance(said, SinkMessage)
    two = Shaper(chosen, Names("shop", "shopdb"), None).shape(said)
    assert not isinstance(two, Unshaped)
    assert [(one.body is None, one.key, one.seq) for one in two] == [(False, "7", 5), (True, "7", 5)]
    assert len({one.id for one in two}) == 2
    assert len(shaped(row(delete), sink={"format": "debezium"})) == 1


def test_a_changed_key_is_a_delete_a_tombstone_and_a_create_in_kafka() -> None:
    update = '{"op":"update","record":{"id":3,"name":"Ada \\"x\\" ü"},"old":{"id":1},"unchanged":["n"]}'
    kafka = {"type": "kafka", "bootstrap_servers": ["b:1"], "topic": "{topic}", "format": "debezium"}
    deleted, tombstone, created = shaped(row(update, key="3", old_key="1"), sink=kafka)
    theirs = [json.loads(line) for line in EVENTS.read_text().splitlines()]
    at = next(n for n, (key, value) in enumerate(theirs) if key == {"id": 1} and value and value["op"] == "d")
    for mine, (key, value) in zip((deleted, tombstone, created), theirs[at : at + 3], strict=True):
        assert mine.key == str(key["id"])
        event = None if mine.body is None else json.loads(mine.body)
        assert (event is None) is (value is None)
        if event is not None:
            assert event["op"] == value["op"]
            assert (event["before"] is None, event["after"] is None) == (
                value["before"] is None,
                value["after"] is None,
            )
    assert json.loads(created.body)["after"]["n"] == UNAVAILABLE.strip('"')
    assert deleted.headers["__debezium.newkey"] == tombstone.headers["__debezium.newkey"] == "3"
    assert created.headers["__debezium.oldkey"] == "1"
    assert created.id == "7412/1/0/16B3748/2" and len({deleted.id, tombstone.id, created.id}) == 3
    assert len(shaped(row(update, key="3", old_key="1"), sink={"format": "debezium"})) == 1


def test_debezium_carries_a_published_message() -> None:
    data = '{"op":"message","record":{"a":1},"old":null,"unchanged":[]}'
    found = body(row(data, topic="invoices", commit_lsn=None, ordinal=None), sink={"format": "debezium"})
    assert found["op"] == "m" and found["message"]["prefix"] == "invoices"
    assert json.loads(base64.b64decode(found["message"]["content"])) == {"a": 1}
