"""The endpoint that publishes messages.

All messages of a request are published in one statement, so either all of them are in the log, or none. The server
takes the data from the request's own text, and a number therefore keeps all its digits.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AwareDatetime, BeforeValidator, Field, TypeAdapter

from cdcbridge.config.consumer import Consumer
from cdcbridge.web.calls import Answer, Body, Call, Endpoint
from cdcbridge.web.problems import RequestRefused

# The setting is read after the call for the same row.
_PUBLISH: Final = (
    "select p.seq, coalesce(current_setting('cdcbridge.duplicate', true), '') = 'on' and m.value ->> 'dedup_id'"
    " is not null from json_array_elements(%s::json -> 'messages') with ordinality m (value, n) cross join lateral"
    " publish(%s::text, m.value ->> 'key', m.value -> 'data', (m.value ->> 'deliver_at')::timestamptz,"
    " m.value ->> 'dedup_id') p (seq) order by m.n"
)
_TIME: Final = TypeAdapter(AwareDatetime)


def _time(value: Any) -> Any:
    """Return the time of a text. PostgreSQL and pydantic read a number such as 20270101 as different times."""
    if not isinstance(value, str) or "T" not in value:
        raise ValueError('write a time as in "2027-01-31T08:00:00Z"')
    return _TIME.validate_python(value)


class NewMessage(Body):
    """A message to publish."""

    key: str | None = None
    data: Any
    deliver_at: Annotated[AwareDatetime, BeforeValidator(_time, json_schema_input_type=AwareDatetime)] | None = None
    dedup_id: str | None = None


class PublishRequest(Body):
    """The messages, which are published in this order."""

    messages: Annotated[tuple[NewMessage, ...], Field(min_length=1, max_length=1000, fail_fast=True)]


async def publish(call: Call) -> Answer:
    """Publish messages, all of them or none."""
    topic = call.path["topic"]
    if call.caller.consumers is not None and not _takes(call, topic):
        raise RequestRefused(403, f"no consumer of the token {call.caller.name!r} lists the topic {topic!r}",
                      hint="Such a token publishes to the topics of its consumers alone.")  # fmt: skip
    rows = await call.store.rows(_PUBLISH, (call.raw.decode(), topic))
    return {"messages": [{"seq": seq, "duplicate": duplicate} for seq, duplicate in rows]}


def _takes(call: Call, topic: str) -> bool:
    consumers: tuple[Consumer, ...] = call.services.config.consumers
    return any(topic in one.topics for one in consumers if call.caller.sees(one.name))


_PUBLISHED: Final = {
    "type": "object",
    "properties": {"seq": {"type": "integer"}, "duplicate": {"type": "boolean"}},
    "required": ["seq", "duplicate"],
}
ENDPOINTS = (
    Endpoint(
        "POST",
        "/api/topics/{topic:path}/publish",
        "publish",
        {"messages": {"type": "array", "items": _PUBLISHED}},
        publish,
        PublishRequest,
    ),
)
