"""The form in which a message leaves: identity, formats, mask, transform, destination and filter."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.config import Consumer
from cdcbridge.routing.destination import Destination, NoDestination
from cdcbridge.routing.filters import FilterError
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.transform import Transform
from cdcbridge.sinks.mask import masked
from cdcbridge.sinks.message import Origin, SinkMessage, in_one_line, op_of
from cdcbridge.sinks.reading import judge
from cdcbridge.sinks.shaper import Names, Refused, Shaper, as_json
from cdcbridge.sinks.store import LogRow
from cdcbridge.store.consumers import stored_config

ORIGIN = Origin("7412", "shop", [0], [1])
INSERT = (
    '{"op":"insert","record":{"id":7,"total":12345678901234567890.10,"email":"a@b.example"},"old":null,"unchanged":[]}'
)
TIME = '"2026-05-01T10:00:00.123456+00:00"'


def row(data: str = INSERT, seq: int = 5, **changes: Any) -> LogRow:
    made = LogRow(seq, "public.orders", "7", 3, data, None, "0/16B3748", 2, 900, TIME, TIME, None)
    return made._replace(**changes)


def consumer(mode: str = "stream", **settings: Any) -> Consumer:
    sink = {"type": "file", "path": "out", **settings.pop("sink", {})}
    return Consumer.model_validate({"name": "events", "mode": mode, "tables": ["public.*"], "sink": sink, **settings})


def shaped(one: LogRow, prefix: str | None = None, **settings: Any) -> Any:
    chosen = consumer(**settings)
    wanted = Subscription.from_config(1, "events", chosen.mode, stored_config(chosen))
    said = judge(one, wanted, ORIGIN, projected=chosen.columns is not None)
    return Shaper(chosen, Names("shop", "shopdb"), prefix).shape(said) if isinstance(said, SinkMessage) else said


def body(one: LogRow, **settings: Any) -> Any:
    (outgoing,) = shaped(one, **settings)
    return json.loads(outgoing.body)


def test_the_message_is_the_default_and_no_number_loses_a_digit() -> None:
    (outgoing,) = shaped(row())
    assert b"12345678901234567890.10" in outgoing.body
    found = json.loads(outgoing.body)
    assert found["id"] == outgoing.id == outgoing.headers["cdcbridge-id"] == "7412/1/0/16B3748/2"
    assert list(found) == ["id", "seq", "topic", "key", "data", "commit_lsn", "ordinal", "commit_time", "inserted_at"]
    assert (found["seq"], found["topic"], found["key"], found["data"]["op"]) == (5, "public.orders", "7", "insert")


@pytest.mark.parametrize(
    ("op", "lsn", "identity"),
    [
        ("insert", "0/16B3748", "7412/1/0/16B3748/2"),
        ("read", "0/16B3748", "7412/seq/5"),  # a row that a backfill read
        ("message", None, "7412/seq/5"),
    ],
)
def test_the_identity_follows_from_the_position(op: str, lsn: str | None, identity: str) -> None:
    assert ORIGIN.identity(5, op, lsn, 2) == identity


def test_the_identity_keeps_the_timeline_of_its_change() -> None:
    promoted = Origin("7412", "shop", [0, 100], [1, 2])
    found = [promoted.identity(seq, "insert", "0/1", 0) for seq in (5, 99, 100, 101)]
    assert found == ["7412/1/0/1/0", "7412/1/0/1/0", "7412/2/0/1/0", "7412/2/0/1/0"]


@pytest.mark.parametrize(
    ("data", "op"),
    [(INSERT, "insert"), ('{\n  "op" : "message", "record": 1}', "message"), ('{"a":1}', "message")],
)
def test_the_operation_is_found_in_the_text(data: str, op: str) -> None:
    assert op_of(data) == op


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_document_in_one_line_is_the_same_document(value: Any) -> None:
    text = json.dumps(value, indent=2)
    assert "\n" not in in_one_line(text) and json.loads(in_one_line(text)) == value


# masks


@pytest.mark.parametrize(
    ("how", "email"),
    [("null", None), ("last4", "mple"), ("hash", hashlib.sha256(b"a@b.example").hexdigest()[:32])],
)
def test_a_mask_hides_a_column_and_nothing_else(how: str, email: str | None) -> None:
    found = masked(INSERT, {"email": how, "phone": "hash"})
    assert json.loads(found)["record"] == {"id": 7, "total": 12345678901234567890.10, "email": email}
    assert "12345678901234567890.10" in found and "a@b" not in found


@given(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=5),
    st.sampled_from(["hash", "null", "last4"]),
)
def test_a_mask_hides_old_values_too_and_the_rest_stays(values: dict[str, Any], how: str) -> None:
    values["secret"] = "a secret of some length"
    data = json.dumps({"op": "update", "record": values, "old": values, "unchanged": []})
    found = masked(data, {"secret": how})
    assert "a secret of some" not in found
    for part in ("record", "old"):
        hidden = json.loads(found)[part]
        assert {**hidden, "secret": ""} == {**values, "secret": ""}


def test_a_short_value_is_not_shown_by_its_last_four_characters() -> None:
    assert json.loads(masked('{"op":"insert","record":{"pin":"1234"}}', {"pin": "last4"}))["record"] == {"pin": "****"}


# transform


def test_a_transform_gives_the_body() -> None:
    assert body(row(), sink={"transform": "{'id': record.id, 'kind': op + '!'}"}) == {"id": 7, "kind": "insert!"}


def test_a_transform_sees_only_masked_values() -> None:
    settings = {"transform": "{'mail': record.email}", "mask": {"email": "null"}}
    assert body(row(), sink=settings) == {"mail": None}


@pytest.mark.parametrize(
    ("expression", "reason"),
    [("{'x': record.missing}", "transform failed"), ("record.id", "not a map"), ("{'x': 1 / 0}", "transform failed")],
)
def test_a_transform_that_fails_makes_a_dead_letter(expression: str, reason: str) -> None:
    found = shaped(row(), sink={"transform": expression})
    assert isinstance(found, Refused) and found.reason.startswith("sink: ") and reason in found.reason


def test_a_transform_with_an_unknown_variable_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="rekord"):
        Transform("{'x': rekord.id}")
    with pytest.raises(FilterError):
        Transform("{'x': record.nothing}").body(
            {"op": "insert", "topic": "t", "key": None, "record": {}, "old": None, "meta": {}}
        )


# destinations


def test_a_destination_is_filled_in() -> None:
    (outgoing,) = shaped(row(), sink={"path": "{source}/{schema}.{table}/{op}-{key}-{partition}-{topic}"})
    assert outgoing.destination == "shop/public.orders/insert-7-3-public.orders"


def test_a_message_without_a_key_has_no_destination_with_one() -> None:
    found = shaped(row(key=None), sink={"path": "{key}"})
    assert isinstance(found, Refused) and "no key" in found.reason


@pytest.mark.parametrize(
    ("template", "named"), [("{tabel}", "did you mean table"), ("{", "brace"), ("a}b", "brace"), ("{}", "placeholder")]
)
def test_a_bad_template_is_refused_with_its_fault(template: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Destination(template)


@given(st.text())
def test_a_template_is_refused_or_filled_in(template: str) -> None:
    try:
        made = Destination(template)
    except ValueError:
        return
    values = dict.fromkeys(("source", "schema", "table", "topic", "op", "key", "partition"), "x")
    assert "{" not in made.fill(values) and "}" not in made.fill(values)
    if made.placeholders:
        with pytest.raises(NoDestination):
            made.fill({})


# filter, columns, key


def test_a_filter_passes_messages_over() -> None:
    assert shaped(row(), filter="record.id == 8") is None
    assert shaped(row(), filter="record.id == 7") is not None


def test_a_filter_that_fails_makes_a_dead_letter() -> None:
    found = shaped(row(), filter="record.email > 3")
    assert isinstance(found, Refused) and found.reason.startswith("filter_error: ")


def test_a_message_that_is_too_large_makes_a_dead_letter() -> None:
    found = shaped(row(), max_message_bytes=20)
    assert isinstance(found, Refused) and found.reason.startswith("oversized: ")


def test_a_key_of_its_own_comes_from_the_text_of_the_row() -> None:
    assert body(row(), key=["total"])["key"] == "12345678901234567890.10"
    assert body(row(), key=["id", "email"])["key"] == '["7","a@b.example"]'


def test_only_some_columns_leave() -> None:
    shown = '{"op":"insert","record":{"id":7},"old":null,"unchanged":[]}'
    found = body(row(shown=shown), columns={"include": ["id"]}, filter="record.email != ''")
    assert found["data"]["record"] == {"id": 7}
    assert isinstance(shaped(row(shown=None), columns={"include": ["id"]}), Refused)


# formats


def test_debeziums_envelope() -> None:
    update = '{"op":"update","record":{"id":7,"n":2},"old":{"id":7,"n":1},"unchanged":["doc"]}'
    found = body(row(update), sink={"format": "debezium"})
    assert found["op"] == "u" and found["before"] == {"id": 7, "n": 1}
    assert found["after"] == {"id": 7, "n": 2, "doc": "__debezium_unavailable_value"}
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
    assert not isinstance(two, Refused)
    assert [(one.body is None, one.key, one.seq) for one in two] == [(False, "7", 5), (True, "7", 5)]
    assert len({one.id for one in two}) == 2
    assert len(shaped(row(delete), sink={"format": "debezium"})) == 1


def test_debezium_carries_a_published_message() -> None:
    data = '{"op":"message","record":{"a":1},"old":null,"unchanged":[]}'
    found = body(row(data, topic="invoices", commit_lsn=None, ordinal=None), sink={"format": "debezium"})
    assert found["op"] == "m" and found["message"]["prefix"] == "invoices"
    assert json.loads(base64.b64decode(found["message"]["content"])) == {"a": 1}


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


def test_the_trial_shows_what_is_sent() -> None:
    (outgoing,) = shaped(row())
    shown = orjson.loads(orjson.dumps(as_json(outgoing)))
    assert shown["body"]["key"] == "7" and shown["destination"] == "out"
    assert shown["headers"]["cdcbridge-id"] == shown["id"] == shown["body"]["id"]
