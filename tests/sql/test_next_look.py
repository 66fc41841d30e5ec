"""next_visible() and next_readable() return when to look again: never a time in the past, and never too late."""

from __future__ import annotations

import pytest

from tests.sql.queue import StoreQueue


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_paused_consumer_with_deliveries_that_timed_out(queue: StoreQueue, mode: str) -> None:
    queue.declare(mode=mode)
    queue.append_keys("a", "b") if mode == "fifo" else queue.append(2)
    queue.receive(2, "1 min")
    queue.expire()
    assert queue.value("select cdcbridge.next_visible('c')") == 0.1
    queue.session.execute("update cdcbridge.consumers set paused = true")
    assert queue.value("select cdcbridge.next_visible('c')") == 1


def test_a_delivery_that_is_in_flight(queue: StoreQueue) -> None:
    queue.declare()
    assert queue.value("select cdcbridge.next_visible('c')") is None
    queue.append(1)
    queue.receive(1, "1 min")
    assert 50 < queue.value("select cdcbridge.next_visible('c')") <= 60


def test_a_partition_without_a_lease_is_not_overlooked(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", topics=("news",), start="earliest")
    due = "select cdcbridge.next_readable('s')"
    for key in ("a", "b"):
        queue.value("select cdcbridge.publish('news', %s, '1')", key)
    for _ in range(2):
        assert 0 < queue.value(due) <= 0.1
        assert queue.all("select * from cdcbridge.read_stream('s', 10, '1 min')")
    assert 50 < queue.value(due) <= 60
