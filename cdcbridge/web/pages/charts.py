"""Draw charts as SVG, from samples of the last hours.

The colors are those of the style sheet. A sentence in each chart says the same to a screen reader. This module is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, TypeAlias

from markupsafe import Markup, escape

Samples: TypeAlias = Sequence[tuple[float, float | None]]  # seconds since 1970, and the value
HOURS: Final = 6
_WIDTH, _HEIGHT = 640, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 6, 8, 22
_GAP: Final = 150.0  # seconds without a sample, after which the line is interrupted
_LINES: Final = 3


def chart(title: str, samples: Samples, now: float, shown: Callable[[float], str]) -> Markup:
    """Draw a chart of the last six hours.

    Args:
        title: What the values are, for example "Waiting messages".
        samples: The samples, the oldest first. None is a gap.
        now: The time at the right end, in seconds since 1970.
        shown: Turns a value into a text for people.

    Returns:
        An `svg` element, or a sentence if there are fewer than two samples.
    """
    known = [(at, value) for at, value in samples if value is not None and at >= now - HOURS * 3600]
    if len(known) < 2:
        return Markup('<p class="empty">No samples yet. The bridge takes one each minute.</p>')
    top = _round_up(max(value for _, value in known))
    grid = "".join(_grid_line(top * n / _LINES, top, shown) for n in range(_LINES + 1))
    hours = "".join(_hour(at, now) for at in _full_hours(now))
    says = f"{title} in the last {HOURS} hours: now {shown(known[-1][1])}, at most {shown(max(v for _, v in known))}"
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{says}"><g class="grid">{grid}{hours}</g>{lines}'
        "</svg>"
    ).format(w=_WIDTH, h=_HEIGHT, says=says, grid=Markup(grid), hours=Markup(hours), lines=_lines(known, now, top))


def spark(samples: Samples, now: float) -> Markup:
    """Draw a small chart without axes, for a row of a table. Screen readers skip it."""
    known = [(at, value) for at, value in samples if value is not None and at >= now - HOURS * 3600]
    if len(known) < 2:
        return Markup("")
    top = max(1.0, max(value for _, value in known))
    points = " ".join(
        f"{100 * (1 - (now - at) / (HOURS * 3600)):.1f},{22 - 20 * value / top:.1f}" for at, value in known
    )
    return Markup('<svg class="spark" viewBox="0 0 100 24" aria-hidden="true"><polyline points="{}"/></svg>').format(points)


def _lines(known: Sequence[tuple[float, float]], now: float, top: float) -> Markup:
    runs: list[list[tuple[float, float]]] = []
    for at, value in known:
        if not runs or at - runs[-1][-1][0] > _GAP:
            runs.append([])
        runs[-1].append((at, value))
    drawn = Markup("")
    floor = _HEIGHT - _BOTTOM
    for run in runs:
        points = [f"{_x(at, now):.1f},{_y(value, top):.1f}" for at, value in run]
        first, last = points[0].partition(",")[0], points[-1].partition(",")[0]
        drawn += Markup('<polygon class="area" points="{f},{y} {p} {l},{y}"/><polyline class="line" points="{p}"/>').format(
            f=first, l=last, y=floor, p=" ".join(points)
        )
    return drawn


def _grid_line(value: float, top: float, shown: Callable[[float], str]) -> str:
    y = _y(value, top)
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(shown(value))}</text>'
    )


def _hour(at: float, now: float) -> str:
    label = f"{datetime.fromtimestamp(at, UTC):%H:%M}"
    return f'<text x="{_x(at, now):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{label}</text>'


def _full_hours(now: float) -> list[float]:
    last = now - now % 3600
    return [at for at in (last - n * 3600 for n in range(HOURS)) if now - at < HOURS * 3600 - 900 and now - at > 600]


def _x(at: float, now: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (1 - (now - at) / (HOURS * 3600))


def _y(value: float, top: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)


def _round_up(value: float) -> float:
    """Return the next number of the form 3, 6, 9, 15, 30, …, which three grid lines divide well."""
    step = 3.0
    while step < value:
        for factor in (1, 2, 3, 5):
            if step * factor >= value:
                return step * factor
        step *= 10
    return step
