"""Place samples of the last hours on a chart. A template draws it as SVG, with the colors of the style sheet.

A sentence in each chart says the same to a screen reader. This module is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, TypeAlias

Samples: TypeAlias = Sequence[tuple[float, float | None]]  # seconds since 1970, and the value
HOURS: Final = 6
_WIDTH, _HEIGHT = 420, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 6, 8, 22
_GAP: Final = 150.0  # seconds without a sample, after which the line is interrupted
_LINES: Final = 3


class Label(NamedTuple):
    """A text at a place."""

    x: float
    y: float
    text: str


class Chart(NamedTuple):
    """A chart of the last six hours.

    Attributes:
        title: What the values are.
        says: The chart in a sentence.
        lines: The horizontal lines of the grid, each with the text of its value.
        hours: The full hours.
        runs: The points of each line without a gap, for example "62.0,128.0 63.6,120.1".
        left: Where the lines of the grid begin.
        right: Where they end.
        floor: The height of the value zero.
    """

    title: str
    says: str
    lines: list[Label]
    hours: list[Label]
    runs: list[str]
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    floor: float = _HEIGHT - _BOTTOM

    def area(self, run: str) -> str:
        """Return the points of the area below a line."""
        points = run.split(" ")
        return f"{points[0].partition(',')[0]},{self.floor} {run} {points[-1].partition(',')[0]},{self.floor}"


def chart(
    title: str, samples: Samples, now: float, shown: Callable[[float], str], units: Sequence[float] = (1.0,)
) -> Chart:
    """Place samples on a chart of the last six hours.

    Args:
        title: What the values are, for example "Waiting messages".
        samples: The samples, the oldest first. None is a gap.
        now: The time at the right end, in seconds since 1970.
        shown: Turns a value into a text for people.
        units: The units in which these texts are written, for example 1, 60 and 3600 for seconds. The lines of the grid
            are at round numbers of a unit.

    Returns:
        The chart. Its `runs` are empty if there are fewer than two samples.
    """
    known = _recent(samples, now)
    if len(known) < 2:
        return Chart(title, "", [], [], [])
    top = _round_up(max(value for _, value in known), units)
    lines = [Label(_LEFT - 8, _y(top * n / _LINES, top), shown(top * n / _LINES)) for n in range(_LINES + 1)]
    hours = [Label(_x(at, now), _HEIGHT - 6, f"{datetime.fromtimestamp(at, UTC):%H:%M}") for at in _full_hours(now)]
    most = shown(max(value for _, value in known))
    says = f"{title} in the last {HOURS} hours: now {shown(known[-1][1])}, at most {most}"
    return Chart(title, says, lines, hours, _runs(known, now, top))


def spark(samples: Samples, now: float) -> str:
    """Return the points of a chart of 100 by 24 without axes, or "" if there are fewer than two samples."""
    known = _recent(samples, now)
    if len(known) < 2:
        return ""
    top = max(1.0, *(value for _, value in known))
    return " ".join(f"{100 * (1 - (now - at) / (HOURS * 3600)):.1f},{22 - 20 * value / top:.1f}" for at, value in known)


def _recent(samples: Samples, now: float) -> list[tuple[float, float]]:
    return [(at, value) for at, value in samples if value is not None and at >= now - HOURS * 3600]


def _runs(known: Sequence[tuple[float, float]], now: float, top: float) -> list[str]:
    runs: list[list[tuple[float, float]]] = []
    for at, value in known:
        if not runs or at - runs[-1][-1][0] > _GAP:
            runs.append([])
        runs[-1].append((at, value))
    return [" ".join(f"{_x(at, now):.1f},{_y(value, top):.1f}" for at, value in run) for run in runs]


def _full_hours(now: float) -> list[float]:
    """Return the full hours that have room for a label."""
    last = now - now % 3600
    return [at for at in (last - n * 3600 for n in range(HOURS)) if 600 < now - at < HOURS * 3600 - 900]


def _x(at: float, now: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (1 - (now - at) / (HOURS * 3600))


def _y(value: float, top: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)


def _round_up(value: float, units: Sequence[float]) -> float:
    """Return the next number of the form 3, 6, 9, 15, 30, 60 and so on, in its unit. Three lines divide it well."""
    unit = max((one for one in units if value >= one), default=units[0])
    step = 3.0 * unit
    while True:
        for factor in (1, 2, 3, 5):
            if step * factor >= value:
                return step * factor
        step *= 10
