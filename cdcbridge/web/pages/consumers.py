"""The list of consumers, and the page of one: figures, charts, and everything that keeps its messages waiting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from cdcbridge.web.audit import audited
from cdcbridge.web.calls import hidden_data
from cdcbridge.web.pages.charts import Chart, chart, spark
from cdcbridge.web.pages.judgement import LEVELS, Assessment, judge, trend
from cdcbridge.web.pages.samples import Points, consumer_samples, rates_of
from cdcbridge.web.pages.site import Elsewhere, Page, View, Visit
from cdcbridge.web.pages.wording import DURATIONS, duration, number

_CONSUMER: Final = "select id, mode, paused, config::text, created_at from show_consumer(%s)"
_LEASED: Final = "select * from leased_messages(%s, 20)"
_BLOCKED: Final = "select * from blocked_keys(%s, 20)"
_NEXT: Final = "select seq, topic, key, data::text, deliver_count, inserted_at from peek(%s, 10)"
_DELAYED: Final = "select seq, topic, key, data::text, not_visible_until from peek(%s, 10, true)"
_OFFSETS: Final = """
    select c.name, o.partition, o.seq, o.updated_at,
           case when o.leased_until > clock_timestamp() then o.leased_until end, o.lost,
           coalesce(pg_sequence_last_value('messages_seq'), 0) - o.seq, o.member
    from consumers c cross join lateral newest_offsets(c.id) o where c.name = any (%s) order by c.name, o.partition"""
_SHOWN: Final = 200  # consumers on one page
_PAUSE: Final = "update consumers set paused = %s, updated_at = now() where id = (consumer_named(%s)).id"


async def listed(visit: Visit) -> list[dict[str, Any]]:
    """Return the consumers that the visitor may see, the worst first.

    Each has its judgement, its small chart and its trend.
    """
    figures, now = visit.figures, visit.services.now()
    judgements = _judgements(visit)
    samples, rates = await visit.services.sparks.samples()
    sinks = {one["name"]: one for one in figures.rows("sinks")}
    found = []
    for row in figures.consumers():
        if not visit.caller.sees(row["name"]):
            continue
        points = samples.get(row["name"], [])
        found.append({
            **row,
            "judgement": judgements[row["name"]],
            "spark": spark(points, now),
            "trend": trend(_known(points), moves=judgements[row["name"]].moves),
            "sink": sinks.get(row["name"]),
            "rates": rates.get(row["name"]),
        })  # fmt: skip
    return sorted(found, key=lambda one: (LEVELS.index(one["judgement"].level), one["name"]))


def _judgements(visit: Visit) -> dict[str, Assessment]:
    """Return the judgement of each consumer that was measured, by its name."""
    figures = visit.figures
    alarms = {one["consumer"]: one for one in reversed(figures.rows("alarms")) if one["consumer"]}
    sinks = {one["name"] for one in figures.rows("sinks")}
    held: dict[str, list[dict[str, Any]]] = {}
    for one in figures.rows("consumer_holders"):
        held.setdefault(one["consumer"], []).append(one)
    return {
        row["name"]: judge(row, alarms.get(row["name"]), held.get(row["name"], []), sink=row["name"] in sinks)
        for row in figures.consumers()
    }


async def consumers(visit: Visit) -> Page:
    """List the consumers."""
    wanted = (visit.given("q") or "").lower()
    found = [one for one in await listed(visit) if wanted in one["name"]]
    values = {"consumers": found[:_SHOWN], "more": max(0, len(found) - _SHOWN), "q": wanted}
    return Page("consumers.html", {"title": "Consumers", **values})


async def streams(visit: Visit) -> Page:
    """List the consumers with mode stream, with their partitions."""
    found = [one for one in await listed(visit) if one["mode"] == "stream"]
    rows = await visit.services.store.rows(_OFFSETS, ([one["name"] for one in found],))
    for one in found:
        one["offsets"] = [row[1:] for row in rows if row[0] == one["name"]]
    return Page("streams.html", {"title": "Streams", "streams": found})


async def consumer(visit: Visit) -> Page:
    """Show one consumer."""
    store, name = visit.services.store, visit.name
    number_, mode, paused, config, created = (await store.rows(_CONSUMER, (name,)))[0]
    row = next((one for one in visit.figures.consumers() if one["name"] == name), None)
    holders = visit.sessions([one for one in visit.figures.rows("consumer_holders") if one["consumer"] == name])
    judgement = _judgements(visit).get(name)
    samples, all_seen = await consumer_samples(store, name), visit.caller.consumers is None
    values: dict[str, Any] = {
        "title": name,
        "name": name,
        "mode": mode,
        "paused": paused,
        "created": created,
        "settings": _settings(config),
        "row": row,
        "judgement": judgement,
        "trend": trend(_known(samples.pending), moves=judgement is None or judgement.moves),
        "rates": (await rates_of(store, name)).get(name),
        "charts": _charts(visit, samples.pending, samples.dead, samples.oldest),
        "holders": holders,
        "xmin": visit.sessions(visit.figures.rows("xmin_holders")) if all_seen else [],
        "publishers": visit.sessions(visit.figures.rows("holders")) if all_seen and mode == "stream" else [],
        "sink": next((one for one in visit.figures.rows("sinks") if one["name"] == name), None),
        "leased": [],
        "blocked": [],
        "next": [],
        "delayed": [],
        "offsets": [],
        "shows_data": visit.shows_data,
        "tries": visit.may_try,
    }
    if mode == "stream":
        values["offsets"] = [row[1:] for row in await store.rows(_OFFSETS, ([name],))]
    else:
        values["leased"] = await store.rows(_LEASED, (number_,))
        values["blocked"] = await store.rows(_BLOCKED, (number_,)) if mode == "fifo" else []
        if visit.shows_data:
            values["next"] = await _messages(visit, _NEXT)
            values["delayed"] = await _messages(visit, _DELAYED)
    return Page("consumer.html", values)


async def ask_pause(visit: Visit) -> Page:
    """Ask before a consumer is paused."""
    return _ask(visit, "Pause", "Its receivers get nothing until somebody resumes it. Messages that are in flight may"
                " still be acked. New messages wait, and the log keeps them.")  # fmt: skip


async def ask_resume(visit: Visit) -> Page:
    """Ask before a consumer is resumed."""
    return _ask(visit, "Resume", "Its receivers get messages again, the oldest first.")


def _ask(visit: Visit, verb: str, text: str) -> Page:
    here = f"/consumers/{visit.name}"
    return Page("ask.html", {
        "title": f"{verb} {visit.name}?", "text": text, "to": f"{here}/{verb.lower()}", "back": here, "button": verb,
        "fields": {}, "danger": False,
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
    """Return a message's data as the visitor may see it, or None."""
    return hidden_data(data, visit.services.config.api.mask) if data is not None and visit.shows_data else None


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
    View("GET", f"{_OF}/resume", "operate", ask_resume),
    View("POST", f"{_OF}/resume", "operate", resume),
)
