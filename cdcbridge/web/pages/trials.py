"""Try a filter or a transform on recent messages. Nothing is delivered, and nothing changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import orjson

from cdcbridge.config import Config
from cdcbridge.database import Connection, store_errors
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.routing.filters import Filter
from cdcbridge.sinks.trial import trial
from cdcbridge.store.filter_trial import Trial, trials, wanted
from cdcbridge.web.pages.site import Page, View, Visit
from cdcbridge.web.problems import RequestRefused

_TRIED: Final = 50  # messages on which a filter is tried
_LOOKED: Final = 200_000  # of the newest messages of the log, among which they are found


async def filter_trial(visit: Visit) -> Page:
    """Try a filter on the latest messages of a consumer's tables and topics. Nothing is delivered."""
    _refuse(visit, "cdcbridge filter test")
    given = visit.given("filter")
    source, found, wrong = await visit.services.beside(_tried, visit.services.config, visit.name, given)
    return Page("filter.html", {
        "title": f"Filter of {visit.name}", "name": visit.name, "filter": source, "trials": found, "wrong": wrong,
        "counts": Counter(one.result for one in found).most_common(),
    })  # fmt: skip


def _tried(config: Config, name: str, given: str | None) -> tuple[str, list[Trial], str]:
    """Return the filter, its results, and why it cannot be compiled."""
    with _store(config) as store:
        subscription = wanted(config, store, name)
        present = subscription.filter.source if subscription.filter is not None else ""
        if given is not None:
            try:
                subscription = replace(subscription, filter=Filter(given))
            except ValueError as error:
                return given, [], str(error)
        return given or present, trials(store, subscription, _TRIED, _low(store))[::-1], ""


async def transform_trial(visit: Visit) -> Page:
    """Show what the sink of a consumer would send for its latest messages, also with another transform."""
    _refuse(visit, "cdcbridge sinks test")
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
        with _store(config) as store:
            return given or present, trial(store, config, consumer, (), _low(store)), ""
    except ValueError as error:
        return given or present, [], str(error)


def _refuse(visit: Visit, command: str) -> None:
    """Raise RequestRefused if a trial would show the visitor data that is hidden from them.

    An expression can read each column of each message, whatever the consumer itself receives.
    """
    hint = f"`{command} {visit.name}` does the same in a terminal."
    visit.caller.refuse_restricted(hint)
    if not visit.shows_data:
        raise RequestRefused(403, "a trial shows data, which `api.browse` hides", hint=hint)
    if visit.services.config.api.mask:
        raise RequestRefused(403, "an expression could show what `api.mask` hides", hint=hint)


@contextmanager
def _store(config: Config) -> Iterator[Connection]:
    """Open a session whose statements are bounded, because two threads serve all trials."""
    with store_errors(), connect_for_calls(config.store_dsn, config.store.schema_, "cdcbridge serve") as store:
        store.execute("set statement_timeout = '10s'")
        yield store


def _low(store: Connection) -> int:
    """Return the seq below which a trial does not look for messages."""
    row = store.execute("select pg_sequence_last_value('messages_seq')").fetchone()
    return max(0, (row[0] or 0) - _LOOKED) if row else 0


VIEWS: Final = (
    View("GET", "/consumers/{name}/filter", "redrive", filter_trial),
    View("GET", "/consumers/{name}/transform", "redrive", transform_trial),
)
