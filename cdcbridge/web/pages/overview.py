"""The first page: is everything well, and if not, what is wrong and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from cdcbridge.store.presence import RUNNING, Process
from cdcbridge.web.pages.charts import Chart, chart
from cdcbridge.web.pages.consumers import listed
from cdcbridge.web.pages.judgement import Assessment, judge_all
from cdcbridge.web.pages.samples import slot_samples
from cdcbridge.web.pages.site import Page, View, Visit, visible_alarms
from cdcbridge.web.pages.wording import DURATIONS, SIZES, duration, number, size

_LAST_ERROR: Final = "select message, hint, holder, extract(epoch from clock_timestamp() - at)::float8 from last_error"
_LEADERS: Final = "select 'leaders'::regclass::oid::int8"
_WORST: Final = 6  # consumers on the first page


async def overview(visit: Visit) -> Page:
    """Show the bridge, the slot, the alarms, and the consumers that need attention."""
    store, figures = visit.services.store, visit.figures
    every = await listed(visit)
    consumers = [one for one in every if one["judgement"].level in ("bad", "warn")]
    values: dict[str, Any] = {
        "title": "Overview",
        "consumers": consumers[:_WORST],
        "more": max(0, len(consumers) - _WORST),
        "all_consumers": every,
        "found_alarms": visible_alarms(visit.caller, figures),
        "bridges": [],
        "slot": None,
        "source_error": None,
        "charts": (),
        "last_error": None,
        "whole": Assessment("warn" if consumers else "ok", "Your consumers", ""),
    }
    if visit.caller.consumers is None:
        leaders = await store.value(_LEADERS)
        values["bridges"] = [asdict(Process(*row)) for row in await store.rows(RUNNING, {"leaders": leaders})]
        values["whole"] = judge_all(
            figures.lag, age=figures.age, stale=figures.stale, bridges=values["bridges"], attention=len(consumers)
        )
        values["source_error"] = figures.lag.get("source_error")
        values["slot"] = _slot(figures.lag)
        values["last_error"] = next(iter(await store.rows(_LAST_ERROR)), None)
        values["charts"] = await _charts(visit)
    return Page("overview.html", values)


async def _charts(visit: Visit) -> list[Chart]:
    samples = await slot_samples(visit.services.store)
    now = visit.services.now()
    return [
        chart("WAL that the slot retains", samples.retained, now, size, SIZES),
        chart("Lag of the slot", samples.lag, now, duration, DURATIONS),
        chart("Messages per minute into the log", samples.rate, now, number),
    ]


def _slot(lag: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the figures of the slot, with the share of its limit that is used."""
    slots, health = lag.get("slots") or [], lag.get("slot_health") or []
    if not slots:
        return None
    slot = {**slots[0], **health[0]}
    limit = lag.get("wal_limit_bytes")
    retained = slot["retained_bytes"]
    slot["limit_bytes"] = limit
    slot["free_bytes"] = lag.get("disk_free_bytes")
    slot["share"] = min(100, round(100 * retained / limit)) if limit and retained is not None else None
    return slot


VIEWS: Final = (View("GET", "/", "look", overview),)
