"""What the tests of RabbitMQ share."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cdcbridge.config.sink import RabbitmqSink
from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import Lane, Outgoing
from cdcbridge.sinks.targets.rabbitmq import RabbitmqTarget
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.sinks.cases.rabbitmq import RabbitmqExchangeCase, RabbitmqStreamCase
from tests.sinks.messages import lane

ONE = lane()
QUEUE = None
_names = itertools.count()


def name() -> str:
    """A name that no other test has, because all tests share a server."""
    return f"shop-{os.getpid()}-{next(_names)}"


def sink_of(case: RabbitmqStreamCase | RabbitmqExchangeCase, *, port: int | None = None, **keys: Any) -> RabbitmqSink:
    """Return the sink of a case, reached through another port if one is given."""
    found = {"timeout": "10s", **case.sink(), **keys}
    if port is not None:
        mine = case.server.stream_port if isinstance(case, RabbitmqStreamCase) else case.server.port
        found["url"] = found["url"].replace(f":{mine}/", f":{port}/")
    return RabbitmqSink.model_validate(found)


@asynccontextmanager
async def target(sink: RabbitmqSink, place: Lane | None = ONE) -> AsyncIterator[RabbitmqTarget]:
    made = RabbitmqTarget(sink, place)
    try:
        yield made
    finally:
        await made.close()


async def deliver(sink: RabbitmqSink, batch: list[Outgoing], place: Lane | None = ONE) -> int | None:
    """Deliver with an instance of its own, see that nothing failed, and return the position."""
    async with target(sink, place) as one:
        await one.open()
        assert await one.deliver(batch) == {}
        return await one.position()


def error_of(sink: RabbitmqSink, batch: list[Outgoing], place: Lane | None = ONE) -> CdcbridgeError:
    """Return the error of opening, or of a delivery. It contains no password."""

    async def attempt() -> None:
        async with target(sink, place) as one:
            await one.open()
            await one.deliver(batch)

    with pytest.raises(CdcbridgeError) as caught:
        asyncio.run(attempt())
    assert RabbitMQ.password not in f"{caught.value} {caught.value.hint}"
    return caught.value


def seqs(case: RabbitmqStreamCase | RabbitmqExchangeCase) -> list[int]:
    """Return the seqs of the messages in the target."""
    return [int(one.id.split("/")[3], 16) for one in case.received()]
