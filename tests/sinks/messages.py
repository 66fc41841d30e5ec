"""Messages and adapters for the tests of adapters."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from pydantic import TypeAdapter

from cdcbridge.config.sink import Sink
from cdcbridge.sinks.target import Lane, Outgoing, Target
from cdcbridge.sinks.targets import target_class

SYSTEM = "7412"
LANE = Lane("shop", SYSTEM, 0, 1)


def lane(number: int = 0, of: int = 1) -> Lane:
    return LANE._replace(number=number, of=of)


def message(seq: int, to: str = "", *, key: str | None = "k", **changes: Any) -> Outgoing:
    """Return a message whose body is what format `cdcbridge` has."""
    one = f"{SYSTEM}/1/0/{seq:X}/0"
    body = json.dumps({"id": one, "seq": seq, "key": key, "data": {"record": {"id": seq, "note": "ä" * 20}}})
    made = Outgoing(seq, one, key, 0, to, body.encode(), {"cdcbridge-id": one, "cdcbridge-topic": "public.orders"})
    return made._replace(**changes)


def messages(seqs: Iterable[int], to: str = "", *, key: str | None = "k") -> list[Outgoing]:
    return [message(seq, to=to, key=key) for seq in seqs]


def target(lane: Lane | None = LANE, **sink: Any) -> Target[Any]:
    model: Any = TypeAdapter(Sink).validate_python(sink)
    return target_class(model)(model, lane)


@asynccontextmanager
async def opened(lane: Lane | None = LANE, **sink: Any) -> AsyncIterator[Target[Any]]:
    made = target(lane, **sink)
    try:
        await made.open()
        yield made
    finally:
        await made.close()
