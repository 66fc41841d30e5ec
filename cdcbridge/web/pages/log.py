"""The log browser: messages by topic, key and time, and the history of a key."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode

import orjson

from cdcbridge.routing.logical_messages import members
from cdcbridge.web.pages.consumers import hidden
from cdcbridge.web.pages.site import Page, View, Visit
from cdcbridge.web.pages.wording import changes
from cdcbridge.web.problems import RequestRefused

_BROWSE: Final = (
    "select seq, topic, key, data::text, commit_lsn::text, commit_time, inserted_at from browse_log(%s, %s, %s, %s, %s)"
)
_MESSAGE: Final = (
    "select seq, topic, key, data::text, commit_lsn::text, commit_time, inserted_at from messages where seq = %s"
)
_PAGE: Final = 50
_HISTORY: Final = 30  # versions of a row


async def log(visit: Visit) -> Page:
    """Show messages of the log, the newest first."""
    _refuse_restricted(visit)
    topic, key = visit.given("topic"), visit.given("key")
    rows = await visit.services.store.records(_BROWSE, (topic, key, *_start(visit), _PAGE))
    found, older = _without_next(visit, rows)
    fields = {name: value for name, value in (("topic", topic), ("key", key)) if value is not None}
    return Page("log.html", {
        "title": "Log", "messages": found, "topic": topic or "", "key": key or "", "start": visit.given("from") or "",
        "older": None if older is None else urlencode({**fields, "from": older}), "shows_data": visit.shows_data,
        "looked": older is not None and not found,
    })  # fmt: skip


async def history(visit: Visit) -> Page:
    """Show the history of a key: each message, and what it changed in the row."""
    _refuse_restricted(visit)
    topic, key = visit.given("topic"), visit.given("key")
    if key is None or topic is None:
        raise RequestRefused(422, "a history needs a topic and a key", hint="Choose a message of the log.")
    rows = await visit.services.store.records(_BROWSE, (topic, key, *_start(visit), _HISTORY + 1))
    found, older = _without_next(visit, rows)
    for later, earlier in zip(found, [*found[1:], None], strict=True):
        later["changes"] = _changes(earlier, later)
    if len(found) > _HISTORY:
        older = found[_HISTORY]["seq"]
    return Page("history.html", {
        "title": f"History of {key}", "messages": found[:_HISTORY], "topic": topic, "key": key,
        "older": None if older is None else urlencode({"topic": topic, "key": key, "from": older}),
        "shows_data": visit.shows_data,
    })  # fmt: skip


async def message(visit: Visit) -> Page:
    """Show one message of the log."""
    _refuse_restricted(visit)
    rows = await visit.services.store.records(_MESSAGE, (int(visit.path["seq"]),))
    if not rows:
        raise RequestRefused(404, f"the log has no message {visit.path['seq']}",
                             hint="Retention may have dropped it.")  # fmt: skip
    return Page("message.html", {
        "title": f"Message {visit.path['seq']}", "message": _message(visit, rows[0]), "shows_data": visit.shows_data,
    })  # fmt: skip


def _refuse_restricted(visit: Visit) -> None:
    if visit.caller.consumers is not None:
        why = f"the token {visit.caller.name!r} sees its own consumers alone, and the log has all of them"
        raise RequestRefused(403, why, hint="The page of a consumer shows its next messages.")


def _start(visit: Visit) -> tuple[int | None, datetime | None]:
    """Return the seq or the time at which the search begins."""
    given = visit.given("from")
    if given is None:
        return None, None
    if given.isdecimal() and len(given) < 19:
        return int(given), None
    try:
        at = datetime.fromisoformat(given)
    except ValueError:
        raise RequestRefused(422, f"from is {given!r}, which is neither a seq nor a time",
                             hint="Write a time as in 2027-01-31T08:00:00Z.") from None  # fmt: skip
    return None, at if at.tzinfo else at.replace(tzinfo=UTC)


def _without_next(visit: Visit, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int | None]:
    """Return the messages, and the seq at which the next page begins."""
    older = rows[-1]["seq"] if rows and rows[-1]["topic"] is None else None
    return [_message(visit, row) for row in rows if row["topic"] is not None], older


def _message(visit: Visit, row: dict[str, Any]) -> dict[str, Any]:
    op = orjson.loads(dict(members(row["data"])).get("op", '""'))
    return {**row, "op": op, "data": hidden(visit, row["data"]) if visit.shows_data else None}


def _changes(earlier: dict[str, Any] | None, later: dict[str, Any]) -> list[Any]:
    if later["data"] is None:
        return []
    row = dict(members(later["data"]))
    before = dict(members(earlier["data"])).get("record") if earlier and earlier["data"] else row.get("old")
    deleted = later["op"] == "delete"
    return changes(before, None if deleted else row.get("record"))


VIEWS: Final = (
    View("GET", "/log", "read", log),
    View("GET", "/log/history", "read", history),
    View("GET", "/log/{seq:int}", "read", message),
)
