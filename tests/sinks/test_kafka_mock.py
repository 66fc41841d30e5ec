"""The Kafka sink against the mock cluster of librdkafka. Where no real broker can be installed, this test remains."""

from __future__ import annotations

import asyncio

from confluent_kafka import Producer

from cdcbridge.sinks.targets.kafka_progress import TOPIC
from tests.harness.brokers.kafka import MockKafka
from tests.sinks.cases.kafka import KafkaCase
from tests.sinks.kafka import lane, opened, run, some, target


def test_the_mock_cluster_of_librdkafka_takes_messages() -> None:
    """Where no real broker can be installed, this test remains."""

    async def test() -> None:
        client = Producer({"bootstrap.servers": case.address})
        for name in (TOPIC, case.name):
            await asyncio.to_thread(client.list_topics, name, 10)  # the mock cluster creates it
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(1, 11))) == {}

    with MockKafka() as mock:
        case = KafkaCase.__new__(KafkaCase)
        case.name, case.address = "mocked", mock.bootstrap_servers
        run(test())
