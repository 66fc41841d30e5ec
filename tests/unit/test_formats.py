"""The message as the log has it, and as a CloudEvent."""

from __future__ import annotations

import json

from cdcbridge.sinks.formats import quoted
from tests.harness.shaping import body, row, shaped


def test_the_message_is_the_default_and_no_number_loses_a_digit() -> None:
    (outgoing,) = shaped(row())
    assert b"12345678901234567890.10" in outgoing.body
    found = json.loads(outgoing.body)
    assert found["id"] == outgoing.id == outgoing.headers["cdcbridge-id"] == "7412/1/0/16B3748/2"
    assert list(found) == ["id", "seq", "topic", "key", "data", "commit_lsn", "ordinal", "commit_time", "inserted_at"]
    assert (found["seq"], found["topic"], found["key"], found["data"]["op"]) == (5, "public.orders", "7", "insert")


def test_cloudevents_structured_and_binary() -> None:
    found = body(row(), sink={"format": "cloudevents"})
    attributes = {
        "specversion": "1.0",
        "id": "7412/1/0/16B3748/2",
        "source": "/cdcbridge/shop",
        "type": "public.orders.insert",
        "subject": "7",
        "partitionkey": "7",
        "sequence": "5",
        "time": "2026-05-01T10:00:00.123456+00:00",
    }
    assert {**attributes, "datacontenttype": "application/json"}.items() <= found.items()
    assert found["data"]["record"]["id"] == 7
    (binary,) = shaped(row(), prefix="ce-", sink={"format": "cloudevents", "content_mode": "binary"})
    assert {f"ce-{name}": value for name, value in attributes.items()}.items() <= dict(binary.headers).items()
    assert json.loads(binary.body)["op"] == "insert" and binary.headers["content-type"] == "application/json"


def test_a_text_that_occurs_often_is_quoted_as_json() -> None:
    assert quoted('a "b" ä') == '"a \\"b\\" ä"'
