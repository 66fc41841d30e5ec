"""peek() shows what receive() would give, in its order."""

from __future__ import annotations

import pytest

from tests.sql.queue import StoreQueue
from tests.sql.test_queue import seqs


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_peek_shows_log_order_also_behind_a_filling(queue: StoreQueue, mode: str) -> None:
    """A large append and a start at the earliest put up to 50 messages into a row of `waiting`."""
    queue.declare("first", topics=("t",))
    queue.append_keys(*[f"k{n % 7}" for n in range(400)], consumers=(1,))
    queue.declare("late", mode=mode, start="earliest")
    queue.append_keys(*[f"k{n % 7}" for n in range(200)], consumers=(2,))
    shown = [row["seq"] for row in queue.all("select seq from cdcbridge.peek('late', 500)")]
    assert shown == sorted(shown) and len(shown) == 500
    assert [row["seq"] for row in queue.all("select seq from cdcbridge.peek('late', 70)")] == shown[:70]
    if mode == "queue":
        assert seqs(queue.receive(500, name="late")) == shown


def test_peek_shows_what_expired_then_what_was_given_back_then_what_is_new(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=1000)
    put = queue.append(300)
    taken = queue.receive(100)
    back = queue.receive(100)
    queue.nack(*[row["receipt"] for row in back], delay="0")
    queue.session.execute("update cdcbridge_internal.leases set not_visible_until = now() - interval '1 s'")
    shown = [row["seq"] for row in queue.all("select seq from cdcbridge.peek('c', 300)")]
    assert shown == seqs(taken) + seqs(back) + put[200:] and len(shown) == 300
