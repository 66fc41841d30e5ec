"""Endpoints of queue and fifo consumers: receive, ack, nack, extend, messages, dead letters.

Each calls the SQL function of the same name, and returns the columns of that function. Never keeps a message: a caller
that disconnects before the answer is sent gives its messages back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import Field, model_validator

from cdcbridge.config import Config
from cdcbridge.database import connect_store, store_errors
from cdcbridge.store.redrive import Redriven, redrive_chosen
from cdcbridge.web.calls import Answer, Body, Call, Endpoint, Number, Seconds, documents, shown, within

LONGEST_WAIT: Final = 60.0  # seconds of a long poll
RECEIVE: Final = within("receive(%s, %s::int, make_interval(secs => %s), durable => false)", "r.receipt")
GIVE_BACK: Final = "select give_back(%s, %s)"
_PEEK: Final = within("peek(%s, %s::int, %s)", "r.seq")
_DEAD: Final = within("(select * from dead_letters(%s, null, %s, %s, %s, %s) d order by d.id desc)", "r.id")
DUE: Final = "select q.id, next_visible(%s) from queue_settings(%s) q"
_MESSAGES: Final = {"messages": {"type": "array", "items": {"$ref": "#/components/schemas/Message"}}}
_LETTERS: Final = {"type": "array", "items": {"$ref": "#/components/schemas/DeadLetter"}}
_NUMBER: Final = {"type": "integer"}

Most = Annotated[int, Field(ge=1, le=1000)]
Receipts = Annotated[tuple[str, ...], Field(max_length=10_000, fail_fast=True)]
Wait = Annotated[Seconds, Field(le=LONGEST_WAIT)]


class ReceiveRequest(Body):
    """How many messages to receive, and how long to wait for the first one."""

    max_messages: Most = 10
    visibility_timeout: Seconds | None = None
    wait: Wait = 0.0


class AckRequest(Body):
    """The deliveries that are done. With `strict`, all of them or none."""

    receipts: Receipts
    strict: bool = False


class NackRequest(Body):
    """The deliveries to give back, after `delay`, or as dead letters."""

    receipts: Receipts
    delay: Seconds | None = None
    reason: str | None = None
    dead: bool = False


class ExtendRequest(Body):
    """The deliveries to keep for `visibility_timeout` from now on."""

    receipts: Receipts
    visibility_timeout: Seconds


class PeekRequest(Body):
    """How many messages to show. With `delayed`, those that wait for their time."""

    limit: Most = 10
    delayed: bool = False


class LettersRequest(Body):
    """Which dead letters to list, the newest first."""

    limit: Most = 50
    topic: str | None = None
    key: str | None = None
    reason: str | None = None


class LetterFilter(Body):
    """Dead letters of a topic or a key, or whose reason begins with a text."""

    topic: str | None = None
    key: str | None = None
    reason: str | None = None


class RedriveRequest(Body):
    """The dead letters to put back: either their ids, or a filter. The filter {} means all."""

    ids: Annotated[tuple[Number, ...], Field(max_length=10_000, fail_fast=True)] | None = None
    filter: LetterFilter | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> RedriveRequest:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give either `ids` or `filter`. The filter {} means all")
        return self


async def receive(call: Call) -> Answer:
    """Receive messages, and wait for the first one."""
    name, body = call.path["name"], call.body
    values = (call.services.config.api.max_answer, name, body.max_messages, body.visibility_timeout)
    found = await call.poll(RECEIVE, values, DUE)
    return {"messages": documents(await call.services.sent(found, call.gone, GIVE_BACK, name, receipt=1, document=0))}


async def ack(call: Call) -> Answer:
    """Finish deliveries."""
    values = (call.path["name"], list(call.body.receipts), call.body.strict)
    return {"acked": await call.store.value("select ack(%s, %s, %s)", values)}


async def nack(call: Call) -> Answer:
    """Give deliveries back."""
    body = call.body
    values = (call.path["name"], list(body.receipts), body.delay, body.reason, body.dead)
    nacked = await call.store.value("select nack(%s, %s, make_interval(secs => %s), %s, %s)", values)
    call.services.arrivals.tell(call.path["name"])  # the store notifies nobody of messages that are visible soon
    return {"nacked": nacked}


async def extend(call: Call) -> Answer:
    """Keep deliveries for longer."""
    values = (call.path["name"], list(call.body.receipts), call.body.visibility_timeout)
    extended = await call.store.value("select extend(%s, %s, make_interval(secs => %s))", values)
    call.services.arrivals.tell(call.path["name"])
    return {"extended": extended}


async def peek(call: Call) -> Answer:
    """Show messages without delivering them."""
    values = (call.services.config.api.max_answer, call.path["name"], call.body.limit, call.body.delayed)
    return {"messages": shown(call, await call.store.rows(_PEEK, values))}


async def dead(call: Call) -> Answer:
    """List dead letters, the newest first."""
    body: LettersRequest = call.body
    values = (call.services.config.api.max_answer, call.path["name"], body.topic, body.key, body.reason, body.limit)
    return {"dead_letters": shown(call, await call.store.rows(_DEAD, values))}


async def redrive(call: Call) -> Answer:
    """Put dead letters back into the queue."""
    name, body = call.path["name"], call.body
    if body.ids is not None:
        values = (name, list(body.ids))
        return {"redriven": await call.store.value("select redrive(%s, %s::bigint[])", values)}
    done = await call.services.beside(redrive_letters, call.services.config, name, body.filter.model_dump())
    return {"redriven": done.redriven, "not_wanted": done.not_wanted, "undecidable": done.undecidable}


def redrive_letters(config: Config, name: str, filters: Mapping[str, str | None]) -> Redriven:
    """Put dead letters back into the queue, and compare those on which the consumer's filter failed. It blocks."""
    with store_errors(), connect_store(config.store_dsn, config.store.schema_, "cdcbridge serve, redriving") as store:
        return redrive_chosen(store, name, filters)


_OF = "/api/consumers/{name}"
ENDPOINTS = (
    Endpoint("POST", f"{_OF}/receive", "deliver", _MESSAGES, receive, ReceiveRequest),
    Endpoint("POST", f"{_OF}/ack", "deliver", {"acked": _NUMBER}, ack, AckRequest),
    Endpoint("POST", f"{_OF}/nack", "deliver", {"nacked": _NUMBER}, nack, NackRequest),
    Endpoint("POST", f"{_OF}/extend", "deliver", {"extended": _NUMBER}, extend, ExtendRequest),
    Endpoint("GET", f"{_OF}/messages", "read", _MESSAGES, peek, PeekRequest),
    Endpoint("GET", f"{_OF}/dead", "read", {"dead_letters": _LETTERS}, dead, LettersRequest),
    Endpoint(
        "POST",
        f"{_OF}/dead/redrive",
        "redrive",
        {"redriven": _NUMBER, "not_wanted": _NUMBER, "undecidable": _NUMBER},
        redrive,
        RedriveRequest,
    ),
)
