"""What SQS users expect of a FIFO queue's message groups: a key is the group, a visibility timeout is shared in it.

The cases are those that SQS's own behaviour settles; where this queue answers differently, the test says so.
"""

from __future__ import annotations

import psycopg
import pytest

from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts, seqs


@pytest.fixture(autouse=True)
def _fifo(queue: StoreQueue) -> None:
    queue.declare(mode="fifo")


def test_a_group_with_a_message_in_flight_gives_nothing_and_others_do(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1", "g2", "g2")
    assert seqs(queue.receive(1)) == put[:1]
    assert seqs(queue.receive(1)) == put[2:3]
    assert queue.receive() == []


def test_after_the_timeout_a_group_comes_again_in_order(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1", "g1")
    assert seqs(queue.receive(2)) == put[:2]
    queue.expire()
    again = queue.receive(10)
    assert seqs(again) == put
    assert [row["deliver_count"] for row in again] == [2, 2, 1]


def test_one_timeout_is_shared_by_what_was_received_of_a_group_at_once(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1", "g2")
    batch = queue.receive(3, "30 s")
    assert len({row["not_visible_until"] for row in batch}) == 1
    queue.extend("0 s", batch[1]["receipt"])
    assert seqs(queue.receive()) == put[:2], "its group with it, and not the other group"


def test_a_visibility_timeout_of_zero_holds_no_group(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1")
    assert seqs(queue.receive(1, "0 s")) == put[:1]
    assert seqs(queue.receive(2)) == put


def test_a_delivery_that_is_ended_by_its_receiver_frees_the_group_in_order(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1", "g1")
    batch = queue.receive(2)
    queue.extend("0 s", *receipts(batch))
    assert seqs(queue.receive(10)) == put


def test_a_longer_timeout_holds_the_group_longer(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1", "g2")
    (first,) = queue.receive(1, "1 h")
    queue.extend("2 h", first["receipt"])
    queue.session.execute(
        "update cdcbridge_internal.leases set not_visible_until = not_visible_until - interval '90 min'"
    )
    assert seqs(queue.receive()) == put[2:]
    queue.session.execute(
        "update cdcbridge_internal.leases set not_visible_until = not_visible_until - interval '90 min'"
    )
    assert seqs(queue.receive()) == [put[0], put[2], put[1]]


def test_an_ack_frees_the_group(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1")
    for seq in put:
        (message,) = queue.receive(1)
        assert message["seq"] == seq
        assert queue.receive() == []
        queue.ack(message["receipt"])
    assert queue.receive() == []


def test_after_an_ack_of_some_the_group_waits_for_the_rest(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1", "g1", "g1")
    batch = queue.receive(2)
    queue.ack(batch[0]["receipt"])
    assert queue.receive() == []
    queue.expire()
    assert seqs(queue.receive(10)) == put[1:]


@pytest.mark.parametrize("again", [False, True], ids=["expired", "received again"])
def test_an_old_receipt_acks_nothing(queue: StoreQueue, *, again: bool) -> None:
    """SQS refuses it with an error; here `strict` does, and without it the count tells."""
    put = queue.append_keys("g1", "g1")
    (old,) = queue.receive(1)
    queue.expire()
    if again:
        assert seqs(queue.receive(1)) == put[:1]
    assert queue.ack(old["receipt"]) == 0
    with pytest.raises(psycopg.Error) as raised:
        queue.ack(old["receipt"], strict=True)
    assert raised.value.sqlstate == "CB006"
    queue.expire()
    assert seqs(queue.receive()) == put


def test_a_receipt_of_an_acked_message_extends_nothing(queue: StoreQueue) -> None:
    """SQS refuses it with an error; here the count tells."""
    queue.append_keys("g1")
    (message,) = queue.receive(1)
    queue.ack(message["receipt"])
    assert queue.extend("1 min", message["receipt"]) == 0
    assert queue.receive() == []


def test_a_group_that_was_emptied_takes_new_messages(queue: StoreQueue) -> None:
    queue.append_keys("g1")
    queue.ack(*receipts(queue.receive()))
    assert queue.receive() == []
    put = queue.append_keys("g1", "g2")
    assert seqs(queue.receive(1)) == put[:1]
    assert seqs(queue.receive(1)) == put[1:]


def test_a_group_of_which_one_died_goes_on_with_the_next(queue: StoreQueue) -> None:
    queue.declare(mode="fifo", max_deliveries=2)
    put = queue.append_keys("g1", "g1")
    for _ in range(2):
        assert seqs(queue.receive(1)) == put[:1]
        assert queue.receive() == []
        queue.expire()
    assert seqs(queue.receive()) == put[1:]
    assert queue.states()["dead"] == 1


def test_a_receive_asks_for_more_than_there_is_and_gets_what_there_is(queue: StoreQueue) -> None:
    put = queue.append_keys("g1", "g1", "g2")
    assert seqs(queue.receive(1000)) == put
