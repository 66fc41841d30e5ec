"""The pure parts of the dashboard: judgement, charts, texts and the cookie."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.config.web import ApiToken
from cdcbridge.web.access import LOCAL
from cdcbridge.web.pages.charts import HOURS, chart, spark
from cdcbridge.web.pages.judgement import judge, trend
from cdcbridge.web.pages.login import LASTS, cookie_for, proof_for, visitor_of
from cdcbridge.web.pages.wording import DURATIONS, SIZES, changes, duration, indented, number, plural, sentence, size

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


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e15)), max_size=400), st.sampled_from([(1.0,), SIZES, DURATIONS]))
def test_a_chart_stays_inside_its_frame(values: list[float | None], units: tuple[float, ...]) -> None:
    samples = [(NOW - (len(values) - n) * 60, value) for n, value in enumerate(values)]
    drawn = chart("Waiting", samples, NOW, number, units)
    known = [value for at, value in samples if value is not None and at >= NOW - HOURS * 3600]
    assert bool(drawn.runs) == (len(known) >= 2)
    for run in drawn.runs:
        for point in run.split(" "):
            x, y = map(float, point.split(","))
            assert 61 <= x <= 415 and 7 <= y <= 129
    for point in spark(samples, NOW).split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 100 and 0 <= y <= 24


def test_a_chart_says_its_values_and_has_round_lines() -> None:
    drawn = chart("WAL", [(NOW - 120, 5 << 20), (NOW - 60, 40 << 20), (NOW, 10 << 20)], NOW, size, SIZES)
    assert drawn.says == "WAL in the last 6 hours: now 10.0 MB, at most 40.0 MB"
    assert [line.text for line in drawn.lines] == ["0 B", "20.0 MB", "40.0 MB", "60.0 MB"]
    drawn = chart("Age", [(NOW - 60, 100.0), (NOW, 400.0)], NOW, duration, DURATIONS)
    assert [line.text for line in drawn.lines] == ["0 ms", "3m 0s", "6m 0s", "9m 0s"]


def test_a_gap_interrupts_the_line() -> None:
    samples = [(NOW - 3600 + n * 60, 1.0) for n in range(10)] + [(NOW - 600 + n * 60, 1.0) for n in range(10)]
    assert len(chart("Waiting", samples, NOW, number).runs) == 2


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values, st.booleans())
def test_indented_json_is_the_same_json(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert indented(text) == json.dumps(value, ensure_ascii=ascii_only, indent=2)


def test_indented_json_keeps_each_digit_and_has_an_end() -> None:
    assert indented('{"n": 12345678901234567890.10}') == '{\n  "n": 12345678901234567890.10\n}'
    assert indented('"' + "x" * 30_000 + '"').endswith("… (30,002 characters)")


def test_changes_between_versions() -> None:
    found = changes('{"id": 1, "a": "x", "gone": 1.10}', '{"id": 1, "a": "y", "new": null}')
    assert [(one.column, one.before, one.after) for one in found] == [
        ("a", '"x"', '"y"'),
        ("gone", "1.10", None),
        ("new", None, "null"),
    ]
    assert changes(None, None) == [] and changes("[1]", '"text"') == []
    assert [one.after for one in changes(None, '{"id": 1}')] == ["1"]


def test_words() -> None:
    assert plural(1, "delivery") == "1 delivery" and plural(2, "delivery") == "2 deliveries"
    assert plural(1200, "message") == "1,200 messages"
    assert sentence("nobody: [Errno 111]") == "Nobody: [Errno 111]" and sentence("") == ""


def token(name: str, secret: str) -> ApiToken:
    return ApiToken(name=name, token=secret, role="viewer")  # type: ignore[arg-type]


TOKENS = [token("a", "one"), token("a.b", "two"), token("b", "three")]


@given(st.sampled_from(TOKENS), st.floats(0, 4e9))
def test_a_cookie_is_its_session(one: ApiToken, now: float) -> None:
    cookie = cookie_for(one, now)
    found = visitor_of(cookie, TOKENS, now)
    assert found is not None and found.name == one.name
    assert visitor_of(cookie, TOKENS, now + LASTS - 1) is not None
    assert visitor_of(cookie, TOKENS, now + LASTS + 1) is None
    assert visitor_of(cookie, [other for other in TOKENS if other is not one], now) is None
    assert one.token.get_secret_value() not in cookie and proof_for(cookie, TOKENS) not in cookie


@given(st.text(), st.floats(0, 4e9))
def test_a_text_is_no_session(text: str, now: float) -> None:
    assert visitor_of(text, TOKENS, now) is None and visitor_of(None, TOKENS, now) is None
    assert visitor_of(text, [], now) is LOCAL, "without tokens"


@given(st.data())
def test_a_changed_cookie_is_no_session(data: st.DataObject) -> None:
    cookie = cookie_for(TOKENS[1], NOW)
    place = data.draw(st.integers(0, len(cookie) - 1))
    letter = data.draw(st.characters(codec="utf-8").filter(lambda one: one != cookie[place]))
    assert visitor_of(cookie[:place] + letter + cookie[place + 1 :], TOKENS, NOW) is None
