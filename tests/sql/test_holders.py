"""Who keeps messages from receivers: open transactions of receivers, members of groups and publishers."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.sql.queue import Row, StoreQueue
from tests.sql.test_queue import receipts


def holders(queue: StoreQueue, name: str | None = "c", session: psycopg.Connection[Row] | None = None) -> list[Row]:
    return queue.all("select * from cdcbridge.consumer_holders(%s)", name, session=session)


def counts(queue: StoreQueue) -> tuple[int, int, int, int]:
    (row,) = queue.all("select pending, in_flight, delayed, held from cdcbridge.consumer_lag() where name = 'c'")
    return row["pending"], row["in_flight"], row["delayed"], row["held"]


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_what_a_receiver_holds_in_its_transaction_is_counted_with_its_pid(queue: StoreQueue, mode: str) -> None:
    queue.declare(mode=mode)
    queue.append_keys(*(str(n) for n in range(423))) if mode == "fifo" else queue.append(423)
    stuck = queue.open(autocommit=False)
    stuck.execute("set application_name = 'stuck-worker'")
    assert len(queue.receive(423, session=stuck)) == 423
    assert counts(queue) == (423, 0, 0, 423) and queue.receive() == []
    (holder,) = holders(queue)
    assert holder["kind"] == "receiver" and holder["messages"] == 423 and holder["pid"] == stuck.info.backend_pid
    assert holder["name"] == "stuck-worker" and holder["age_seconds"] >= 0 and not holder["limit_reached"]
    assert holder["state"] == "idle in transaction" and "receive" in holder["query"]
    assert holders(queue, None) == [holder | {"age_seconds": pytest.approx(holder["age_seconds"], abs=30)}]
    assert queue.all("select * from cdcbridge.consumer_holders('c', '1 hour')") == [], "not for so long"
    stuck.commit()
    assert counts(queue) == (0, 423, 0, 0) and holders(queue) == []


def test_a_claim_in_a_savepoint_is_its_sessions(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(5)
    stuck = queue.open(autocommit=False)
    stuck.execute("savepoint s")
    queue.receive(5, session=stuck)
    assert [(h["pid"], h["messages"]) for h in holders(queue)] == [(stuck.info.backend_pid, 5)]
    stuck.execute("release s")
    assert [(h["pid"], h["messages"]) for h in holders(queue)] == [(stuck.info.backend_pid, 5)]
    assert counts(queue) == (5, 0, 0, 5)
    stuck.execute("rollback")
    assert counts(queue) == (5, 0, 0, 0) and holders(queue) == []


def test_two_receivers_are_told_apart_and_one_that_rolls_back_is_gone(queue: StoreQueue) -> None:
    queue.declare()
    for _ in range(10):
        queue.append(1)
    one, two = queue.open(autocommit=False), queue.open(autocommit=False)
    queue.receive(3, session=one)
    queue.receive(4, session=two)
    assert {h["pid"]: h["messages"] for h in holders(queue)} == {one.info.backend_pid: 3, two.info.backend_pid: 4}
    assert len(queue.receive(10)) == 3, "the others are not held"
    one.rollback()
    assert {h["pid"]: h["messages"] for h in holders(queue)} == {two.info.backend_pid: 4}


def test_an_ack_that_does_not_commit_holds_its_messages_when_their_timeout_passes(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(4)
    batch = queue.receive(4)
    stuck = queue.open(autocommit=False)
    assert queue.ack(*receipts(batch), session=stuck) == 4
    assert holders(queue) == [], "they are in flight, and nobody waits for them"
    queue.value("select cdcbridge.extend('c', '{}', '1 s')")
    stuck.rollback()
    queue.expire()
    assert queue.ack(*receipts(batch), session=stuck) == 0
    stuck.rollback()
    assert len(queue.receive(2, session=stuck)) == 2
    assert counts(queue) == (4, 0, 0, 4), "the row of all four is locked"
    assert holders(queue)[0]["messages"] == 4


def test_a_delayed_message_that_is_claimed_is_held_and_one_that_waits_for_its_time_is_not(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(2)
    first, second = receipts(queue.receive(2))
    queue.nack(first, delay="1 hour")
    queue.nack(second, delay="0")
    assert counts(queue) == (2, 0, 1, 0)
    stuck = queue.open(autocommit=False)
    assert len(queue.receive(session=stuck)) == 1
    assert counts(queue) == (2, 0, 1, 1) and holders(queue)[0]["messages"] == 1


def test_the_limit_that_a_holder_has_reached_is_told(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=10)
    for _ in range(30):
        queue.append(1)
    stuck = queue.open(autocommit=False)
    assert len(queue.receive(10, session=stuck)) == 10
    assert queue.receive(10) == []
    (holder,) = holders(queue)
    assert (holder["messages"], holder["limit_reached"]) == (10, True)


def test_a_prepared_transaction_is_named(queue: StoreQueue) -> None:
    if queue.value("show max_prepared_transactions") == "0":
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            queue.session.execute("begin; prepare transaction 'x'")
        queue.session.execute("rollback")
        return
    queue.declare()
    queue.append(3)
    stuck = queue.open(autocommit=False)
    queue.receive(3, session=stuck)
    stuck.execute("prepare transaction 'two phases'")
    (holder,) = holders(queue)
    assert (holder["pid"], holder["name"], holder["messages"]) == (None, "two phases", 3)
    queue.session.execute("rollback prepared 'two phases'")
    assert holders(queue) == []


def test_a_member_that_reads_in_a_transaction_is_named_with_its_partitions(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream")
    queue.append_changes(*(("insert", str(n), None) for n in range(50)))
    stuck = queue.open(autocommit=False)
    rows = queue.all("select * from cdcbridge.read_stream('s', 100)", session=stuck)
    (holder,) = holders(queue, "s")
    assert holder["kind"] == "member" and holder["pid"] == stuck.info.backend_pid
    assert holder["partitions"] == [rows[0]["partition"]] and holder["messages"] == len(rows) > 0
    stuck.rollback()
    assert holders(queue, "s") == []
    queue.all("select * from cdcbridge.read_stream('s', 100, '1 hour')")
    assert holders(queue, "s") == [], "a lease is no transaction; offsets show tells of it"


def test_a_publisher_is_named_with_the_consumers_that_wait_for_it(queue: StoreQueue) -> None:
    topics: dict[str, Any] = {"tables": (), "topics": ("invoices",)}
    queue.declare("loose", **topics)
    queue.declare("ordered", mode="fifo", **topics)
    queue.declare("s", mode="stream", **topics)
    queue.declare("tables", mode="stream")
    stuck = queue.open(autocommit=False)
    queue.value("select cdcbridge.publish('invoices', 'a', '1')", session=stuck)
    for n in range(3):
        queue.value("select cdcbridge.publish('invoices', %s, '2')", str(n))
    found = holders(queue, None)
    assert {(h["consumer"], h["kind"], h["messages"]) for h in found} == {
        ("ordered", "publisher", 3),
        ("s", "publisher", 3),
    }
    assert {h["pid"] for h in found} == {stuck.info.backend_pid}
    assert queue.receive(name="ordered") == [] and len(queue.receive(name="loose")) == 3
    stuck.commit()
    assert holders(queue, None) == [] and len(queue.receive(name="ordered")) == 4


def test_a_look_locks_nothing_and_assigns_no_transaction_id(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(3)
    session = queue.open(autocommit=False)
    assert holders(queue, session=session) == []
    session.execute("select * from cdcbridge.consumer_lag()")
    assert queue.value("select pg_current_xact_id_if_assigned()", session=session) is None
    assert len(queue.receive(3)) == 3


def test_delayed_messages_are_seen_by_peek_and_are_not_due(queue: StoreQueue) -> None:
    queue.declare("d", tables=(), topics=("later",))
    queue.declare("e", mode="fifo", tables=(), topics=("later",))
    publish = "select cdcbridge.publish('later', %s, '{}', now() + make_interval(hours => %s))"
    hours = {queue.value(publish, key, h): h for key, h in (("a", 3), ("b", 1), ("a", 2))}
    for name in ("d", "e"):
        seen = queue.all("select * from cdcbridge.peek(%s, 10, true)", name)
        assert [hours[row["seq"]] for row in seen] == [1, 2, 3], "the next one first"
        assert [row["key"] for row in seen] == ["b", "a", "a"]
        assert all(row["not_visible_until"] and row["receipt"] is None for row in seen)
        assert len(queue.all("select * from cdcbridge.peek(%s, 2, true)", name)) == 2
        assert queue.all("select * from cdcbridge.peek(%s)", name) == []
        (lag,) = queue.all("select * from cdcbridge.consumer_lag() where name = %s", name)
        assert (lag["pending"], lag["delayed"], lag["oldest_due_age_seconds"]) == (3, 3, None)
        assert lag["oldest_age_seconds"] is not None, "from inserted_at, as before"


def test_what_is_due_counts_from_its_time(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(1)
    (receipt,) = receipts(queue.receive())
    queue.session.execute("update cdcbridge_internal.leases set inserted_at = now() - interval '1 day'")
    queue.nack(receipt, delay="1 hour")
    assert queue.all("select oldest_due_age_seconds s, oldest_age_seconds > 86000 o from cdcbridge.consumer_lag()") == [
        {"s": None, "o": True}
    ]
    queue.due()
    (row,) = queue.all("select oldest_due_age_seconds s from cdcbridge.consumer_lag()")
    assert 1 <= row["s"] < 60, "since its time came a second ago"
    queue.receive()
    (row,) = queue.all("select oldest_due_age_seconds s from cdcbridge.consumer_lag()")
    assert row["s"] < 60, "in flight: since it was delivered"


def test_a_paused_consumer_is_marked(queue: StoreQueue) -> None:
    queue.declare()
    queue.session.execute("update cdcbridge.consumers set paused = true")
    assert queue.value("select paused from cdcbridge.consumer_lag()") is True
