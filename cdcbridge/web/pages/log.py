"""The log browser: messages by topic, key and time, and the history of a key."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode

import orjson

from cdcbridge.routing.logical_messages import members
from cdcbridge.web.pages.consumers import hidden
from cdcbridge.web.pages.site import Page, View, Visit
from cdcbridge.web.pages.wording import ColumnChange, changes
from cdcbridge.web.problems import RequestRefused

_LIST: Final = (
    "select seq, topic, key, data ->> 'op' as op, commit_time, inserted_at from browse_log(%s, %s, %s, %s, %s)"
)
_HISTORY: Final = (
    "select seq, topic, key, data ->> 'op' as op, data::text, commit_time, inserted_at"
    " from browse_log(%s, %s, %s, %s, %s)"
)
_MESSAGE: Final = (
    "select seq, topic, key, data ->> 'op' as op, data::text, commit_lsn::text, commit_time, inserted_at"
    " from messages where seq = %s::bigint"
)
_PAGE: Final = 50
_INSTEAD: Final = "The page of a consumer shows its next messages."
_VERSIONS: Final = 30  # of a row


async def log(visit: Visit) -> Page:
    """Show messages of the log, the newest first."""
    visit.caller.refuse_restricted(_INSTEAD)
    topic, key = visit.given("topic"), visit.given("key")
    rows = await visit.services.store.records(_LIST, (topic, key, *_start(visit), _PAGE))
    found, older = _without_next(rows)
    fields = {name: value for name, value in (("topic", topic), ("key", key)) if value is not None}
    return Page("log.html", {
        "title": "Log", "messages": found, "topic": topic or "", "key": key or "", "start": visit.given("from") or "",
        "older": None if older is None else urlencode({**fields, "from": older}), "shows_data": visit.shows_data,
        "looked": older is not None and not found,
    })  # fmt: skip


async def history(visit: Visit) -> Page:
    """Show the history of a key: each message, and what it changed in the row."""
    visit.caller.refuse_restricted(_INSTEAD)
    topic, key = visit.given("topic"), visit.query.get("key")
    if key is None or topic is None:
        raise RequestRefused(422, "a history needs a topic and a key", hint="Choose a message of the log.")
    rows = await visit.services.store.records(_HISTORY, (topic, key, *_start(visit), _VERSIONS + 1))
    found, older = _without_next(rows)
    for one in found:
        one["data"] = hidden(visit, one["data"])
    for later, earlier in zip(found, [*found[1:], None], strict=True):
        later["changes"] = _changes(earlier, later)
    if len(found) > _VERSIONS:
        older = found[_VERSIONS]["seq"]
    return Page("history.html", {
        "title": f"History of {key}", "messages": found[:_VERSIONS], "topic": topic, "key": key,
        "older": None if older is None else urlencode({"topic": topic, "key": key, "from": older}),
        "shows_data": visit.shows_data,
    })  # fmt: skip


async def message(visit: Visit) -> Page:
    """Show one message of the log."""
    visit.caller.refuse_restricted(_INSTEAD)
    rows = await visit.services.store.records(_MESSAGE, (int(visit.path["seq"]),))
    if not rows:
        raise RequestRefused(404, f"the log has no message {visit.path['seq']}",
                             hint="Retention may have dropped it.")  # fmt: skip
    return Page("message.html", {
        "title": f"Message {rows[0]['seq']}", "message": {**rows[0], "data": hidden(visit, rows[0]["data"])},
        "shows_data": visit.shows_data,
    })  # fmt: skip


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


def _without_next(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int | None]:
    """Return the messages, and the seq at which the next page begins."""
    older = rows[-1]["seq"] if rows and rows[-1]["topic"] is None else None
    return [row for row in rows if row["topic"] is not None], older


def _changes(earlier: dict[str, Any] | None, later: dict[str, Any]) -> list[ColumnChange]:
    """Return what a message changed in its row. Columns whose values the WAL did not carry are left out."""
    if later["data"] is None:
        return []
    parts = dict(members(later["data"]))
    known = dict(members(earlier["data"])) if earlier and earlier["data"] else {}
    before = known.get("record") if known and earlier and earlier["op"] != "delete" else parts.get("old")
    row = parts.get("record")
    if later["op"] == "delete":
        before, row = before if before not in (None, "null") else row, None
    silent = {*orjson.loads(parts.get("unchanged", "[]")), *orjson.loads(known.get("unchanged", "[]"))}
    return [one for one in changes(before, row) if one.column not in silent]


VIEWS: Final = (
    View("GET", "/log", "read", log),
    View("GET", "/log/history", "read", history),
    View("GET", "/log/{seq:number}", "read", message),
)
