"""Endpoints of stream consumers: read, commit, seek.

A read leases its partition, because a request has no transaction that could hold it. Never commits an offset by itself.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from cdcbridge.web.calls import Answer, Body, Call, Endpoint, Number, Seconds, documents
from cdcbridge.web.queues import Most, Wait

_READ: Final = (
    "select to_json(r)::text, r.partition, r.receipt from read_stream(%s, %s::int, make_interval(secs => %s)) r"
)
_END_LEASE: Final = "select extend_lease(%s, %s::int, %s, interval '1 millisecond')"
_DUE: Final = "select s.id, next_readable(%s) from stream_settings(%s) s"


class ReadRequest(Body):
    """How many messages to read, for how long the partition is leased, and how long to wait for the first message."""

    max_messages: Most = 100
    lease: Annotated[Seconds, Field(gt=0)] = 30.0
    wait: Wait = 0.0


class CommitRequest(Body):
    """The last message of a partition that is done, and the receipt of the read."""

    partition: Number
    seq: Number
    receipt: str | None = None


class SeekRequest(Body):
    """The place: earliest, latest, a seq, or a time. Without `partition`, for all partitions."""

    target: str | Number
    partition: Number | None = None


async def read(call: Call) -> Answer:
    """Read the next messages of one partition, and lease it."""
    name, body = call.path["name"], call.body
    found = await call.poll(_READ, (name, body.max_messages, body.lease), _DUE)
    if found and await call.gone():  # nobody has the receipt, so the lease ends at once
        _, partition, receipt = found[0]
        await call.store.patiently(_END_LEASE, (name, partition, receipt))
        found = []
    return {"messages": documents(found)}


async def commit(call: Call) -> Answer:
    """Record that a partition is read up to a message."""
    body = call.body
    values = (call.path["name"], body.partition, body.seq, body.receipt)
    moved = await call.store.value("select commit_offset(%s, %s::int, %s::bigint, %s)", values)
    call.services.arrivals.tell(call.path["name"])  # the partition is free
    return {"moved": moved}


async def seek(call: Call) -> Answer:
    """Move the offset of a group."""
    values = (call.path["name"], str(call.body.target), call.body.partition)
    partitions = await call.store.value("select seek(%s, %s::text, %s::int)", values)
    call.services.arrivals.tell(call.path["name"])
    return {"partitions": partitions}


_OF = "/api/streams/{name}"
ENDPOINTS = (
    Endpoint(
        "POST",
        f"{_OF}/read",
        "deliver",
        {"messages": {"type": "array", "items": {"$ref": "#/components/schemas/StreamMessage"}}},
        read,
        ReadRequest,
    ),
    Endpoint("POST", f"{_OF}/commit", "deliver", {"moved": {"type": "boolean"}}, commit, CommitRequest),
    Endpoint("POST", f"{_OF}/seek", "deliver", {"partitions": {"type": "integer"}}, seek, SeekRequest),
)
