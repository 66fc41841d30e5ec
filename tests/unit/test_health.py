"""What is told of the bridge's health, and what about a slot is an alarm."""

from __future__ import annotations

import pytest

from cdcbridge.observe.alarms import SlotState, alarms, average_growth, observed_growth, seconds_to
from cdcbridge.observe.health import APPEND_STALLED_AFTER, STALLED_AFTER, Health
from cdcbridge.routing.batch import Batch

SLOT = SlotState("s", True, "reserved", None, 1 << 20, None, None, 0.0)
LIMITS = {"max_retained": 10 << 30, "max_inactive": 300.0}


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
    assert not alive and "has not turned for 15 s" in what
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
    health.stored(Batch())
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


def _codes(**changes: object) -> list[str]:
    from dataclasses import replace

    return [alarm.code for alarm in alarms(replace(SLOT, **changes), **LIMITS)]  # type: ignore[arg-type]


def test_what_is_an_alarm() -> None:
    assert _codes() == []
    assert _codes(retained_bytes=(10 << 30) + 1) == ["slot_retains_too_much"]
    assert _codes(active=False, inactive_seconds=301.0) == ["slot_inactive"]
    assert _codes(active=False, inactive_seconds=299.0) == []
    assert _codes(active=False, inactive_seconds=None) == []
    assert _codes(wal_status="unreserved") == ["slot_unreserved"]
    assert _codes(wal_status="lost", active=False, inactive_seconds=1e6, retained_bytes=None) == ["slot_lost"]


def test_the_forecast_says_when_the_limit_is_reached() -> None:
    growth = average_growth(600 << 20, 60.0)
    assert growth == pytest.approx(10 << 20)
    (alarm,) = alarms(SlotState("s", False, "extended", None, 1 << 30, 24000 << 20, 60.0, growth), **LIMITS)  # type: ignore[arg-type]
    assert alarm.code == "slot_limit_in_sight"
    assert (
        alarm.message == "at this rate (10.0 MB/s) max_slot_wal_keep_size is reached in 40m 0s, and the slot s is lost:"
        " start the bridge (`cdcbridge run`), or raise max_slot_wal_keep_size"
    )
    assert average_growth(600 << 20, 3.0) is None, "too short to say"
    saw = [(float(at), retained << 20) for at, retained in ((0, 5), (10, 9), (20, 1), (30, 4), (40, 8), (50, 1))]
    assert observed_growth(saw) == 0.0, "up and down, and no growth"
    assert observed_growth([(at, retained + int(at) * 1000) for at, retained in saw]) == pytest.approx(1000.0)
    assert observed_growth(saw[:3]) is None
    assert seconds_to(None, 1.0) is None and seconds_to(10.0, 0.0) is None and seconds_to(-5.0, 1.0) == 0.0
