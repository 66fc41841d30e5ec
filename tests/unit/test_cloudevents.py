"""The SDK of CloudEvents reads the events of `format: cloudevents`, in both modes and in each binding."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings import amqp, http, kafka
from cloudevents.core.formats.json import JSONFormat

from cdcbridge.sinks.targets.http_answer import header_value
from tests.harness.shaping import row, shaped

KEYS = ["7", 'ä "b" 100%', "a\tb"]


def from_http(outgoing: Any) -> BaseCloudEvent:
    headers = {name: header_value(value) for name, value in outgoing.headers.items()}
    return http.from_http_event(http.HTTPMessage(headers, outgoing.body))


def from_kafka(outgoing: Any) -> BaseCloudEvent:
    headers = {name: value.encode() for name, value in outgoing.headers.items()}
    return kafka.from_kafka_event(kafka.KafkaMessage(headers, outgoing.key, outgoing.body))


def from_amqp(outgoing: Any) -> BaseCloudEvent:
    properties = {"content-type": outgoing.headers["content-type"]}
    return amqp.from_amqp_event(amqp.AMQPMessage(properties, dict(outgoing.headers), outgoing.body))


READERS = {"ce-": from_http, "ce_": from_kafka, "cloudEvents_": from_amqp}


@pytest.mark.parametrize("prefix", READERS)
@pytest.mark.parametrize("mode", ["structured", "binary"])
@pytest.mark.parametrize("key", KEYS)
def test_the_sdk_reads_the_event(prefix: str, mode: str, key: str) -> None:
    sink = {"format": "cloudevents", "content_mode": mode}
    (outgoing,) = shaped(row(key=key), prefix=prefix, sink=sink)
    event = READERS[prefix](outgoing)
    assert (event.get_specversion(), event.get_id()) == ("1.0", "7412/1/0/16B3748/2")
    assert (event.get_type(), event.get_source()) == ("public.orders.insert", "/cdcbridge/shop")
    assert event.get_subject() == event.get_extension("partitionkey") == key
    assert event.get_time() == datetime(2026, 5, 1, 10, 0, 0, 123456, tzinfo=UTC)
    assert event.get_datacontenttype() == "application/json" and event.get_extension("sequence") == "5"
    data = event.get_data()
    assert isinstance(data, dict) and data["record"]["id"] == 7


def test_the_sdk_reads_a_published_message_without_a_key() -> None:
    published = row('{"op":"message","record":{"a":1},"old":null,"unchanged":[]}', topic="invoices", key=None)
    for key in (None, ""):
        (outgoing,) = shaped(published._replace(key=key), sink={"format": "cloudevents"})
        event = JSONFormat().read(None, outgoing.body)
        assert event.get_subject() is None and event.get_type() == "invoices.message"
