"""Names, attributes, dead letters, and emptying of queues."""

from __future__ import annotations

import json
import threading
import time
from contextlib import closing
from typing import Any

import psycopg
import pytest

from tests.harness.world import World, eventually
from tests.web.sqs.conftest import BILLING, REGION, VIEWER, refused, serving_sqs, sqs_client

OLD = "AWS.SimpleQueueService."
ALL = ["All"]
ARN = f"arn:aws:sqs:{REGION}:000000000000:"


def receive(sqs: Any, url: str, **named: Any) -> list[dict[str, Any]]:
    answer = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, AttributeNames=ALL, **named)
    found: list[dict[str, Any]] = answer.get("Messages", [])
    return found


def names(answer: dict[str, Any]) -> list[str]:
    return [url.rpartition("/")[2] for url in answer.get("QueueUrls", [])]


def dead(sqs: Any, billing: str, *messages: str) -> str:
    """The URL of the dead letters, after these messages died, and those that waited."""
    for one in messages:
        sqs.send_message(QueueUrl=billing, MessageBody=one)
    for _ in range(2):
        assert receive(sqs, billing, VisibilityTimeout=0)
    assert receive(sqs, billing) == []
    return str(sqs.get_queue_url(QueueName="billing-dead")["QueueUrl"])


def test_queues_are_listed(sqs: Any, url: str) -> None:
    every = ["billing", "billing-dead", "search", "search-dead", "tables", "tables-dead"]
    assert names(sqs.list_queues()) == every
    assert names(sqs.list_queues(QueueNamePrefix="billing")) == every[:2]
    assert "QueueUrls" not in sqs.list_queues(QueueNamePrefix="none")
    pages = sqs.get_paginator("list_queues").paginate(PaginationConfig={"PageSize": 4})
    assert [names(page) for page in pages] == [every[:4], every[4:]]
    refused("InvalidParameterValue", sqs.list_queues, MaxResults=1001)
    with closing(sqs_client(url, BILLING)) as other:
        assert names(other.list_queues()) == every[:2]


def test_a_queue_that_does_not_exist(sqs: Any, billing: str) -> None:
    with pytest.raises(sqs.exceptions.QueueDoesNotExist):
        sqs.get_queue_url(QueueName="none")
    for name in ("none", "none-dead", "billing-dead-dead", "billing.fifo"):
        url = billing.replace("/billing", f"/{name}")
        refused(f"{OLD}NonExistentQueue", sqs.receive_message, QueueUrl=url)
        refused(f"{OLD}NonExistentQueue", sqs.send_message, QueueUrl=url, MessageBody="x")
    told = refused(f"{OLD}NonExistentQueue", sqs.get_queue_url, QueueName="audit")
    assert "is a stream" in told


def test_a_queue_is_declared_and_not_created(sqs: Any, billing: str) -> None:
    assert sqs.create_queue(QueueName="billing")["QueueUrl"] == billing
    same = {"VisibilityTimeout": "30", "DelaySeconds": "0", "RedrivePolicy": json.dumps({"maxReceiveCount": "2"})}
    assert sqs.create_queue(QueueName="billing", Attributes=same, tags={"a": "b"})["QueueUrl"] == billing
    assert sqs.create_queue(QueueName="search.fifo", Attributes={"FifoQueue": "true"})["QueueUrl"]
    told = refused("QueueAlreadyExists", sqs.create_queue, QueueName="billing", Attributes={"VisibilityTimeout": "31"})
    assert "VisibilityTimeout" in told
    content_based = {"FifoQueue": "True", "ContentBasedDeduplication": "true"}
    assert sqs.create_queue(QueueName="search", Attributes=content_based)["QueueUrl"].endswith("/search")
    refused("InvalidAttributeName", sqs.create_queue, QueueName="billing", Attributes={"FifoQueue": "true"})
    refused("InvalidAttributeName", sqs.create_queue, QueueName="billing", Attributes={"Foo": "1"})
    told = refused(f"{OLD}UnsupportedOperation", sqs.create_queue, QueueName="none")
    assert "configuration file" in told
    refused(f"{OLD}UnsupportedOperation", sqs.delete_queue, QueueUrl=billing)


def test_attributes(sqs: Any, billing: str) -> None:
    assert "Attributes" not in sqs.get_queue_attributes(QueueUrl=billing)
    found = sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=ALL)["Attributes"]
    assert found["QueueArn"] == f"{ARN}billing" and found["VisibilityTimeout"] == "30"
    assert json.loads(found["RedrivePolicy"]) == {"deadLetterTargetArn": f"{ARN}billing-dead", "maxReceiveCount": 2}
    assert found["MaximumMessageSize"] == "1048576" and found["ApproximateNumberOfMessages"] == "0"
    assert abs(int(found["CreatedTimestamp"]) - time.time()) < 300 and "FifoQueue" not in found
    asked = ["QueueArn", "Policy"]
    assert sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=asked)["Attributes"] == {
        "QueueArn": f"{ARN}billing"
    }
    refused("InvalidAttributeName", sqs.get_queue_attributes, QueueUrl=billing, AttributeNames=["Foo"])
    assert sqs.list_queue_tags(QueueUrl=billing).get("Tags", {}) == {}


def test_two_attributes_can_be_changed(sqs: Any, billing: str, world18: World) -> None:
    policy = json.dumps({"deadLetterTargetArn": f"{ARN}billing-dead", "maxReceiveCount": "1"})
    sqs.set_queue_attributes(QueueUrl=billing, Attributes={"VisibilityTimeout": "1", "RedrivePolicy": policy})
    found = sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=ALL)["Attributes"]
    assert found["VisibilityTimeout"] == "1" and json.loads(found["RedrivePolicy"])["maxReceiveCount"] == 1
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    assert len(receive(sqs, billing)) == 1
    assert receive(sqs, billing, WaitTimeSeconds=3) == []
    assert sqs.get_queue_attributes(QueueUrl=f"{billing}-dead", AttributeNames=ALL)["Attributes"][
        "ApproximateNumberOfMessages"] == "1"  # fmt: skip
    world18.json("consumers", "apply", "--json")
    time.sleep(1.1)  # until the list of consumers is read again
    found = sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=ALL)["Attributes"]
    assert found["VisibilityTimeout"] == "30"


@pytest.mark.parametrize(
    ("code", "attributes"),
    [
        ("InvalidAttributeName", {"Foo": "1"}),
        ("InvalidAttributeValue", {"VisibilityTimeout": "-1"}),
        ("InvalidAttributeValue", {"VisibilityTimeout": "43201"}),
        ("InvalidAttributeValue", {"VisibilityTimeout": "x"}),
        ("InvalidAttributeValue", {"DelaySeconds": "5"}),
        ("InvalidAttributeName", {"FifoQueue": "false"}),
        ("InvalidAttributeValue", {"RedrivePolicy": "[]"}),
        ("InvalidAttributeValue", {"RedrivePolicy": '{"maxReceiveCount": "0"}'}),
        ("InvalidAttributeValue", {"RedrivePolicy": '{"deadLetterTargetArn": "arn:aws:sqs:x:1:search"}'}),
    ],
)
def test_an_attribute_that_cannot_be_changed(sqs: Any, billing: str, code: str, attributes: dict[str, str]) -> None:
    before = sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=ALL)["Attributes"]
    refused(code, sqs.set_queue_attributes, QueueUrl=billing, Attributes=attributes)
    assert sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=ALL)["Attributes"] == before
    sqs.set_queue_attributes(QueueUrl=billing, Attributes={"VisibilityTimeout": "30", "Policy": ""})


def test_the_kind_of_a_queue_cannot_be_changed(sqs: Any, search: str) -> None:
    sqs.set_queue_attributes(QueueUrl=search, Attributes={"FifoQueue": "true"})
    for other in (
        {"FifoQueue": "false"},
        {"ContentBasedDeduplication": "false"},
        {"DeduplicationScope": "messageGroup"},
    ):
        refused("InvalidAttributeValue", sqs.set_queue_attributes, QueueUrl=search, Attributes=other)


def test_dead_letters_are_a_queue(sqs: Any, billing: str) -> None:
    letters = dead(sqs, billing, "first", "second")
    assert sqs.list_dead_letter_source_queues(QueueUrl=letters)["queueUrls"] == [billing]
    assert sqs.list_dead_letter_source_queues(QueueUrl=billing)["queueUrls"] == []
    first, second = receive(sqs, letters)
    assert (first["Body"], second["Body"]) == ("first", "second")
    assert first["Attributes"]["DeadLetterQueueSourceArn"] == f"{ARN}billing"
    assert first["Attributes"]["ApproximateReceiveCount"] == "1"
    assert receive(sqs, letters) == [], "they are invisible"
    shown = sqs.get_queue_attributes(QueueUrl=letters, AttributeNames=ALL)["Attributes"]
    assert shown["ApproximateNumberOfMessagesNotVisible"] == "2" and shown["ApproximateNumberOfMessages"] == "0"
    sqs.delete_message(QueueUrl=letters, ReceiptHandle=first["ReceiptHandle"])
    handle = {"QueueUrl": letters, "ReceiptHandle": second["ReceiptHandle"]}
    sqs.change_message_visibility(**handle, VisibilityTimeout=1)
    (again,) = receive(sqs, letters, WaitTimeSeconds=10)
    assert again["Body"] == "second" and again["Attributes"]["ApproximateReceiveCount"] == "2"
    sqs.delete_message(**handle)  # an old receipt
    refused(f"{OLD}MessageNotInflight", sqs.change_message_visibility, **handle, VisibilityTimeout=1)
    refused("ReceiptHandleIsInvalid", sqs.delete_message, QueueUrl=billing, ReceiptHandle=again["ReceiptHandle"])
    entry = {"Id": "1", "ReceiptHandle": again["ReceiptHandle"]}
    assert sqs.delete_message_batch(QueueUrl=letters, Entries=[entry])["Successful"] == [{"Id": "1"}]
    assert sqs.get_queue_attributes(QueueUrl=letters, AttributeNames=ALL)["Attributes"][
        "ApproximateNumberOfMessagesNotVisible"] == "0"  # fmt: skip
    told = refused(f"{OLD}UnsupportedOperation", sqs.send_message, QueueUrl=letters, MessageBody="x")
    assert "dead letters" in told


def test_dead_letters_of_a_fifo_queue(sqs: Any, search: str) -> None:
    sent = sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId="g")
    for _ in range(3):
        assert len(receive(sqs, search, VisibilityTimeout=0)) == 1
    assert receive(sqs, search) == []
    letters = sqs.get_queue_url(QueueName="search-dead.fifo")["QueueUrl"]
    assert sqs.list_dead_letter_source_queues(QueueUrl=letters)["queueUrls"] == [search]
    (letter,) = receive(sqs, letters)
    assert letter["MessageId"] == sent["MessageId"] and letter["Attributes"]["MessageGroupId"] == "g"
    assert letter["Attributes"]["DeadLetterQueueSourceArn"] == f"{ARN}search.fifo"
    sqs.start_message_move_task(SourceArn=f"{ARN}search-dead.fifo", DestinationArn=f"{ARN}search.fifo")
    assert [one["Body"] for one in receive(sqs, search)] == ["x"]


def test_dead_letters_keep_their_attributes(sqs: Any, billing: str) -> None:
    attributes = {"n": {"DataType": "Number", "StringValue": "1"}}
    sqs.send_message(QueueUrl=billing, MessageBody="x", MessageAttributes=attributes)
    letters = dead(sqs, billing)
    found = sqs.receive_message(QueueUrl=letters, MessageAttributeNames=ALL)["Messages"][0]
    assert found["Body"] == "x" and found["MessageAttributes"] == attributes


def test_a_poll_finds_a_message_that_dies_while_it_waits(sqs: Any, billing: str, world18: World) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    letters = f"{billing}-dead"
    found: list[Any] = []
    poll = threading.Thread(target=lambda: found.extend(receive(sqs, letters, WaitTimeSeconds=20)))
    poll.start()
    eventually(lambda: "queue_settings" in str(world18.rows("select query from pg_stat_activity")), "it waits")
    dead(sqs, billing)
    poll.join(30)
    assert [one["Body"] for one in found] == ["x"]


def test_dead_letters_are_moved_back(sqs: Any, billing: str) -> None:
    letters = dead(sqs, billing, "first", "second")
    receive(sqs, letters)
    assert sqs.start_message_move_task(SourceArn=f"{ARN}billing-dead")["TaskHandle"]
    assert [one["Body"] for one in receive(sqs, billing)] == ["first", "second"]
    assert receive(sqs, letters) == []


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("InvalidParameterValue", {"SourceArn": "billing-dead"}),
        ("ResourceNotFoundException", {"SourceArn": f"{ARN}none-dead"}),
        ("InvalidParameterValue", {"SourceArn": f"{ARN}billing"}),
        (f"{OLD}UnsupportedOperation", {"SourceArn": f"{ARN}billing-dead", "DestinationArn": f"{ARN}search"}),
    ],
)
def test_a_move_that_is_refused(sqs: Any, code: str, named: dict[str, str]) -> None:
    refused(code, sqs.start_message_move_task, **named)


def test_invisible_letters_are_not_looked_at(url: str, world18: World) -> None:
    run, number = world18.sql.execute, world18.value("select id from cdcbridge.consumers where name = 'billing'")
    run(
        "insert into cdcbridge.dead_messages"
        " (consumer_id, seq, topic, data, deliver_count, reason, history, inserted_at, not_visible_until)"
        f" select {number}, n, 't', to_json(n), 3, 'no', '[]', now(), case when n <= 20000 then now() + '1 hour'"
        " when n % 1000 = 0 then now() - '1 hour'::interval when n % 1000 <> 1 then now() + '1 hour' end"
        " from generate_series(1, 30000) n"
    )
    looked = (
        "select coalesce(idx_tup_fetch, 0) + seq_tup_read from pg_stat_xact_user_tables"
        f" where relname = 'dead_messages_{number}'"
    )
    with world18.sql.transaction():
        found = run("select seq from cdcbridge_internal.read_letters('billing', 20, '1 hour')").fetchall()
        row = run(looked).fetchone()
    assert sorted(found) == [
        (n + one,) for n in range(20000, 30001, 1000) for one in (0, 1) if 20000 < n + one <= 30000
    ]
    assert row is not None and row[0] < 500, "of 30,000"
    with closing(sqs_client(url)) as sqs:
        letters = sqs.get_queue_url(QueueName="billing-dead")["QueueUrl"]
        shown = sqs.get_queue_attributes(QueueUrl=letters, AttributeNames=ALL)["Attributes"]
    assert [shown[f"ApproximateNumberOfMessages{kind}"] for kind in ("", "NotVisible", "Delayed")] == [
        "0",
        "30000",
        "0",
    ]


def test_many_messages_are_not_counted_again(sqs: Any, billing: str, world18: World) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    sample = "insert into cdcbridge_internal.samples values ('billing', now() - %s::interval, %s)"
    old = {"pending": 900_000, "in_flight": 0, "dead": 0}
    figures = {"pending": 7_000_000, "in_flight": 20, "delayed": 3, "dead": 5_000_000}
    few = {"pending": 12, "in_flight": 3, "delayed": 0, "dead": 9}
    kinds = ("", "NotVisible", "Delayed")

    def shown(name: str) -> list[str]:
        url = billing.removesuffix("billing") + name
        found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=ALL)["Attributes"]
        return [found[f"ApproximateNumberOfMessages{kind}"] for kind in kinds]

    world18.sql.execute(sample, ("10 minutes", json.dumps(old)))
    assert shown("billing") == ["1", "0", "0"], "an old sample tells nothing"
    world18.sql.execute(sample, ("20 seconds", json.dumps(figures)))
    assert shown("billing") == ["6999997", "20", "3"]
    assert shown("billing-dead") == ["5000000", "0", "0"]
    world18.sql.execute(sample, ("0 seconds", json.dumps(few)))
    assert shown("billing") == ["1", "0", "0"] and shown("billing-dead") == ["0", "0", "0"]


def test_a_move_of_very_many_letters_ends_in_time(url: str, world18: World) -> None:
    world18.sql.execute(
        "insert into cdcbridge.dead_messages"
        " (consumer_id, seq, topic, key, data, deliver_count, reason, history, inserted_at)"
        " select (select id from cdcbridge.consumers where name = 'billing'), n, 't', 'k', '{}', 3, 'no', '[]', now()"
        " from generate_series(1, 1000000) n"
    )
    left = "select count(*) from cdcbridge.dead_messages"
    with closing(sqs_client(url, read_timeout=60)) as sqs:
        told = refused("ServiceUnavailable", sqs.start_message_move_task, SourceArn=f"{ARN}billing-dead")
        assert f"{world18.value(left)} dead letters of billing are left after 15 s. Call StartMessageMoveTask" in told
    assert 0 < world18.value(left) < 1_000_000
    (details,) = world18.rows("select details from cdcbridge.audit")[0]
    assert details["redriven"] == 1_000_000 - world18.value(left) and "left after 15 s" in details["error"]


def test_dead_letters_are_purged(sqs: Any, billing: str) -> None:
    letters = dead(sqs, billing, "x")
    sqs.purge_queue(QueueUrl=letters)
    assert receive(sqs, letters) == []


def test_a_queue_is_purged(sqs: Any, billing: str, search: str) -> None:
    for n in range(3):
        sqs.send_message(QueueUrl=billing, MessageBody="x", DelaySeconds=2 if n == 2 else 0)
        sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId="g", MessageDeduplicationId=str(n))
    held = sqs.receive_message(QueueUrl=billing)["Messages"] + sqs.receive_message(QueueUrl=search)["Messages"]
    assert len(held) == 2
    for url in (billing, search):
        sqs.purge_queue(QueueUrl=url)
        shown = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=ALL)["Attributes"]
        assert [shown[f"ApproximateNumberOfMessages{kind}"] for kind in ("", "NotVisible", "Delayed")] == ["0"] * 3
        assert receive(sqs, url, WaitTimeSeconds=3) == []
    sqs.send_message(QueueUrl=search, MessageBody="new", MessageGroupId="g", MessageDeduplicationId="new")
    assert [one["Body"] for one in receive(sqs, search)] == ["new"]


def rows_left(world: World) -> int:
    """The rows of all tables that hold messages which are not finished."""
    internal = [f"cdcbridge_internal.{table}" for table in ("waiting", "delayed", "leases", "settled", "redriven")]
    counts = " + ".join(f"(select count(*) from {table})" for table in (*internal, "cdcbridge.dead_messages"))
    return int(world.rows(f"select {counts}")[0][0])


def test_a_paused_queue_is_purged(sqs: Any, billing: str, search: str, world18: World) -> None:
    for name in ("billing", "search"):
        world18.run_program("consumers", "pause", name)
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    sqs.send_message(QueueUrl=search, MessageBody="x", MessageGroupId="g")
    for url in (billing, search):
        sqs.purge_queue(QueueUrl=url)
    assert rows_left(world18) == 0


def test_messages_of_a_fifo_queue_for_later_are_purged(sqs: Any, search: str, world18: World) -> None:
    world18.execute("select cdcbridge.publish('f', 'k', '1'::json, delay => interval '1 hour')")
    sqs.purge_queue(QueueUrl=search)
    assert rows_left(world18) == 0


def test_messages_that_are_partly_settled_are_purged(sqs: Any, billing: str, world18: World) -> None:
    for _ in range(3):
        sqs.send_message(QueueUrl=billing, MessageBody="x")
    found = receive(sqs, billing)
    handle = {"QueueUrl": billing, "ReceiptHandle": found[1]["ReceiptHandle"]}
    sqs.change_message_visibility(**handle, VisibilityTimeout=600)
    sqs.delete_message(QueueUrl=billing, ReceiptHandle=found[0]["ReceiptHandle"])
    sqs.purge_queue(QueueUrl=billing)
    assert rows_left(world18) == 0
    assert world18.rows("select details ->> 'purged' from cdcbridge.audit") == [("2",)]


def test_a_purge_makes_no_dead_letter(sqs: Any, billing: str, world18: World) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    for _ in range(2):
        assert receive(sqs, billing, VisibilityTimeout=0)
    sqs.purge_queue(QueueUrl=billing)
    assert rows_left(world18) == 0


def test_redriven_messages_are_purged(sqs: Any, billing: str, world18: World) -> None:
    dead(sqs, billing, "x", "y")
    sqs.start_message_move_task(SourceArn=f"{ARN}billing-dead")
    sqs.purge_queue(QueueUrl=billing)
    assert rows_left(world18) == 0


def test_messages_that_another_session_holds_are_not_purged(sqs: Any, billing: str, world18: World) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    with psycopg.connect(world18.dsn) as other:
        other.execute("select from cdcbridge.receive('billing')")
        told = refused("AWS.SimpleQueueService.PurgeQueueInProgress", sqs.purge_queue, QueueUrl=billing)
        assert "open transaction" in told
    sqs.purge_queue(QueueUrl=billing)
    assert rows_left(world18) == 0


def test_dead_letters_that_another_session_holds_are_not_purged(sqs: Any, billing: str, world18: World) -> None:
    letters = dead(sqs, billing, "x")
    with psycopg.connect(world18.dsn) as other:
        other.execute("select from cdcbridge.dead_messages for update")
        told = refused("AWS.SimpleQueueService.PurgeQueueInProgress", sqs.purge_queue, QueueUrl=letters)
        assert "open transaction" in told
    sqs.purge_queue(QueueUrl=letters)
    assert rows_left(world18) == 0


def test_a_paused_queue_waits(sqs: Any, billing: str, world18: World) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    world18.run_program("consumers", "pause", "billing")
    assert receive(sqs, billing) == []
    world18.run_program("consumers", "resume", "billing")
    assert eventually(lambda: receive(sqs, billing))


def test_roles(sqs: Any, billing: str, url: str) -> None:
    with closing(sqs_client(url, BILLING)) as mine, closing(sqs_client(url, VIEWER)) as viewer:
        mine.send_message(QueueUrl=billing, MessageBody="x")
        (found,) = mine.receive_message(QueueUrl=billing)["Messages"]
        handle = {"QueueUrl": billing, "ReceiptHandle": found["ReceiptHandle"]}
        other = billing.replace("billing", "search")
        for told in (
            refused("AccessDenied", mine.receive_message, QueueUrl=other),
            refused("AccessDenied", mine.get_queue_url, QueueName="search"),
            refused("AccessDenied", mine.start_message_move_task, SourceArn=f"{ARN}search-dead"),
            refused("AccessDenied", mine.set_queue_attributes, QueueUrl=billing, Attributes={"VisibilityTimeout": "9"}),
            refused("AccessDenied", viewer.receive_message, QueueUrl=billing),
            refused("AccessDenied", viewer.send_message, QueueUrl=billing, MessageBody="x"),
            refused("AccessDenied", viewer.delete_message, **handle),
            refused("AccessDenied", viewer.purge_queue, QueueUrl=billing),
        ):
            assert "token" in told
        assert viewer.get_queue_attributes(QueueUrl=billing, AttributeNames=ALL)["Attributes"]
        mine.delete_message(**handle)


def test_nobody_learns_which_queues_of_others_exist(billing: str, url: str) -> None:
    with closing(sqs_client(url, BILLING)) as mine:
        told = {}
        for name in ("search", "nobody", "search-dead", "nobody-dead", "search.fifo", "nobody.fifo"):
            other = billing.replace("billing", name)
            told[name] = (
                refused("AccessDenied", mine.get_queue_url, QueueName=name),
                refused("AccessDenied", mine.receive_message, QueueUrl=other),
            )
        for ends in ("", "-dead", ".fifo"):
            assert [one.replace("search", "nobody") for one in told[f"search{ends}"]] == [*told[f"nobody{ends}"]]
        assert mine.get_queue_url(QueueName="billing-dead")["QueueUrl"]


def test_a_delete_of_a_message_that_died_is_refused(sqs: Any, billing: str) -> None:
    sqs.send_message(QueueUrl=billing, MessageBody="x")
    handles = [receive(sqs, billing, VisibilityTimeout=0)[0]["ReceiptHandle"] for _ in range(2)]
    assert receive(sqs, billing) == []  # it becomes a dead letter
    handle = {"QueueUrl": billing, "ReceiptHandle": handles[-1]}
    assert "dead letter" in refused("InvalidParameterValue", sqs.delete_message, **handle)
    entries = [{"Id": "1", "ReceiptHandle": handles[-1]}]
    answer = sqs.delete_message_batch(QueueUrl=billing, Entries=entries)
    assert [one["Code"] for one in answer["Failed"]] == ["InvalidParameterValue"] and not answer.get("Successful")
    assert [one["Body"] for one in receive(sqs, f"{billing}-dead")] == ["x"]


def test_a_timeout_of_zero_and_one_beyond_the_limit(world18: World) -> None:
    world18.store_settings = {"retention": "1h", "max_retention": "1h"}
    with serving_sqs(world18) as url, closing(sqs_client(url)) as sqs:
        world18.execute("select cdcbridge_internal.set_max_retention('1 hour')")
        billing = sqs.get_queue_url(QueueName="billing")["QueueUrl"]
        long = {"QueueUrl": billing, "Attributes": {"VisibilityTimeout": "7200"}}
        refused("InvalidAttributeValue", sqs.set_queue_attributes, **long)
        sqs.set_queue_attributes(QueueUrl=billing, Attributes={"VisibilityTimeout": "0"})
        sqs.send_message(QueueUrl=billing, MessageBody="x")
        assert receive(sqs, billing)
        (found,) = receive(sqs, billing)
        changed = {"QueueUrl": billing, "ReceiptHandle": found["ReceiptHandle"], "VisibilityTimeout": 7200}
        refused("InvalidParameterValue", sqs.change_message_visibility, **changed)


def test_a_purge_is_in_the_audit_log(sqs: Any, billing: str, world18: World) -> None:
    sqs.purge_queue(QueueUrl=billing)
    rows = world18.sql.execute("select caller, action, subject from cdcbridge.audit").fetchall()
    assert [row[1:] for row in rows] == [("PurgeQueue", "billing")] and rows[0][0]


def test_a_call_that_is_denied_leaves_no_row_in_the_audit_log(billing: str, url: str, world18: World) -> None:
    with closing(sqs_client(url, VIEWER)) as viewer:
        refused("AccessDenied", viewer.purge_queue, QueueUrl=billing)
        refused("AccessDenied", viewer.start_message_move_task, SourceArn=f"{ARN}billing-dead")
        changed = {"VisibilityTimeout": "9"}
        refused("AccessDenied", viewer.set_queue_attributes, QueueUrl=billing, Attributes=changed)
    assert world18.rows("select * from cdcbridge.audit") == []
