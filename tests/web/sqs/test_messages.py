"""Send, receive, delete and keep messages with boto3 against a real process and a real store."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from contextlib import closing
from typing import Any

import pytest
from botocore.exceptions import ReadTimeoutError

from tests.harness.world import World, eventually
from tests.web.conftest import ADMIN, client
from tests.web.sqs.conftest import refused, serving_sqs, sqs_client

NUMBER = {"n": {"DataType": "Number", "StringValue": "1"}}


def receive(sqs: Any, url: str, **named: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sqs.receive_message(QueueUrl=url, **named).get("Messages", [])
    return found


def one(sqs: Any, url: str, **named: Any) -> dict[str, Any]:
    (found,) = receive(sqs, url, WaitTimeSeconds=20, **named)
    return found


@pytest.mark.parametrize(
    "body",
    [
        "hello",
        "äöü € 🐘",
        "line\r\nline\ttab",
        '"a JSON string"',
        "17",
        "null",
        '{"id": 1,  "n": 12345678901234567890.10, "id": 2}',
        ' {"id": 1} ',
        "[1, 2, 3]",
        "{not JSON}",
        "<a>&amp;</a>",
        "\\u0000",
        '{"text": "\\u0000 \\ud800"}',
        ',"old":null,"unchanged":[],"sqs":{}}',
        '{"x": ",\\"old\\":null,\\"unchanged\\":[],\\"sqs\\":"}',
    ],
)
def test_a_body_arrives_as_it_was_sent(sqs: Any, billing: str, body: str) -> None:
    sent = sqs.send_message(QueueUrl=billing, MessageBody=body)
    found = one(sqs, billing)
    assert found["Body"] == body and found["MessageId"] == sent["MessageId"]
    assert found["MD5OfBody"] == sent["MD5OfMessageBody"] == hashlib.md5(body.encode()).hexdigest()
    sqs.delete_message(QueueUrl=billing, ReceiptHandle=found["ReceiptHandle"])
    assert receive(sqs, billing) == []


def test_a_json_body_is_the_record_of_the_message(sqs: Any, billing: str, world18: World) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody='{"id": 42}')
    sqs.send_message(QueueUrl=billing, MessageBody="hello")
    rows = [data for (data,) in world18.rows("select data from cdcbridge.messages order by seq")]
    assert [row["record"] for row in rows] == [{"id": 42}, "hello"]
    assert {row["op"] for row in rows} == {"message"}


def test_a_message_that_sql_published_is_its_data(sqs: Any, billing: str, world18: World) -> None:
    world18.execute("""select cdcbridge.publish('t', 'k', '{"id": 42}')""")
    found = one(sqs, billing, AttributeNames=["All"], MessageAttributeNames=["All"])
    assert json.loads(found["Body"]) == {"op": "message", "record": {"id": 42}, "old": None, "unchanged": []}
    assert found["Attributes"]["MessageGroupId"] == "k"
    assert found["MessageAttributes"] == {
        "topic": {"DataType": "String", "StringValue": "t"},
        "op": {"DataType": "String", "StringValue": "message"},
        "seq": {"DataType": "Number", "StringValue": "1"},
    }


def test_a_change_is_its_data(sqs: Any, world18: World) -> None:
    queue = sqs.get_queue_url(QueueName="tables")["QueueUrl"]
    with world18.bridge():
        world18.execute("insert into orders values (7, 12.50)")
        found = one(sqs, queue, AttributeNames=["All"], MessageAttributeNames=["topic", "op", "seq", "commit_lsn"])
    assert json.loads(found["Body"])["record"] == {"id": 7, "total": 12.5} and "12.50" in found["Body"]
    attributes = {name: value["StringValue"] for name, value in found["MessageAttributes"].items()}
    assert attributes["topic"] == "public.orders" and attributes["op"] == "insert"
    assert attributes["seq"] == "1" and "/" in attributes["commit_lsn"]
    told = refused("AWS.SimpleQueueService.UnsupportedOperation", sqs.send_message, QueueUrl=queue, MessageBody="x")
    assert "topics" in told


def test_attributes_of_a_message_come_back(sqs: Any, billing: str) -> None:
    attributes = {
        **NUMBER,
        "text": {"DataType": "String.custom", "StringValue": "ä\n"},
        "bytes": {"DataType": "Binary", "BinaryValue": b"\x00\xff"},
    }
    trace = {"AWSTraceHeader": {"DataType": "String", "StringValue": "Root=1-5759e988"}}
    sent = sqs.send_message(
        QueueUrl=billing, MessageBody="x", MessageAttributes=attributes, MessageSystemAttributes=trace
    )
    found = one(sqs, billing, MessageAttributeNames=["All"], AttributeNames=["All"])
    assert found["MessageAttributes"] == attributes
    assert found["MD5OfMessageAttributes"] == sent["MD5OfMessageAttributes"]
    assert found["Attributes"]["AWSTraceHeader"] == "Root=1-5759e988" and sent["MD5OfMessageSystemAttributes"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["All"], {"a.b", "a.c", "d"}),
        ([".*"], {"a.b", "a.c", "d"}),
        (["a.*"], {"a.b", "a.c"}),
        (["d", "topic"], {"d", "topic"}),
        (["none"], set()),
        ([], set()),
    ],
)
def test_only_the_attributes_that_were_asked_for(sqs: Any, billing: str, names: list[str], expected: set[str]) -> None:
    value = {"DataType": "String", "StringValue": "x"}
    sqs.send_message(QueueUrl=billing, MessageBody="x", MessageAttributes=dict.fromkeys(("a.b", "a.c", "d"), value))
    found = one(sqs, billing, MessageAttributeNames=names)
    assert set(found.get("MessageAttributes", ())) == expected
    assert ("MD5OfMessageAttributes" in found) == bool(expected)


def test_system_attributes(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    before = time.time() * 1000
    found = one(sqs, billing, AttributeNames=["SentTimestamp"], MessageSystemAttributeNames=["ApproximateReceiveCount"])
    assert found["Attributes"].keys() == {"SentTimestamp", "ApproximateReceiveCount"}
    assert found["Attributes"]["ApproximateReceiveCount"] == "1"
    assert before - 60_000 < int(found["Attributes"]["SentTimestamp"]) < before + 60_000
    sqs.change_message_visibility(QueueUrl=billing, ReceiptHandle=found["ReceiptHandle"], VisibilityTimeout=0)
    again = one(sqs, billing, AttributeNames=["All"])
    assert again["Attributes"]["ApproximateReceiveCount"] == "2"
    assert again["Attributes"]["ApproximateFirstReceiveTimestamp"].isdecimal() and again["Attributes"]["SenderId"]
    refused("InvalidAttributeName", sqs.receive_message, QueueUrl=billing, AttributeNames=["Foo"])


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("MissingParameter", {"MessageBody": ""}),
        ("InvalidMessageContents", {"MessageBody": "a\x01"}),
        ("InvalidMessageContents", {"MessageBody": "a\ufffe"}),
        ("InvalidParameterValue", {"DelaySeconds": 901}),
        ("InvalidParameterValue", {"DelaySeconds": -1}),
        ("InvalidParameterValue", {"MessageGroupId": "a b"}),
        ("InvalidParameterValue", {"MessageDeduplicationId": "x" * 129}),
        ("InvalidParameterValue", {"MessageAttributes": {"a": {"DataType": "String", "StringValue": ""}}}),
        ("InvalidParameterValue", {"MessageAttributes": {"a": {"DataType": "String", "StringValue": "\x01"}}}),
        ("InvalidParameterValue", {"MessageAttributes": {"a": {"DataType": "Number", "StringValue": "one"}}}),
        ("InvalidParameterValue", {"MessageAttributes": {"a": {"DataType": "", "StringValue": "x"}}}),
        ("InvalidParameterValue", {"MessageAttributes": {"a": {"DataType": "Float", "StringValue": "1"}}}),
        ("InvalidParameterValue", {"MessageAttributes": {"a": {"DataType": "Binary", "StringValue": "1"}}}),
        ("InvalidParameterValue", {"MessageAttributes": {"AWS.a": NUMBER["n"]}}),
        ("InvalidParameterValue", {"MessageAttributes": {"a..b": NUMBER["n"]}}),
        ("InvalidParameterValue", {"MessageAttributes": {".a": NUMBER["n"]}}),
        ("InvalidParameterValue", {"MessageAttributes": {"a b": NUMBER["n"]}}),
        ("InvalidParameterValue", {"MessageAttributes": {f"a{n}": NUMBER["n"] for n in range(11)}}),
        ("InvalidParameterValue", {"MessageSystemAttributes": {"Other": NUMBER["n"]}}),
        ("InvalidParameterValue", {"MessageBody": "x" * (1 << 20)}),
    ],
)
def test_a_message_that_sqs_would_refuse(sqs: Any, billing: str, code: str, named: dict[str, Any]) -> None:
    refused(code, sqs.send_message, **{"QueueUrl": billing, "MessageBody": "x", **named})
    assert receive(sqs, billing) == []


@pytest.mark.parametrize(
    "named",
    [
        {"MaxNumberOfMessages": 0},
        {"MaxNumberOfMessages": 11},
        {"WaitTimeSeconds": 21},
        {"WaitTimeSeconds": -1},
        {"VisibilityTimeout": 43_201},
        {"VisibilityTimeout": -1},
    ],
)
def test_limits_of_receive(sqs: Any, billing: str, named: dict[str, int]) -> None:
    told = refused("InvalidParameterValue", sqs.receive_message, QueueUrl=billing, **named)
    assert str(next(iter(named.values()))) in told


def test_ten_messages_at_most(sqs: Any, billing: str) -> None:
    for _ in range(2):
        sqs.send_message_batch(QueueUrl=billing, Entries=[{"Id": str(n), "MessageBody": str(n)} for n in range(8)])
    assert len(receive(sqs, billing)) == 1
    assert len(receive(sqs, billing, MaxNumberOfMessages=10)) == 10
    assert len(receive(sqs, billing, MaxNumberOfMessages=10)) == 5


def test_an_answer_is_bounded_and_the_rest_is_given_back(world18: World) -> None:
    with serving_sqs(world18, max_answer="1kB") as url, closing(sqs_client(url)) as sqs:
        billing = sqs.get_queue_url(QueueName="billing")["QueueUrl"]
        for _ in range(3):
            sqs.send_message(QueueUrl=billing, MessageBody="x" * 700)
        for _ in range(3):
            (found,) = receive(sqs, billing, MaxNumberOfMessages=10, AttributeNames=["All"])
            assert found["Attributes"]["ApproximateReceiveCount"] == "1"
            sqs.delete_message(QueueUrl=billing, ReceiptHandle=found["ReceiptHandle"])
        assert receive(sqs, billing) == []


def test_a_long_poll_is_woken_by_the_message(sqs: Any, billing: str, url: str, world18: World) -> None:
    found: list[Any] = []
    with closing(sqs_client(url)) as other:
        poll = threading.Thread(
            target=lambda: found.extend([receive(other, billing, WaitTimeSeconds=20), time.monotonic()])
        )
        poll.start()
        eventually(lambda: "next_visible" in str(world18.rows("select query from pg_stat_activity")), "it waits")
        sent = time.monotonic()
        sqs.send_message(QueueUrl=billing, MessageBody="x")
        poll.join(30)
    assert [message["Body"] for message in found[0]] == ["x"] and found[1] - sent < 3


def test_a_long_poll_ends_with_the_process(world18: World) -> None:
    found: list[Any] = []
    with serving_sqs(world18) as url, closing(sqs_client(url)) as sqs:
        queue = sqs.get_queue_url(QueueName="billing")["QueueUrl"]
        poll = threading.Thread(
            target=lambda: found.append(sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=20).get("Messages"))
        )
        poll.start()
        eventually(lambda: "next_visible" in str(world18.rows("select query from pg_stat_activity")), "it waits")
        began = time.monotonic()
        world18._processes[-1].terminate()
        poll.join(30)
    # The end of the block has checked that the process exits with 0.
    assert found == [None] and time.monotonic() - began < 15


def test_an_empty_queue_is_waited_for(sqs: Any, billing: str) -> None:
    began = time.monotonic()
    assert receive(sqs, billing, WaitTimeSeconds=1) == []
    assert time.monotonic() - began >= 1
    began = time.monotonic()
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    assert len(receive(sqs, billing, WaitTimeSeconds=20, MaxNumberOfMessages=10)) == 1
    assert time.monotonic() - began < 10, "it does not wait for a second message"


def test_a_caller_that_disconnects_gives_its_messages_back(sqs: Any, billing: str, url: str) -> None:
    with closing(sqs_client(url, read_timeout=1)) as impatient, pytest.raises(ReadTimeoutError):
        receive(impatient, billing, WaitTimeSeconds=20)
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    found = one(sqs, billing, AttributeNames=["ApproximateReceiveCount"])
    assert found["Attributes"]["ApproximateReceiveCount"] == "1"


def test_a_message_is_invisible_for_its_timeout(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    first = one(sqs, billing, VisibilityTimeout=5)
    assert receive(sqs, billing) == []
    second = one(sqs, billing)
    assert second["MessageId"] == first["MessageId"] and second["ReceiptHandle"] != first["ReceiptHandle"]


def test_a_message_with_timeout_zero_is_visible_at_once(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    one(sqs, billing, VisibilityTimeout=0)
    assert one(sqs, billing)["Body"] == "x"


def test_the_visibility_is_changed(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    found = one(sqs, billing, VisibilityTimeout=6)
    handle = {"QueueUrl": billing, "ReceiptHandle": found["ReceiptHandle"]}
    sqs.change_message_visibility(**handle, VisibilityTimeout=60)
    assert receive(sqs, billing, WaitTimeSeconds=8) == []
    sqs.change_message_visibility(**handle, VisibilityTimeout=0)
    assert one(sqs, billing)["MessageId"] == found["MessageId"]
    refused("InvalidParameterValue", sqs.change_message_visibility, **handle, VisibilityTimeout=43_201)


def test_the_visibility_is_changed_after_the_timeout(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    found = one(sqs, billing, VisibilityTimeout=0)
    handle = {"QueueUrl": billing, "ReceiptHandle": found["ReceiptHandle"]}
    sqs.change_message_visibility(**handle, VisibilityTimeout=60)
    assert receive(sqs, billing, WaitTimeSeconds=1) == []
    sqs.change_message_visibility(**handle, VisibilityTimeout=0)
    assert one(sqs, billing)["Body"] == "x"


def test_the_visibility_of_a_message_with_an_old_receipt(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    found = one(sqs, billing, VisibilityTimeout=0)
    again = one(sqs, billing)
    handle = {"QueueUrl": billing, "ReceiptHandle": found["ReceiptHandle"], "VisibilityTimeout": 30}
    refused("AWS.SimpleQueueService.MessageNotInflight", sqs.change_message_visibility, **handle)
    sqs.delete_message(QueueUrl=billing, ReceiptHandle=again["ReceiptHandle"])
    told = refused("InvalidParameterValue", sqs.change_message_visibility, **handle)
    assert "does not exist or is not available" in told


def test_a_message_is_deleted_after_its_timeout(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    found = one(sqs, billing, VisibilityTimeout=1)
    time.sleep(1.5)
    sqs.delete_message(QueueUrl=billing, ReceiptHandle=found["ReceiptHandle"])
    assert receive(sqs, billing, WaitTimeSeconds=1) == []
    sqs.delete_message(QueueUrl=billing, ReceiptHandle=found["ReceiptHandle"])  # again, which is no error


def test_an_old_receipt_does_not_delete_a_newer_delivery(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    old = one(sqs, billing, VisibilityTimeout=0)
    new = one(sqs, billing)
    sqs.delete_message(QueueUrl=billing, ReceiptHandle=old["ReceiptHandle"])
    sqs.change_message_visibility(QueueUrl=billing, ReceiptHandle=new["ReceiptHandle"], VisibilityTimeout=60)


@pytest.mark.parametrize("handle", ["garbage", "cTpiaWxsaW5nOjE=", "ZjpzZWFyY2g6MS0x", "ü"])
def test_a_receipt_handle_that_is_none(sqs: Any, billing: str, handle: str) -> None:
    for call, more in ((sqs.delete_message, {}), (sqs.change_message_visibility, {"VisibilityTimeout": 1})):
        told = refused("ReceiptHandleIsInvalid", call, QueueUrl=billing, ReceiptHandle=handle, **more)
        assert handle in told


def test_a_delayed_message(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x", DelaySeconds=2)
    assert receive(sqs, billing) == []
    counts = sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=["All"])["Attributes"]
    assert counts["ApproximateNumberOfMessagesDelayed"] == "1" and counts["ApproximateNumberOfMessages"] == "0"
    began = time.monotonic()
    assert receive(sqs, billing, WaitTimeSeconds=15)[0]["Body"] == "x"
    assert time.monotonic() - began < 10, "the delay ends, and wakes the poll"


def test_a_repeated_message_is_not_sent_again(sqs: Any, billing: str) -> None:
    first, second = (
        sqs.send_message(QueueUrl=billing, MessageBody="x", MessageDeduplicationId="same") for _ in range(2)
    )
    assert first["MessageId"] == second["MessageId"]
    assert len(receive(sqs, billing, MaxNumberOfMessages=10)) == 1


def test_two_clients_see_one_queue(sqs: Any, billing: str, url: str) -> None:
    """A message that is sent with SQS is received with REST."""
    sqs.send_message(QueueUrl=billing, MessageBody='{"id": 1}', MessageAttributes=NUMBER)
    with client(url, ADMIN) as http:
        (found,) = http.post("/api/consumers/billing/receive", json={}).json()["messages"]
    assert found["data"]["record"] == {"id": 1}
    assert found["data"]["sqs"] == {"attributes": NUMBER}
