"""Endpoints of stream consumers: read, commit, seek.

A read leases its partition, because a request has no transaction that could hold it. Never commits an offset by itself.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from cdcbridge.web.calls import Answer, Body, Call, Endpoint, Number, Seconds, documents, within
from cdcbridge.web.queues import Most, Wait

_READ: Final = within("read_stream(%s, %s::int, make_interval(secs => %s))", "r.partition, r.receipt")
_EXTEND: Final = "select extend_lease(%s, %s::int, %s, make_interval(secs => %s))"
_AT_ONCE: Final = 0.001  # seconds
_DUE: Final = "select s.id, next_readable(%s) from stream_settings(%s) s"


Lease = Annotated[Seconds, Field(gt=0)]


class ReadRequest(Body):
    """How many messages to read, for how long the partition is leased, and how long to wait for the first message."""

    max_messages: Most = 100
    lease: Lease = 30.0
    wait: Wait = 0.0


class ExtendLeaseRequest(Body):
    """The partition, the receipt of its read, and the lease from now on."""

    partition: Number
    receipt: str
    lease: Lease = 30.0


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
    values = (call.services.config.api.max_answer, name, body.max_messages, body.lease)
    found = await call.poll(_READ, values, _DUE)  # what is too much for an answer follows after the commit
    if found and await call.gone():  # nobody has the receipt, so the lease ends at once
        _, partition, receipt = found[0]
        await call.store.patiently(_EXTEND, (name, partition, receipt, _AT_ONCE))
        found = []
    return {"messages": documents(found)}


async def commit(call: Call) -> Answer:
    """Record that a partition is read up to a message."""
    body = call.body
    values = (call.path["name"], body.partition, body.seq, body.receipt)
    moved = await call.store.value("select commit_offset(%s, %s::int, %s::bigint, %s)", values)
    call.services.arrivals.tell(call.path["name"])  # the partition is free
    return {"moved": moved}


async def extend_lease(call: Call) -> Answer:
    """Keep the lease of a partition for longer."""
    body: ExtendLeaseRequest = call.body
    await call.store.rows(_EXTEND, (call.path["name"], body.partition, body.receipt, body.lease))
    call.services.arrivals.tell(call.path["name"])  # a shorter lease ends earlier than a poll expects
    return {"extended": True}


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
    Endpoint("POST", f"{_OF}/extend", "deliver", {"extended": {"type": "boolean"}}, extend_lease, ExtendLeaseRequest),
    Endpoint("POST", f"{_OF}/seek", "deliver", {"partitions": {"type": "integer"}}, seek, SeekRequest),
)
