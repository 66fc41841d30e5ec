"""Which measurement the rules may judge: one that fails or is old must not look like a healthy one."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest

from cdcbridge.alerts.facts import stalled, usable_lag, why_not
from cdcbridge.errors import CdcbridgeError, SourceUnavailable
from cdcbridge.observe.health import Health
from cdcbridge.observe.lag import Lag
from tests.harness.world import World


@dataclass
class Measurement:
    latest: Lag | None = None
    failure: Exception | None = None
    interval: float = 1.0
    looked: threading.Event = field(default_factory=threading.Event)


def test_a_measurement(world18: World) -> None:
    config = world18.config()
    assert usable_lag(config, Measurement()) is None, "before the first one"
    fresh = Lag([], [], measured_at=time.monotonic())
    assert usable_lag(config, Measurement(fresh)) is fresh
    with pytest.raises(CdcbridgeError, match="the lag has not been measured for 61 s"):
        usable_lag(config, Measurement(Lag([], [], measured_at=time.monotonic() - 61)))
    with pytest.raises(CdcbridgeError, match="the lag cannot be measured: no right"):
        usable_lag(config, Measurement(failure=CdcbridgeError("no right")))
    found = usable_lag(config, Measurement(failure=SourceUnavailable("away")))
    assert found is not None and found.source_error == "away", "the store is measured nevertheless"


def test_the_state_of_a_bridge() -> None:
    now = 100.0
    health = Health(lambda: now)
    health.streams(1)
    assert (why_not(health), stalled(health)) == ("", "")
    now = 116.0
    assert stalled(health) == "streaming, but its main loop has not run for 16 s"
    health.stands_by("db1 pid 7")
    assert (why_not(health), stalled(health)) == ("", "")
    health.retries("source: refused")
    assert (why_not(health), stalled(health)) == ("source: refused", "")
