"""The judgement of a consumer, by its figures."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.web.pages.judgement import judge, trend

ROW: dict[str, Any] = {
    "name": "c", "mode": "queue", "pending": 0, "in_flight": 0, "dead": 0, "delayed": 0, "held": 0, "paused": False,
    "oldest_due_age_seconds": None,
}  # fmt: skip
ALARM = {"code": "sink_failing", "message": "the sink of c delivers nothing", "consumer": "c"}
HOLDER = {"consumer": "c", "pid": 41, "name": "worker", "age_seconds": 90.0}
NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("changed", "alarms", "holders", "level", "word"),
    [
        ({}, [], [], "idle", "idle"),
        ({"pending": 3, "oldest_due_age_seconds": 2.0}, [], [], "ok", "working"),
        ({"pending": 3, "oldest_due_age_seconds": 61.0}, [], [], "bad", "nobody receives"),
        ({"pending": 3, "in_flight": 1, "oldest_due_age_seconds": 61.0}, [], [], "ok", "working"),
        ({"pending": 3, "in_flight": 1, "oldest_due_age_seconds": 301.0}, [], [], "warn", "behind"),
        ({"pending": 3, "delayed": 3, "oldest_due_age_seconds": None}, [], [], "ok", "working"),
        ({"pending": 3, "mode": "stream", "oldest_due_age_seconds": 61.0}, [], [], "warn", "behind"),
        ({"dead": 1}, [], [], "warn", "dead letters"),
        ({"pending": 9, "dead": 1, "paused": True, "oldest_due_age_seconds": 900.0}, [], [], "warn", "paused"),
        ({"pending": 9, "oldest_due_age_seconds": 900.0}, [], [HOLDER], "warn", "held"),
        ({"paused": True}, [ALARM], [HOLDER], "bad", "sink failing"),
        ({}, [{**ALARM, "consumer": "other"}], [{**HOLDER, "consumer": "other"}], "idle", "idle"),
    ],
)
def test_a_judgement(changed: Any, alarms: Any, holders: Any, level: str, word: str) -> None:
    found = judge({**ROW, **changed}, alarms, holders)
    assert (found.level, found.word) == (level, word) and found.sentence


def test_a_held_consumer_names_the_session() -> None:
    assert "pid 41" in judge(ROW, [], [HOLDER]).sentence
    assert "prepared transaction worker" in judge(ROW, [], [{**HOLDER, "pid": None}]).sentence


def test_a_trend() -> None:
    assert trend([]) is None and trend([(NOW, 5.0)]) is None
    growing = trend([(NOW - 3600, 9e9), (NOW - 600, 0.0), (NOW, 100.0)])
    assert growing is not None and growing.per_minute == 10.0 and growing.empty_in is None
    falling = trend([(NOW - 60, 100.0), (NOW, 80.0)])
    assert falling is not None and (falling.per_minute, falling.empty_in) == (-20.0, 240.0)
