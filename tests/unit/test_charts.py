"""Charts of the dashboard: points inside the frame, round lines, gaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.web.pages.charts import HOURS, chart, spark
from cdcbridge.web.pages.wording import DURATIONS, SIZES, duration, number, size

NOW = 1_800_000_000.0


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
