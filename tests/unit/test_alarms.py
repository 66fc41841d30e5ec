"""What about a slot is an alarm, and when its limit is reached."""

from __future__ import annotations

import pytest

from cdcbridge.observe.alarms import SlotState, alarms, average_growth, observed_growth, seconds_to

SLOT = SlotState("s", True, "reserved", None, 1 << 20, None, None, 0.0)

LIMITS = {"max_retained": 10 << 30, "max_inactive": 300.0}


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
