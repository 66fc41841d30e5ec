"""Dead letters: what failed and why, and retry or purge, one by one or by a filter.

A change by filter is made in steps of a second or two. The page sends the next step until nothing is left, so that
progress is visible and a closed browser stops it between two steps. It only touches letters that existed when it
began: a message that fails again is not retried for ever. Never counts more than 10,000 letters.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, Final
from urllib.parse import urlencode

from cdcbridge.database import connect_store, store_errors
from cdcbridge.store.redrive import PAGE, Redriven, chosen_letters, redrive_page
from cdcbridge.web.audit import audited
from cdcbridge.web.pages.consumers import hidden, listed
from cdcbridge.web.pages.site import Elsewhere, Page, View, Visit
from cdcbridge.web.pages.wording import plural
from cdcbridge.web.problems import RequestRefused

FILTERS: Final = ("topic", "key", "reason")
_LETTERS: Final = (
    "select id, seq, topic, key, data::text, deliver_count, reason, history, commit_lsn::text, commit_time,"
    " inserted_at, died_at from letters_page(%s, %s, %s, %s, %s, 50)"
)
_LETTER: Final = (
    "select id, seq, topic, key, data::text, deliver_count, reason, history, commit_lsn::text, commit_time,"
    " inserted_at, died_at from dead_letters(%s, array[%s::bigint])"
)
_ID: Final = "select id, mode from show_consumer(%s)"
_REASONS: Final = "select * from letter_reasons(%s)"
_COUNT: Final = "select chosen_letters(%s, %s, %s, %s, %s, 10001)"
_LAST: Final = "select coalesce(max(id), 0) from dead_messages where consumer_id = %s"
_PURGE: Final = "select purge(%s, %s::bigint[])"
_STEP: Final = 1.5  # seconds of one step
_AT_MOST: Final = 10_000


async def overview(visit: Visit) -> Page:
    """List the consumers that have dead letters."""
    found = [one for one in await listed(visit) if one["dead"]]
    return Page("dead_overview.html", {"title": "Dead letters", "consumers": found})


async def letters(visit: Visit) -> Page:
    """List the dead letters of a consumer, the newest first."""
    store, chosen = visit.services.store, _chosen(visit)
    number, mode = (await store.rows(_ID, (visit.name,)))[0]
    rows = await store.records(_LETTERS, (number, *chosen.values(), _number(visit, "before")))
    found = [_letter(visit, row) for row in rows]
    return Page("dead.html", {
        "title": f"Dead letters of {visit.name}", "name": visit.name, "mode": mode, "letters": found, "chosen": chosen,
        "reasons": await store.rows(_REASONS, (number,)), "filter": _query(chosen), "shows_data": visit.shows_data,
        "older": found[-1]["id"] if len(found) == 50 else None, "page_of": _number(visit, "before"),
    })  # fmt: skip


async def letter(visit: Visit) -> Page:
    """Show one dead letter with its history."""
    row = (await visit.services.store.records(_LETTER, (visit.name, _id_of(visit))))[0]
    values = {"name": visit.name, "letter": _letter(visit, row), "shows_data": visit.shows_data}
    return Page("letter.html", {"title": f"Dead letter {row['id']}", **values})


async def ask(visit: Visit) -> Page:
    """Ask before dead letters are retried or purged by a filter."""
    verb, chosen, store = _verb(visit), _chosen(visit), visit.services.store
    number = (await store.rows(_ID, (visit.name,)))[0][0]
    last = await store.value(_LAST, (number,))
    count = await store.value(_COUNT, (number, *chosen.values(), last))
    many = f"more than {_AT_MOST:,} dead letters" if count > _AT_MOST else plural(count, "dead letter")
    effect = (
        "They are put at the end of the queue, and their deliveries are counted anew."
        if verb == "retry"
        else "They are deleted for good. Nothing brings them back."
    )
    return Page("ask.html", {
        "title": f"{verb.capitalize()} {many} of {visit.name}?", "text": f"{_described(chosen)} {effect}",
        "to": f"/consumers/{visit.name}/dead/{verb}", "back": f"/consumers/{visit.name}/dead?{_query(chosen)}",
        "button": verb.capitalize(), "danger": verb == "purge",
        "fields": {**_given(chosen), "until": last, "done": 0, "of": count},
    })  # fmt: skip


async def carry_out(visit: Visit) -> Page | Elsewhere:
    """Retry or purge for a second or two, and show what is left."""
    verb, chosen, done = _verb(visit), _chosen(visit), _number(visit, "done") or 0
    until = _number(visit, "until")
    if until is None:
        raise RequestRefused(422, "the form lacks the id of the newest dead letter", hint="Ask again from the list.")
    details = {"filter": _given(chosen), "until": until}
    async with audited(visit.services.store, visit.caller, visit.address, verb, visit.name, details) as result:
        step = _retried if verb == "retry" else _purged
        counted, left = await visit.services.beside(step, visit.services.config, visit.name, chosen, until)
        result.update(counted)
    done += sum(counted.values()) - counted.get("kept", 0)
    if not left:
        return Elsewhere(f"/consumers/{visit.name}/dead?said={verb}&n={done}&kept={counted.get('kept', 0)}")
    return Page("progress.html", {
        "title": f"{verb.capitalize()} dead letters of {visit.name}", "name": visit.name, "done": done, "left": left,
        "to": f"/consumers/{visit.name}/dead/{verb}", "button": verb.capitalize(),
        "fields": {**_given(chosen), "until": until, "done": done, "of": done + left},
    })  # fmt: skip


async def ask_one(visit: Visit) -> Page:
    """Ask before one dead letter is retried or purged."""
    verb, number = _verb(visit), _id_of(visit)
    effect = (
        "Its message is put at the end of the queue, and its deliveries are counted anew."
        if verb == "retry"
        else "It is deleted for good. Nothing brings it back."
    )
    return Page("ask.html", {
        "title": f"{verb.capitalize()} dead letter {number} of {visit.name}?", "text": effect, "fields": {},
        "to": f"/consumers/{visit.name}/dead/{number}/{verb}", "back": f"/consumers/{visit.name}/dead/{number}",
        "button": verb.capitalize(), "danger": verb == "purge",
    })  # fmt: skip


async def carry_out_one(visit: Visit) -> Elsewhere:
    """Retry or purge one dead letter."""
    verb, number, store = _verb(visit), _id_of(visit), visit.services.store
    query = "select redrive(%s, %s::bigint[])" if verb == "retry" else _PURGE
    async with audited(store, visit.caller, visit.address, verb, visit.name, {"ids": [number]}) as result:
        result["letters"] = await store.value(query, (visit.name, [number]))
    return Elsewhere(f"/consumers/{visit.name}/dead?said={verb}&n={result['letters']}&kept=0")


def _retried(config: Any, name: str, chosen: dict[str, str | None], until: int) -> tuple[dict[str, int], int]:
    """Retry for a step's time. Return the counts, and how many letters are left."""
    done, began = Redriven(), monotonic()
    with store_errors(), connect_store(config.store_dsn, config.store.schema_, "cdcbridge serve") as store:
        waiting = [one for one in chosen_letters(store, name, chosen) if one[0] <= until]
        taken = 0
        while taken < len(waiting) and monotonic() - began < _STEP:
            redrive_page(store, name, waiting[taken : taken + PAGE], done)
            taken += PAGE
    left = max(0, len(waiting) - taken)
    kept = len(waiting) - left - done.redriven - done.not_wanted
    return {"retried": done.redriven, "not_wanted": done.not_wanted, "kept": max(0, kept)}, left


def _purged(config: Any, name: str, chosen: dict[str, str | None], until: int) -> tuple[dict[str, int], int]:
    """Purge for a step's time. Return the count, and how many letters are left."""
    done, began = 0, monotonic()
    with store_errors(), connect_store(config.store_dsn, config.store.schema_, "cdcbridge serve") as store:
        waiting = [one for one, _ in chosen_letters(store, name, chosen) if one <= until]
        taken = 0
        while taken < len(waiting) and monotonic() - began < _STEP:
            row = store.execute(_PURGE, (name, waiting[taken : taken + PAGE])).fetchone()
            done += row[0] if row else 0
            taken += PAGE
    return {"purged": done}, max(0, len(waiting) - taken)


def _letter(visit: Visit, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "data": hidden(visit, row["data"]) if visit.shows_data else None}


def _chosen(visit: Visit) -> dict[str, str | None]:
    """Return the filter of a list or a form: topic, key and the beginning of the reason, in this order."""
    return {name: visit.given(name) for name in FILTERS}


def _given(chosen: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in chosen.items() if value is not None}


def _query(chosen: dict[str, str | None]) -> str:
    return urlencode(_given(chosen))


def _described(chosen: dict[str, str | None]) -> str:
    parts = [
        f"{'the reason begins with' if name == 'reason' else f'the {name} is'} “{value}”"
        for name, value in _given(chosen).items()
    ]
    return f"Those of which {' and '.join(parts)}." if parts else "All of them."


def _verb(visit: Visit) -> str:
    verb = visit.path["verb"]
    if verb not in ("retry", "purge"):
        raise RequestRefused(404, f"there is no page to {verb} dead letters")
    return verb


def _id_of(visit: Visit) -> int:
    return int(visit.path["id"])


def _number(visit: Visit, name: str) -> int | None:
    value = visit.given(name)
    if value is None:
        return None
    if not value.isdecimal() or len(value) > 18:
        raise RequestRefused(422, f"{name} is {value!r}, which is not a number")
    return int(value)


_OF: Final = "/consumers/{name}/dead"
VIEWS: Final = (
    View("GET", "/dead", "look", overview),
    View("GET", _OF, "look", letters),
    View("GET", f"{_OF}/{{id:int}}", "look", letter),
    View("GET", f"{_OF}/{{verb:str}}", "redrive", ask),
    View("POST", f"{_OF}/{{verb:str}}", "redrive", carry_out),
    View("GET", f"{_OF}/{{id:int}}/{{verb:str}}", "redrive", ask_one),
    View("POST", f"{_OF}/{{id:int}}/{{verb:str}}", "redrive", carry_out_one),
)
