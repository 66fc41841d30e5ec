"""The endpoint of the log browser: the messages of all consumers, page by page.

A page costs a bounded amount of work, so it can be empty although later ones are not. Never claims a message.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from cdcbridge.web.calls import Answer, Body, Call, Endpoint, shown, within

# A row without a topic is the last one, and has the seq of the next page.
_BROWSE: Final = within(
    "(select b.* from (select %(from)s::text as place, %(from)s::text ~ '^[0-9]{1,18}$' as is_seq) f"
    " cross join lateral browse_log(%(topic)s, %(key)s, case when is_seq then place::bigint end,"
    " case when not is_seq then time_of(place, 'time') end, %(limit)s::int, %(newest)s) b)",
    "r.seq, r.topic",
    "%(most)s",
)


class BrowseRequest(Body):
    """Which messages of the log to show, and where to begin: a seq, or a time such as 2027-01-31T08:00:00Z or -1h."""

    topic: str | None = None
    key: str | None = None
    place: Annotated[str | None, Field(alias="from")] = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 50
    order: Literal["newest", "oldest"] = "newest"


async def browse(call: Call) -> Answer:
    """Show messages of the log, the newest first."""
    call.caller.refuse_restricted("GET /api/consumers/NAME/messages shows their messages.")
    body: BrowseRequest = call.body
    newest, most = body.order == "newest", call.services.config.api.max_answer
    rows = await call.store.rows(_BROWSE, {**body.model_dump(by_alias=True), "newest": newest, "most": most})
    messages = [row for row in rows if row[2] is not None and row[0] is not None]
    place = rows[len(messages)][1] if len(rows) > len(messages) else None
    return {"messages": shown(call, messages), "next": place}


ENDPOINTS = (
    Endpoint(
        "GET",
        "/api/log",
        "read",
        {
            "messages": {"type": "array", "items": {"$ref": "#/components/schemas/LoggedMessage"}},
            "next": {"type": ["integer", "null"]},
        },
        browse,
        BrowseRequest,
    ),
)
