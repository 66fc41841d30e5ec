"""What the tests of Kafka share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from cdcbridge.config.sink import KafkaSink
from cdcbridge.sinks.target import Lane, Outgoing
from cdcbridge.sinks.targets.kafka import KafkaTarget
from tests.harness.brokers.kafka import Kafka, KafkaCluster
from tests.sinks.cases.kafka import KafkaCase

_numbers = itertools.count(1)


@contextlib.contextmanager
def topic(server: Kafka | KafkaCluster, **options: Any) -> Iterator[KafkaCase]:
    case = KafkaCase(server, f"t{next(_numbers)}", **options)
    yield case


def lane(case: KafkaCase, number: int = 0) -> Lane:
    return Lane(case.name, "7231", number, 4)


def target(case: KafkaCase, made: Lane | None, **keys: Any) -> KafkaTarget:
    return KafkaTarget(KafkaSink(**{**case.sink(), **keys}), made)


def some(case: KafkaCase, seqs: Sequence[int], *, key: str | None = "k", body: bytes | None = b"{}") -> list[Outgoing]:
    return [Outgoing(i, f"7/1/0/{i}", key, 0, case.name, body, {"cdcbridge-id": f"7/1/0/{i}"}) for i in seqs]


def seqs(case: KafkaCase) -> list[int]:
    return [int(one.id.split("/")[-1]) for one in case.received()]


def run(made: Coroutine[Any, Any, None]) -> None:
    """Run a test, which must leave neither a task nor a thread."""

    async def watched() -> None:
        await made
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not kafka_threads()

    asyncio.run(watched())


def kafka_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("kafka-sink")]


@contextlib.asynccontextmanager
async def opened(made: KafkaTarget) -> Any:
    try:
        await made.open()
        yield made
    finally:
        await made.close()
