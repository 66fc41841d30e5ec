"""Try a filter or a transform on recent messages. Nothing is delivered, and nothing changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Final

import orjson

from cdcbridge.config import Config
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.routing.filters import Filter
from cdcbridge.sinks.trial import trial
from cdcbridge.store.filter_trial import Trial, trials, wanted
from cdcbridge.web.pages.site import Page, View, Visit
from cdcbridge.web.problems import RequestRefused

_TRIED: Final = 50  # messages on which a filter is tried


async def filter_trial(visit: Visit) -> Page:
    """Try a filter on the latest messages of a consumer's tables and topics. Nothing is delivered."""
    if not visit.shows_data:
        raise RequestRefused(403, "the result of a filter shows data, which `api.browse` forbids")
    given = visit.given("filter")
    source, found, wrong = await visit.services.beside(_tried, visit.services.config, visit.name, given)
    return Page("filter.html", {
        "title": f"Filter of {visit.name}", "name": visit.name, "filter": source, "trials": found, "wrong": wrong,
        "counts": Counter(one.result for one in found).most_common(), "mask": visit.services.config.api.mask,
    })  # fmt: skip


def _tried(config: Config, name: str, given: str | None) -> tuple[str, list[Trial], str]:
    """Return the filter, its results, and why it cannot be compiled."""
    with connect_for_calls(config.store_dsn, config.store.schema_, "cdcbridge serve") as store:
        subscription = wanted(config, store, name)
        present = subscription.filter.source if subscription.filter is not None else ""
        if given is not None:
            try:
                subscription = replace(subscription, filter=Filter(given))
            except ValueError as error:
                return given, [], str(error)
        return given or present, trials(store, subscription, _TRIED)[::-1], ""


async def transform_trial(visit: Visit) -> Page:
    """Show what the sink of a consumer would send for its latest messages, also with another transform."""
    if not visit.shows_data:
        raise RequestRefused(403, "what a sink would send shows data, which `api.browse` forbids")
    if visit.services.config.api.mask:
        raise RequestRefused(403, "a transform could show what `api.mask` hides",
                             hint="`cdcbridge sinks test NAME` shows it in a terminal.")  # fmt: skip
    source, sent, wrong = await visit.services.beside(
        _shaped, visit.services.config, visit.name, visit.given("transform")
    )
    return Page("transform.html", {
        "title": f"Sink of {visit.name}", "name": visit.name, "transform": source, "wrong": wrong,
        "sent": [orjson.dumps(one).decode() for one in sent],
    })  # fmt: skip


def _shaped(config: Config, name: str, given: str | None) -> tuple[str, list[dict[str, Any]], str]:
    """Return the transform, what the sink would send with it, and why it cannot be compiled."""
    consumer = next((one for one in config.consumers if one.name == name and one.sink is not None), None)
    if consumer is None or consumer.sink is None:
        raise RequestRefused(404, f"{name} has no sink in the configuration of this process")
    present = consumer.sink.transform or ""
    if given is not None:
        consumer = consumer.model_copy(update={"sink": consumer.sink.model_copy(update={"transform": given})})
    try:
        with connect_for_calls(config.store_dsn, config.store.schema_, "cdcbridge serve") as store:
            return given or present, trial(store, config, consumer, ()), ""
    except ValueError as error:
        return given or present, [], str(error)


VIEWS: Final = (
    View("GET", "/consumers/{name}/filter", "redrive", filter_trial),
    View("GET", "/consumers/{name}/transform", "redrive", transform_trial),
)
