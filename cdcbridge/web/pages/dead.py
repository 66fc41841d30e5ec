"""Dead letters: what failed and why, and retry or purge, one by one or by a filter.

A change by filter is made in steps of about a second. Each step continues after the last letter of the one before, and
none goes beyond the newest letter that existed when the page asked. So it ends, also if letters stay or die meanwhile.
A browser that is closed stops it between two steps. Never reads more than 100,000 letters for a page.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, Final
from urllib.parse import urlencode

from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_store, store_errors
from cdcbridge.store.redrive import PAGE, Redriven, redrive_page
from cdcbridge.web.audit import audited
from cdcbridge.web.pages.consumers import hidden, listed
from cdcbridge.web.pages.site import Elsewhere, Page, View, Visit
from cdcbridge.web.pages.wording import plural
from cdcbridge.web.problems import RequestRefused

FILTERS: Final = ("topic", "key", "reason")
_LETTERS: Final = "select * from letters_page(%s, %s, %s, %s, %s, 50)"
_LETTER: Final = (
    "select id, seq, topic, key, data::text, deliver_count, reason, history, commit_lsn::text, commit_time,"
    " inserted_at, died_at from dead_letters(%s, array[%s::bigint])"
)
_ID: Final = "select id, mode from show_consumer(%s)"
_REASONS: Final = "select * from letter_reasons(%s)"
_COUNT: Final = "select letters, complete, first, last from chosen_letters(%s, %s, %s, %s)"
_AFTER: Final = "select ids, failed, last from letters_after(%s, %s, %s, %s, %s, %s, 5000)"
_DELETE: Final = "delete from dead_messages where consumer_id = %s and id = any (%s)"
_STEP: Final = 1.0  # seconds of one step
_COUNTS: Final = ("retried", "removed", "kept", "purged")


async def overview(visit: Visit) -> Page:
    """List the consumers that have dead letters."""
    found = [one for one in await listed(visit) if one["dead"]]
    return Page("dead_overview.html", {"title": "Dead letters", "consumers": found})


async def letters(visit: Visit) -> Page:
    """List the dead letters of a consumer, the newest first."""
    store, chosen = visit.services.store, _chosen(visit)
    number, mode = (await store.rows(_ID, (visit.name,)))[0]
    rows = await store.records(_LETTERS, (number, *chosen.values(), visit.number("before")))
    return Page("dead.html", {
        "title": f"Dead letters of {visit.name}", "name": visit.name, "mode": mode, "chosen": chosen,
        "letters": [row for row in rows if row["seq"] is not None], "filter": _query(chosen),
        "older": next((row["id"] for row in rows if row["seq"] is None), None),
        "reasons": await store.rows(_REASONS, (number,)),
    })  # fmt: skip


async def letter(visit: Visit) -> Page:
    """Show one dead letter with its history."""
    mode = (await visit.services.store.rows(_ID, (visit.name,)))[0][1]
    row = (await visit.services.store.records(_LETTER, (visit.name, _id_of(visit))))[0]
    row["data"] = hidden(visit, row["data"])
    values = {"name": visit.name, "mode": mode, "letter": row, "shows_data": visit.shows_data}
    return Page("letter.html", {"title": f"Dead letter {row['id']}", **values})


async def ask(visit: Visit) -> Page:
    """Ask before dead letters are retried or purged by a filter."""
    verb, chosen, store = _verb(visit), _chosen(visit), visit.services.store
    number = (await store.rows(_ID, (visit.name,)))[0][0]
    count, complete, first, last = (await store.rows(_COUNT, (number, *chosen.values())))[0]
    many = plural(count, "dead letter") if complete else f"{count:,} or more dead letters"
    return Page("ask.html", {
        "title": f"{verb.capitalize()} {many} of {visit.name}?", "text": f"{_described(chosen)} {_EFFECTS[verb]}",
        "to": f"/consumers/{visit.name}/dead/{verb}", "back": f"/consumers/{visit.name}/dead?{_query(chosen)}",
        "button": verb.capitalize(), "danger": verb == "purge",
        "fields": {**_given(chosen), "first": first, "after": 0, "until": last},
    })  # fmt: skip


async def carry_out(visit: Visit) -> Page | Elsewhere:
    """Retry or purge for about a second, and show what was done."""
    verb, chosen, store = _verb(visit), _chosen(visit), visit.services.store
    first, after, until = (visit.number(name) for name in ("first", "after", "until"))
    if first is None or after is None or until is None:
        raise RequestRefused(422, "the form lacks its letters", hint="Ask again from the list.")
    number = (await store.rows(_ID, (visit.name,)))[0][0]
    details = {"filter": _given(chosen), "after": after, "until": until}
    async with audited(store, visit.caller, visit.address, verb, visit.name, details) as result:
        step = _Step(visit.services.config, visit.name, number, verb, chosen, result)
        place = await visit.services.beside(step.run, after, until)
    counts = {name: result.get(name, 0) + (visit.number(name) or 0) for name in _COUNTS}
    done = {name: count for name, count in counts.items() if count}
    if place is None:
        return Elsewhere(f"/consumers/{visit.name}/dead?{urlencode({'said': verb, **done})}")
    return Page("progress.html", {
        "title": f"{verb.capitalize()} dead letters of {visit.name}", "name": visit.name, "done": done,
        "to": f"/consumers/{visit.name}/dead/{verb}", "passed": place - first, "all": max(1, until - first),
        "fields": {**_given(chosen), "first": first, "after": place, "until": until, **done},
    })  # fmt: skip


async def ask_one(visit: Visit) -> Page:
    """Ask before one dead letter is retried or purged."""
    verb, number = _verb(visit), _id_of(visit)
    return Page("ask.html", {
        "title": f"{verb.capitalize()} dead letter {number} of {visit.name}?", "text": _EFFECT[verb], "fields": {},
        "to": f"/consumers/{visit.name}/dead/{number}/{verb}", "back": f"/consumers/{visit.name}/dead/{number}",
        "button": verb.capitalize(), "danger": verb == "purge",
    })  # fmt: skip


async def carry_out_one(visit: Visit) -> Elsewhere:
    """Retry or purge one dead letter."""
    verb, number, store = _verb(visit), _id_of(visit), visit.services.store
    retry = verb == "retry"
    query = f"select {'redrive' if retry else 'purge'}(%s, %s::bigint[])"
    async with audited(store, visit.caller, visit.address, verb, visit.name, {"ids": [number]}) as result:
        done = await store.value(query, (visit.name, [number]))
        result.update({"retried": done, "kept": 1 - done} if retry else {"purged": done})
    return Elsewhere(f"/consumers/{visit.name}/dead?{urlencode({'said': verb, **result})}")


class _Step:
    """One step of a change by filter, in a thread with a session of its own.

    Args:
        config: The configuration.
        name: The consumer's name.
        number: The consumer's id.
        verb: retry or purge.
        chosen: The filter.
        counts: What was done. The step adds to it as it goes, so that the audit log has it if the step fails.
    """

    def __init__(
        self, config: Config, name: str, number: int, verb: str, chosen: dict[str, str | None], counts: dict[str, Any]
    ) -> None:
        self._config = config
        self._name = name
        self._number = number
        self._change = self._retry if verb == "retry" else self._purge
        self._chosen = chosen
        self._counts = counts

    def run(self, after: int, until: int) -> int | None:
        """Change letters with ids above `after` and up to `until`. Return where to continue, or None at the end."""
        began, place = monotonic(), after
        config = self._config
        with store_errors(), connect_store(config.store_dsn, config.store.schema_, "cdcbridge serve") as store:
            while monotonic() - began < _STEP:
                values = (self._number, *self._chosen.values(), place, until)
                ids, failed, last = store.execute(_AFTER, values).fetchone() or ([], [], None)
                for start in range(0, len(ids), PAGE):
                    self._change(store, ids[start : start + PAGE], failed[start : start + PAGE])
                if last is None:
                    return None
                place = last
        return place

    def _retry(self, store: Connection, ids: list[int], failed: list[bool]) -> None:
        done = Redriven()
        redrive_page(store, self._name, list(zip(ids, failed, strict=True)), done)
        self._add("retried", done.redriven)
        self._add("removed", done.not_wanted)
        self._add("kept", len(ids) - done.redriven - done.not_wanted)

    def _purge(self, store: Connection, ids: list[int], _: list[bool]) -> None:
        self._add("purged", store.execute(_DELETE, (self._number, ids)).rowcount)

    def _add(self, name: str, count: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + count


_EFFECT: Final = {
    "retry": "Its message is put at the end of the queue, and its deliveries are counted anew.",
    "purge": "It is deleted for good. Nothing brings it back.",
}
_EFFECTS: Final = {
    "retry": "They are put at the end of the queue, and their deliveries are counted anew. A letter on which the filter"
    " of the consumer failed is compared with its present filter first. If it does not match, it is removed.",
    "purge": "They are deleted for good. Nothing brings them back.",
}


def _chosen(visit: Visit) -> dict[str, str | None]:
    """Return the filter of a list or a form: topic, key and the beginning of the reason, in this order."""
    return {name: visit.given(name) for name in FILTERS}


def _given(chosen: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in chosen.items() if value is not None}


def _query(chosen: dict[str, str | None]) -> str:
    return urlencode(_given(chosen))


def _described(chosen: dict[str, str | None]) -> str:
    """Return the filter as a sentence."""
    parts = [
        f"its reason begins with “{value}”" if name == "reason" else f"its {name} is “{value}”"
        for name, value in _given(chosen).items()
    ]
    return f"A letter is chosen if {' and '.join(parts)}." if parts else "All letters are chosen."


def _verb(visit: Visit) -> str:
    verb = visit.path["verb"]
    if verb not in _EFFECT:
        raise RequestRefused(404, f"there is no page to {verb} dead letters")
    return verb


def _id_of(visit: Visit) -> int:
    return int(visit.path["id"])


_OF: Final = "/consumers/{name}/dead"
VIEWS: Final = (
    View("GET", "/dead", "look", overview),
    View("GET", _OF, "look", letters),
    View("GET", f"{_OF}/{{id:number}}", "look", letter),
    View("GET", f"{_OF}/{{verb:str}}", "redrive", ask),
    View("POST", f"{_OF}/{{verb:str}}", "redrive", carry_out),
    View("GET", f"{_OF}/{{id:number}}/{{verb:str}}", "redrive", ask_one),
    View("POST", f"{_OF}/{{id:number}}/{{verb:str}}", "redrive", carry_out_one),
)
