"""What is told of the bridge's health."""

from __future__ import annotations

from cdcbridge.observe.health import APPEND_STALLED_AFTER, STALLED_AFTER, Health
from cdcbridge.routing.batch import AppendBatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_loop_that_hangs_is_neither_alive_nor_ready() -> None:
    clock = Clock()
    health = Health(clock)
    assert health.alive() == (True, "starting") and health.ready() == (False, "starting")
    health.prepares()
    clock.now += 3600
    assert health.alive()[0], "preparing may take long: a slot waits for transactions"
    assert not health.ready()[0]
    health.streams(7)
    assert health.ready() == (True, "streaming")
    clock.now += STALLED_AFTER - 1
    health.beat(10, 1000)
    clock.now += STALLED_AFTER
    assert health.alive()[0] and health.rows_waiting == 10
    clock.now += 0.1
    alive, what = health.alive()
    assert not alive and "has not run for 15 s" in what
    assert health.ready() == (False, what)
    health.beat(0, 0)
    assert health.alive()[0] and health.ready()[0]


def test_an_append_that_hangs_is_not_ready_but_alive() -> None:
    clock = Clock()
    seen: list[float] = []
    health = Health(clock, on_append=lambda _batch, seconds: seen.append(seconds))
    health.streams(1)
    health.append_begins()
    clock.now += APPEND_STALLED_AFTER + 1
    health.beat(0, 0)
    assert health.alive()[0]
    assert health.ready() == (False, "streaming, but the store has been busy with one append for 31 s")
    health.stored(AppendBatch())
    assert health.ready()[0] and seen == [31.0]


def test_a_stand_by_is_ready_and_one_that_tries_again_is_not() -> None:
    clock = Clock()
    health = Health(clock)
    health.stands_by("db1 pid 7")
    assert health.ready() == (True, "standby: db1 pid 7 leads")
    health.retries("store: connection refused")
    clock.now += 3600
    assert health.alive() == (True, "retrying")
    assert health.ready() == (False, "retrying: store: connection refused")
    health.stops()
    assert not health.alive()[0]
