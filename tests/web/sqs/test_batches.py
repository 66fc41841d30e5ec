"""Batches: an entry that is wrong fails alone, and a batch that is wrong fails as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from tests.harness.world import World
from tests.web.sqs.conftest import refused, sqs_client

OLD = "AWS.SimpleQueueService."


def send(sqs: Any, url: str, *entries: dict[str, Any]) -> Any:
    return sqs.send_message_batch(
        QueueUrl=url, Entries=[{"Id": str(n), "MessageBody": "x", **entry} for n, entry in enumerate(entries)]
    )


def receive(sqs: Any, url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", [])
    return found


def test_messages_are_sent_received_and_deleted(sqs: Any, billing: str) -> None:
    sent = send(sqs, billing, *({"MessageBody": str(n)} for n in range(10)))
    assert not sent.get("Failed") and [one["Id"] for one in sent["Successful"]] == [str(n) for n in range(10)]
    found = receive(sqs, billing)
    assert [one["Body"] for one in found] == [str(n) for n in range(10)]
    assert [one["MessageId"] for one in found] == [one["MessageId"] for one in sent["Successful"]]
    entries = [{"Id": str(n), "ReceiptHandle": one["ReceiptHandle"]} for n, one in enumerate(found)]
    changes = [{**entry, "VisibilityTimeout": 100 + n} for n, entry in enumerate(entries)]
    assert len(sqs.change_message_visibility_batch(QueueUrl=billing, Entries=changes)["Successful"]) == 10
    assert len(sqs.delete_message_batch(QueueUrl=billing, Entries=entries)["Successful"]) == 10
    shown = sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=["All"])["Attributes"]
    assert shown["ApproximateNumberOfMessages"] == shown["ApproximateNumberOfMessagesNotVisible"] == "0"


def in_both_orders(url: str, call: Callable[[Any, list[dict[str, Any]]], Any], rounds: list[list[Any]]) -> None:
    """Call with the entries of each round, and at the same time with the same entries from the end."""
    start = threading.Barrier(2, timeout=60)

    def worker(step: int) -> list[Any]:
        with closing(sqs_client(url)) as other:
            found = []
            for entries in rounds:
                start.wait()
                found.append(call(other, entries[::step]))
            return found

    with ThreadPoolExecutor(2) as threads:
        for answers in threads.map(worker, (1, -1)):
            assert all(not one.get("Failed") and len(one["Successful"]) == 10 for one in answers)


def test_batches_with_the_same_ids_do_not_wait_for_each_other_for_ever(sqs: Any, search: str, url: str) -> None:
    rounds = [
        [{"Id": str(n), "MessageBody": "x", "MessageGroupId": f"g{n}", "MessageDeduplicationId": f"{batch}-{n}"}
         for n in range(10)]
        for batch in range(60)
    ]  # fmt: skip
    in_both_orders(url, lambda other, entries: other.send_message_batch(QueueUrl=search, Entries=entries), rounds)
    shown = sqs.get_queue_attributes(QueueUrl=search, AttributeNames=["ApproximateNumberOfMessages"])["Attributes"]
    assert shown == {"ApproximateNumberOfMessages": "600"}


def test_a_batch_is_published_with_the_planner_settings_of_publish(search: str, world18: World) -> None:
    ((found,),) = world18.rows("select proconfig from pg_proc where proname = 'publish_batch'")
    assert {"enable_seqscan=off", "plan_cache_mode=force_generic_plan"} <= set(found)


def test_batches_of_changes_do_not_wait_for_each_other_for_ever(sqs: Any, billing: str, url: str) -> None:
    send(sqs, billing, *({} for _ in range(10)))
    handles = [sqs.receive_message(QueueUrl=billing)["Messages"][0]["ReceiptHandle"] for _ in range(10)]
    entries = [{"Id": str(n), "ReceiptHandle": one, "VisibilityTimeout": 600} for n, one in enumerate(handles)]
    in_both_orders(
        url,
        lambda other, entries: other.change_message_visibility_batch(QueueUrl=billing, Entries=entries),
        [entries] * 60,
    )


def test_an_entry_that_is_wrong_fails_alone(sqs: Any, billing: str) -> None:
    sent = send(sqs, billing, {}, {"MessageBody": "\x01"}, {"DelaySeconds": 1000}, {"MessageBody": ""}, {})
    assert [one["Id"] for one in sent["Successful"]] == ["0", "4"]
    failed = {one["Id"]: (one["Code"], one["SenderFault"]) for one in sent["Failed"]}
    assert failed == {
        "1": ("InvalidMessageContents", True),
        "2": ("InvalidParameterValue", True),
        "3": ("MissingParameter", True),
    }
    first, second = receive(sqs, billing)
    answer = sqs.delete_message_batch(
        QueueUrl=billing,
        Entries=[
            {"Id": "a", "ReceiptHandle": first["ReceiptHandle"]},
            {"Id": "b", "ReceiptHandle": "garbage"},
        ],
    )
    assert [one["Id"] for one in answer["Successful"]] == ["a"]
    assert [(one["Id"], one["Code"]) for one in answer["Failed"]] == [("b", "ReceiptHandleIsInvalid")]
    answer = sqs.change_message_visibility_batch(
        QueueUrl=billing,
        Entries=[
            {"Id": "a", "ReceiptHandle": first["ReceiptHandle"], "VisibilityTimeout": 1},
            {"Id": "b", "ReceiptHandle": second["ReceiptHandle"], "VisibilityTimeout": 43_201},
            {"Id": "c", "ReceiptHandle": second["ReceiptHandle"], "VisibilityTimeout": 0},
        ],
    )
    assert [one["Id"] for one in answer["Successful"]] == ["c"]
    assert {one["Id"]: one["Code"] for one in answer["Failed"]} == dict.fromkeys("ab", "InvalidParameterValue")
    assert [one["MessageId"] for one in receive(sqs, billing)] == [second["MessageId"]]


@pytest.mark.parametrize(
    ("code", "ids"),
    [
        ("EmptyBatchRequest", []),
        ("TooManyEntriesInBatchRequest", [str(n) for n in range(11)]),
        ("BatchEntryIdsNotDistinct", ["a", "b", "a"]),
        ("InvalidBatchEntryId", ["a b"]),
        ("InvalidBatchEntryId", [""]),
        ("InvalidBatchEntryId", ["x" * 81]),
        ("InvalidBatchEntryId", ["ä"]),
    ],
)
def test_a_batch_that_is_wrong(sqs: Any, billing: str, code: str, ids: list[str]) -> None:
    refused(
        OLD + code, sqs.send_message_batch, QueueUrl=billing, Entries=[{"Id": id_, "MessageBody": "x"} for id_ in ids]
    )
    refused(
        OLD + code,
        sqs.delete_message_batch,
        QueueUrl=billing,
        Entries=[{"Id": id_, "ReceiptHandle": "x"} for id_ in ids],
    )
    refused(
        OLD + code,
        sqs.change_message_visibility_batch,
        QueueUrl=billing,
        Entries=[{"Id": id_, "ReceiptHandle": "x", "VisibilityTimeout": 1} for id_ in ids],
    )
    assert receive(sqs, billing) == []


def test_a_batch_has_the_size_of_a_message_at_most(sqs: Any, billing: str) -> None:
    half = {"MessageBody": "x" * (1 << 19)}
    with pytest.raises(Exception, match="BatchRequestTooLong"):
        send(sqs, billing, half, half, {})
    assert len(send(sqs, billing, half)["Successful"]) == 1
    assert receive(sqs, billing)[0]["Body"] == half["MessageBody"]


def test_a_repeated_id_within_a_batch(sqs: Any, billing: str) -> None:
    sent = send(sqs, billing, *({"MessageDeduplicationId": "same"} for _ in range(3)))
    assert len({one["MessageId"] for one in sent["Successful"]}) == 1
    assert len(receive(sqs, billing)) == 1
