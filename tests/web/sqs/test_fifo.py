"""Groups of a fifo queue: order, one receiver at a time, and ids against repetition."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import closing
from queue import Empty, Queue
from typing import Any

import pytest

from tests.web.sqs.conftest import bodies, refused, sqs_client


def send(sqs: Any, url: str, *messages: str, group: str | None = None) -> list[dict[str, Any]]:
    """Send messages whose first letter is the group, for example a1."""
    return [
        sqs.send_message(QueueUrl=url, MessageBody=one, MessageGroupId=group or one[0], MessageDeduplicationId=one)
        for one in messages
    ]


def receive(sqs: Any, url: str, most: int = 10, **named: Any) -> list[dict[str, Any]]:
    answer = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=most, AttributeNames=["All"], **named)
    found: list[dict[str, Any]] = answer.get("Messages", [])
    return found


def texts(sqs: Any, url: str, most: int = 10, **named: Any) -> list[str]:
    return [one["Body"] for one in receive(sqs, url, most, **named)]


def delete(sqs: Any, url: str, *messages: dict[str, Any]) -> None:
    for one in messages:
        sqs.delete_message(QueueUrl=url, ReceiptHandle=one["ReceiptHandle"])


def test_messages_of_a_group_are_in_order(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "b1", "a2", "a3", "b2")
    found = receive(sqs, search)
    assert [(one["Body"], one["Attributes"]["MessageGroupId"]) for one in found] == [
        ("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b")
    ]  # fmt: skip
    assert all(one["Attributes"]["MessageDeduplicationId"] == one["Body"] for one in found)


def test_a_group_has_one_receiver_at_a_time(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2", "b1", "a3")
    (first,) = receive(sqs, search, 1)
    assert first["Body"] == "a1"
    assert texts(sqs, search) == ["b1"], "group a is in flight"
    delete(sqs, search, first)
    second = receive(sqs, search, 1)
    assert bodies({"Messages": second}) == ["a2"]
    assert texts(sqs, search) == []
    delete(sqs, search, *second)
    assert texts(sqs, search) == ["a3"]


def test_a_group_waits_for_all_messages_of_a_call(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2", "a3")
    first, second = receive(sqs, search, 2)
    delete(sqs, search, first)
    assert texts(sqs, search) == []
    delete(sqs, search, second)
    assert texts(sqs, search) == ["a3"]


def test_messages_are_in_order_after_their_timeout(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2")
    assert texts(sqs, search, VisibilityTimeout=1) == ["a1", "a2"]
    again = receive(sqs, search, WaitTimeSeconds=10)
    assert [one["Body"] for one in again] == ["a1", "a2"]
    assert {one["Attributes"]["ApproximateReceiveCount"] for one in again} == {"2"}


def test_a_message_that_is_given_back_is_first(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2", "a3")
    (first,) = receive(sqs, search, 1)
    sqs.change_message_visibility(QueueUrl=search, ReceiptHandle=first["ReceiptHandle"], VisibilityTimeout=0)
    assert texts(sqs, search) == ["a1", "a2", "a3"]


def test_the_messages_of_a_call_become_visible_together(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2", "b1")
    first, second, _ = receive(sqs, search)
    handle = {"QueueUrl": search, "ReceiptHandle": second["ReceiptHandle"]}
    sqs.change_message_visibility(**handle, VisibilityTimeout=0)
    assert texts(sqs, search) == ["a1", "a2"], "and the group b is still in flight"
    told = refused("InvalidParameterValue", sqs.delete_message, QueueUrl=search, ReceiptHandle=first["ReceiptHandle"])
    assert "has expired" in told


def test_a_group_is_held_for_longer(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2")
    (first,) = receive(sqs, search, 1, VisibilityTimeout=6)
    sqs.change_message_visibility(QueueUrl=search, ReceiptHandle=first["ReceiptHandle"], VisibilityTimeout=60)
    assert texts(sqs, search, WaitTimeSeconds=8) == []
    delete(sqs, search, first)
    assert texts(sqs, search) == ["a2"]


def test_timeout_zero(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2")
    assert texts(sqs, search, 1, VisibilityTimeout=0) == ["a1"]
    assert texts(sqs, search) == ["a1", "a2"]


def test_an_expired_receipt_deletes_nothing(sqs: Any, search: str) -> None:
    send(sqs, search, "a1")
    (first,) = receive(sqs, search, VisibilityTimeout=1)
    time.sleep(1.5)
    handle = first["ReceiptHandle"]
    told = refused("InvalidParameterValue", sqs.delete_message, QueueUrl=search, ReceiptHandle=handle)
    assert "has expired" in told
    answer = sqs.delete_message_batch(QueueUrl=search, Entries=[{"Id": "1", "ReceiptHandle": handle}])
    assert [one["Code"] for one in answer["Failed"]] == ["InvalidParameterValue"] and not answer.get("Successful")
    (again,) = receive(sqs, search)
    delete(sqs, search, again)
    delete(sqs, search, again)  # it is deleted, and stays deleted
    assert texts(sqs, search) == []


def test_sequence_numbers_increase(sqs: Any, search: str) -> None:
    sent = [one["SequenceNumber"] for one in send(sqs, search, "a1", "a2", "b1")]
    assert sent == sorted(sent) and len(set(sent)) == 3 and {len(one) for one in sent} == {20}
    received = {one["Body"]: one["Attributes"]["SequenceNumber"] for one in receive(sqs, search)}
    assert [received["a1"], received["a2"], received["b1"]] == sent


def test_a_repeated_id_adds_nothing(sqs: Any, search: str) -> None:
    (first,) = send(sqs, search, "a1")
    delete(sqs, search, *receive(sqs, search))
    again = sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId="b", MessageDeduplicationId="a1")
    assert (again["MessageId"], again["SequenceNumber"]) == (first["MessageId"], first["SequenceNumber"])
    assert texts(sqs, search) == []


def test_without_an_id_the_body_is_compared(sqs: Any, search: str) -> None:
    sent = [sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId=group) for group in "aab"]
    assert len({one["MessageId"] for one in sent}) == 1
    (found,) = receive(sqs, search)
    assert found["Attributes"]["MessageDeduplicationId"] == hashlib.sha256(b"x").hexdigest()
    delete(sqs, search, found)
    sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId="a")
    assert texts(sqs, search) == []
    sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId="a", MessageDeduplicationId="other")
    assert texts(sqs, search) == ["x"]


def test_a_message_wakes_one_of_three_receivers(sqs: Any, search: str, url: str) -> None:
    arrived: Queue[dict[str, Any]] = Queue()

    def poll() -> None:
        with closing(sqs_client(url)) as other:
            for one in receive(other, search, 1, WaitTimeSeconds=20):
                arrived.put(one)

    polls = [threading.Thread(target=poll) for _ in range(3)]
    for one in polls:
        one.start()
    send(sqs, search, "a1")
    first = arrived.get(timeout=10)
    send(sqs, search, "a2")
    with pytest.raises(Empty):
        arrived.get(timeout=2)
    delete(sqs, search, first)
    second = arrived.get(timeout=10)
    assert (first["Body"], second["Body"]) == ("a1", "a2")
    send(sqs, search, "b1")
    assert arrived.get(timeout=10)["Body"] == "b1"
    for one in polls:
        one.join(30)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("MissingParameter", {"MessageDeduplicationId": "1"}),
        ("InvalidParameterValue", {"MessageGroupId": "a", "MessageDeduplicationId": "1", "DelaySeconds": 2}),
        ("InvalidParameterValue", {"MessageGroupId": "ä", "MessageDeduplicationId": "1"}),
        ("InvalidParameterValue", {"MessageGroupId": "a", "MessageDeduplicationId": ""}),
    ],
)
def test_a_message_that_a_fifo_queue_refuses(sqs: Any, search: str, code: str, named: dict[str, Any]) -> None:
    refused(code, sqs.send_message, QueueUrl=search, MessageBody="x", **named)
    answer = sqs.send_message_batch(QueueUrl=search, Entries=[{"Id": "1", "MessageBody": "x", **named}])
    assert [one["Code"] for one in answer["Failed"]] == [code]


def test_a_delay_of_zero_is_none(sqs: Any, search: str) -> None:
    sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId="a", MessageDeduplicationId="1", DelaySeconds=0)
    assert texts(sqs, search) == ["x"]


def test_a_fifo_queue_has_two_names(sqs: Any, search: str) -> None:
    plain = sqs.get_queue_url(QueueName="search")["QueueUrl"]
    assert search.endswith("/search.fifo") and plain.endswith("/search")
    send(sqs, plain, "a1")
    (found,) = receive(sqs, search)
    delete(sqs, plain, found)
    for url, dead in ((plain, "search-dead"), (search, "search-dead.fifo")):
        shown = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        assert shown["FifoQueue"] == "true" and f':{dead}"' in shown["RedrivePolicy"]
        assert sqs.get_queue_url(QueueName=dead)["QueueUrl"].endswith(f"/{dead}")
    refused("AWS.SimpleQueueService.NonExistentQueue", sqs.get_queue_url, QueueName="billing.fifo")


def test_messages_not_visible_are_counted(sqs: Any, search: str) -> None:
    send(sqs, search, "a1", "a2", "a3")
    receive(sqs, search, 2)
    shown = sqs.get_queue_attributes(QueueUrl=search, AttributeNames=["ApproximateNumberOfMessages",
                                     "ApproximateNumberOfMessagesNotVisible"])["Attributes"]  # fmt: skip
    assert shown == {"ApproximateNumberOfMessages": "1", "ApproximateNumberOfMessagesNotVisible": "2"}
