"""The list of consumers, and the page of one: figures, charts, and everything that keeps its messages waiting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from cdcbridge.sinks.mask import masked
from cdcbridge.web.audit import audited
from cdcbridge.web.pages.charts import Chart, chart, spark
from cdcbridge.web.pages.judgement import LEVELS, judge, trend
from cdcbridge.web.pages.samples import Points, consumer_samples, pending_samples
from cdcbridge.web.pages.site import Elsewhere, Page, View, Visit
from cdcbridge.web.pages.wording import DURATIONS, duration, number

_CONSUMER: Final = "select id, mode, paused, config::text, created_at from show_consumer(%s)"
_SINK: Final = "select delivered, failed, retried, error, error_at, delivered_at from sinks where consumer_id = %s"
_LEASED: Final = "select * from leased_messages(%s, 20)"
_BLOCKED: Final = "select * from blocked_keys(%s, 20)"
_NEXT: Final = "select seq, topic, key, data::text, deliver_count, inserted_at from peek(%s, 10)"
_DELAYED: Final = "select seq, topic, key, data::text, not_visible_until from peek(%s, 10, true)"
_OFFSETS: Final = """
    select o.partition, o.seq, o.updated_at, case when o.leased_until > clock_timestamp() then o.leased_until end,
           o.lost, coalesce(pg_sequence_last_value('messages_seq'), 0) - o.seq
    from newest_offsets(%s) o order by o.partition"""
_PAUSE: Final = "update consumers set paused = %s, updated_at = now() where id = (consumer_named(%s)).id"


async def listed(visit: Visit) -> list[dict[str, Any]]:
    """Return the consumers that the visitor may see, the worst first.

    Each has its judgement, its small chart and its trend.
    """
    figures, now = visit.figures, visit.services.now()
    alarms, holders = figures.rows("alarms"), figures.rows("consumer_holders")
    samples = await pending_samples(visit.services.store)
    sinks = {one["name"]: one for one in figures.rows("sinks")}
    found = []
    for row in figures.consumers():
        if not visit.caller.sees(row["name"]):
            continue
        points = samples.get(row["name"], [])
        found.append({
            **row,
            "judgement": judge(row, alarms, holders),
            "spark": spark(points, now),
            "trend": trend(_known(points)),
            "sink": sinks.get(row["name"]),
        })  # fmt: skip
    return sorted(found, key=lambda one: (LEVELS.index(one["judgement"].level), one["name"]))


def visible_alarms(visit: Visit) -> list[dict[str, Any]]:
    """Return the alarms that the visitor may see. Those of the slot are for tokens that see all consumers."""
    caller = visit.caller
    return [
        one
        for one in visit.figures.rows("alarms")
        if (caller.consumers is None if one["consumer"] is None else caller.sees(one["consumer"]))
    ]


async def consumers(visit: Visit) -> Page:
    """List the consumers."""
    wanted = (visit.given("q") or "").lower()
    found = [one for one in await listed(visit) if wanted in one["name"]]
    return Page("consumers.html", {"title": "Consumers", "consumers": found, "q": wanted})


async def streams(visit: Visit) -> Page:
    """List the consumers with mode stream, with their partitions."""
    found = [one for one in await listed(visit) if one["mode"] == "stream"]
    for one in found:
        number_ = await visit.services.store.value("select id from show_consumer(%s)", (one["name"],))
        one["offsets"] = await visit.services.store.rows(_OFFSETS, (number_,))
    return Page("streams.html", {"title": "Streams", "streams": found})


async def consumer(visit: Visit) -> Page:
    """Show one consumer."""
    store, name = visit.services.store, visit.name
    number_, mode, paused, config, created = (await store.rows(_CONSUMER, (name,)))[0]
    row = next((one for one in visit.figures.consumers() if one["name"] == name), None)
    holders = [one for one in visit.figures.rows("consumer_holders") if one["consumer"] == name]
    samples = await consumer_samples(store, name)
    values: dict[str, Any] = {
        "title": name,
        "name": name,
        "mode": mode,
        "paused": paused,
        "created": created,
        "settings": _settings(config),
        "row": row,
        "judgement": judge({**row, "paused": paused}, visit.figures.rows("alarms"), holders) if row else None,
        "trend": trend(_known(samples.pending)),
        "charts": _charts(visit, samples.pending, samples.dead, samples.oldest),
        "holders": holders,
        "xmin": visit.figures.rows("xmin_holders") if visit.caller.consumers is None else [],
        "publishers": visit.figures.rows("holders") if visit.caller.consumers is None and mode == "stream" else [],
        "sink": next((one for one in visit.figures.rows("sinks") if one["name"] == name), None),
        "leased": [],
        "blocked": [],
        "next": [],
        "delayed": [],
        "offsets": [],
        "shows_data": visit.shows_data,
    }
    if mode == "stream":
        values["offsets"] = await store.rows(_OFFSETS, (number_,))
    else:
        values["leased"] = await store.rows(_LEASED, (number_,))
        values["blocked"] = await store.rows(_BLOCKED, (number_,)) if mode == "fifo" else []
        if visit.shows_data:
            values["next"] = await _messages(visit, _NEXT)
            values["delayed"] = await _messages(visit, _DELAYED)
    return Page("consumer.html", values)


async def ask_pause(visit: Visit) -> Page:
    """Ask before a consumer is paused."""
    return Page("ask.html", {
        "title": f"Pause {visit.name}?",
        "text": "Its receivers get nothing until somebody resumes it. Messages that are in flight may still be acked."
                " New messages wait, and the log keeps them.",
        "to": f"/consumers/{visit.name}/pause", "back": f"/consumers/{visit.name}", "button": "Pause", "fields": {},
        "danger": False,
    })  # fmt: skip


async def pause(visit: Visit) -> Elsewhere:
    """Pause a consumer."""
    return await _pause(visit, paused=True)


async def resume(visit: Visit) -> Elsewhere:
    """Resume a consumer."""
    return await _pause(visit, paused=False)


async def _pause(visit: Visit, *, paused: bool) -> Elsewhere:
    action, store = "pause" if paused else "resume", visit.services.store
    async with audited(store, visit.caller, visit.address, action, visit.name, {}), store.session() as session:
        await session.execute(_PAUSE.encode(), (paused, visit.name))
    visit.services.arrivals.tell(visit.name)
    return Elsewhere(f"/consumers/{visit.name}?said={action}d")


async def _messages(visit: Visit, query: str) -> list[dict[str, Any]]:
    rows = await visit.services.store.records(query, (visit.name,))
    return [{**row, "data": hidden(visit, row["data"])} for row in rows]


def hidden(visit: Visit, data: str | None) -> str | None:
    """Return a message's data without the values that `api.mask` hides."""
    mask = visit.services.config.api.mask
    return masked(data, mask) if data is not None and mask else data


def _charts(visit: Visit, pending: Points, dead: Points, oldest: Points) -> list[Chart]:
    now = visit.services.now()
    return [
        chart("Waiting messages", pending, now, number),
        chart("Age of the oldest message", oldest, now, duration, DURATIONS),
        chart("Dead letters", dead, now, number),
    ]


def _settings(config: str) -> list[tuple[str, str]]:
    """Return the settings of a consumer that are set, each as a text, without the sink's secrets."""
    found: Mapping[str, Any] = orjson.loads(config)
    return [
        (name, value if isinstance(value, str) else orjson.dumps(value).decode())
        for name, value in found.items()
        if value not in (None, [], {}, "") and name != "sink"
    ]


def _known(points: Points) -> list[tuple[float, float]]:
    return [(at, value) for at, value in points if value is not None]


_OF: Final = "/consumers/{name}"
VIEWS: Final = (
    View("GET", "/consumers", "look", consumers),
    View("GET", "/streams", "look", streams),
    View("GET", _OF, "look", consumer),
    View("GET", f"{_OF}/pause", "operate", ask_pause),
    View("POST", f"{_OF}/pause", "operate", pause),
    View("POST", f"{_OF}/resume", "operate", resume),
)
