"""The judgement of a consumer, by its figures."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.web.pages.judgement import judge, judge_all, trend

ROW: dict[str, Any] = {
    "name": "c", "mode": "queue", "pending": 0, "in_flight": 0, "dead": 0, "delayed": 0, "held": 0, "paused": False,
    "oldest_due_age_seconds": None,
}  # fmt: skip
ALARM = {"code": "sink_failing", "message": "the sink of c delivers nothing", "consumer": "c"}
HOLDER = {"consumer": "c", "pid": 41, "name": "worker", "age_seconds": 90.0}
NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("changed", "alarm", "held", "level", "word"),
    [
        ({}, None, [], "idle", "idle"),
        ({"pending": 3, "oldest_due_age_seconds": 2.0}, None, [], "ok", "working"),
        ({"pending": 3, "oldest_due_age_seconds": 61.0}, None, [], "bad", "nobody receives"),
        ({"pending": 3, "in_flight": 1, "oldest_due_age_seconds": 61.0}, None, [], "ok", "working"),
        ({"pending": 3, "in_flight": 1, "oldest_due_age_seconds": 301.0}, None, [], "warn", "behind"),
        ({"pending": 3, "delayed": 3, "oldest_due_age_seconds": None}, None, [], "ok", "working"),
        ({"pending": 9, "delayed": 1, "mode": "fifo", "oldest_due_age_seconds": 99.0}, None, [], "warn", "keys wait"),
        ({"pending": 3, "mode": "stream", "oldest_due_age_seconds": 61.0}, None, [], "warn", "behind"),
        ({"dead": 1}, None, [], "warn", "dead letters"),
        ({"pending": 9, "dead": 1, "paused": True, "oldest_due_age_seconds": 900.0}, None, [], "warn", "paused"),
        ({"pending": 9, "oldest_due_age_seconds": 900.0}, None, [HOLDER], "warn", "held"),
        ({"paused": True}, ALARM, [HOLDER], "bad", "sink failing"),
    ],
)
def test_a_judgement(changed: Any, alarm: Any, held: Any, level: str, word: str) -> None:
    found = judge({**ROW, **changed}, alarm, held, sink=False)
    assert (found.level, found.word) == (level, word) and found.sentence


def test_a_sink_needs_no_worker() -> None:
    found = judge({**ROW, "pending": 3, "oldest_due_age_seconds": 400.0}, None, [], sink=True)
    assert (found.level, found.word) == ("warn", "behind")
    found = judge({**ROW, "mode": "stream", "pending": 3, "oldest_due_age_seconds": 400.0}, None, [], sink=True)
    assert "target" in found.sentence


def test_a_held_consumer_names_the_session() -> None:
    assert "pid 41" in judge(ROW, None, [HOLDER], sink=False).sentence
    assert "prepared transaction worker" in judge(ROW, None, [{**HOLDER, "pid": None}], sink=False).sentence


LEADER = {"leads": True}


@pytest.mark.parametrize(
    ("lag", "age", "stale", "bridges", "attention", "level", "word"),
    [
        ({}, None, False, [], 0, "idle", "Measuring…"),
        ({}, 1.0, False, [LEADER], 0, "ok", "Everything works"),
        ({}, 1.0, False, [LEADER], 2, "warn", "2 consumers deserve a look"),
        ({}, 1.0, False, [], 0, "warn", "No bridge runs"),
        ({}, 1.0, False, [{"leads": False}], 0, "bad", "No bridge leads"),
        ({}, 99.0, True, [LEADER], 0, "warn", "The figures are old"),
        ({"source_error": "source: refused"}, 1.0, False, [], 0, "bad", "A database does not answer"),
        ({"source_error": "source: refused"}, 1.0, False, [LEADER], 0, "bad", "A database does not answer"),
    ],
)
def test_the_whole(lag: Any, age: Any, stale: bool, bridges: Any, attention: int, level: str, word: str) -> None:
    found = judge_all(lag, age=age, stale=stale, bridges=bridges, attention=attention)
    assert (found.level, found.word) == (level, word) and found.sentence


def test_a_trend() -> None:
    assert trend([]) is None and trend([(NOW, 5.0)]) is None
    growing = trend([(NOW - 3600, 9e9), (NOW - 600, 0.0), (NOW, 100.0)])
    assert growing is not None and growing.per_minute == 10.0 and growing.empty_in is None
    falling = trend([(NOW - 60, 100.0), (NOW, 80.0)])
    assert falling is not None and (falling.per_minute, falling.empty_in) == (-20.0, 240.0)
    held = trend([(NOW - 60, 100.0), (NOW, 80.0)], moves=False)
    assert held is not None and held.empty_in is None, "nothing is delivered, so no end is in sight"
