"""Endpoints of states and figures: consumers, lag, metrics. And pause and resume.

The figures are those of `cdcbridge lag`, measured for each request. Never waits for a running bridge.
"""

from __future__ import annotations

from typing import Final

from cdcbridge.config import Config
from cdcbridge.errors import SourceUnavailable
from cdcbridge.observe.lag import Lag, measure, measure_store
from cdcbridge.web.calls import Answer, Call, Endpoint, documents

_CONSUMERS: Final = "select to_json(c)::text, c.name from consumer_lag() c order by c.name"
_CONSUMER: Final = (
    "select to_json(c)::text, (select to_json(l)::text from consumer_lag(c.name) l), (select to_json(r)::text"
    " from (select per_second_in, per_second_out, growth, seconds from consumer_rates(c.name)) r)"
    " from (select id, name, mode, paused, created_at, updated_at, config from show_consumer(%s)) c"
)
_PAUSE: Final = "update consumers set paused = %s, updated_at = now() where id = (consumer_named(%s)).id"


async def consumers(call: Call) -> Answer:
    """List the consumers and their unfinished messages."""
    rows = await call.store.rows(_CONSUMERS)
    return {"consumers": documents([row for row in rows if call.caller.sees(row[1])])}


async def consumer(call: Call) -> Answer:
    """Show the settings, the state, the unfinished messages and the rates of a consumer."""
    shown, lag, rates = (await call.store.rows(_CONSUMER, (call.path["name"],)))[0]
    return {
        "consumer": documents([(shown,)])[0],
        "lag": documents([(lag,)])[0],
        "rates": None if rates is None else documents([(rates,)])[0],
    }


async def pause(call: Call) -> Answer:
    """Pause the deliveries of a consumer."""
    return await _pause(call, paused=True)


async def resume(call: Call) -> Answer:
    """Resume the deliveries of a consumer."""
    return await _pause(call, paused=False)


async def _pause(call: Call, *, paused: bool) -> Answer:
    name = call.path["name"]
    async with call.store.session() as session:
        await session.execute(_PAUSE.encode(), (paused, name))
    call.services.arrivals.tell(name)
    return {"paused" if paused else "resumed": name}


async def lag(call: Call) -> Answer:
    """Measure the lag of the slot and of all consumers."""
    call.caller.refuse_restricted("GET /api/consumers lists them.")
    found = await call.services.beside(measured, call.services.config)
    return found.as_json()


def measured(config: Config) -> Lag:
    """Return the lag of the slot and of all consumers, or of the consumers alone if the source is away."""
    try:
        return measure(config)
    except SourceUnavailable as error:
        return measure_store(config, error)


_OF = "/api/consumers/{name}"
ENDPOINTS = (
    Endpoint(
        "GET",
        "/api/consumers",
        "look",
        {"consumers": {"type": "array", "items": {"$ref": "#/components/schemas/ConsumerLag"}}},
        consumers,
    ),
    Endpoint(
        "GET",
        _OF,
        "look",
        {
            "consumer": {"type": "object"},
            "lag": {"$ref": "#/components/schemas/ConsumerLag"},
            "rates": {"anyOf": [{"$ref": "#/components/schemas/Rates"}, {"type": "null"}]},
        },
        consumer,
    ),
    Endpoint("POST", f"{_OF}/pause", "operate", {"paused": {"type": "string"}}, pause),
    Endpoint("POST", f"{_OF}/resume", "operate", {"resumed": {"type": "string"}}, resume),
    Endpoint("GET", "/api/lag", "look", {}, lag),
)
