"""Put a text into each kind of broker, and read all texts, through the library that the sinks use."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, TypeAlias

import nats
from aiormq import spec
from aiormq.abc import AbstractChannel
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from nats.aio.client import Client
from nats.js.api import StreamConfig

from tests.harness.brokers.amqp import channel
from tests.harness.brokers.kafka import QUIET, Kafka, KafkaCluster, MockKafka
from tests.harness.brokers.nats import Nats, NatsCluster
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.harness.brokers.redis import Redis

NAME = "talk"
AnyKafka: TypeAlias = Kafka | KafkaCluster | MockKafka


async def _connect(server: Nats | NatsCluster) -> Client:
    nodes = server.nodes if isinstance(server, NatsCluster) else [server]
    tls = nodes[0].certificates.client_context() if nodes[0].certificates else None
    return await nats.connect([node.url for node in nodes], tls=tls, reconnect_time_wait=0.1, **nodes[0].connection)


def put_nats(server: Nats | NatsCluster, text: str) -> None:
    async def run() -> None:
        client = await _connect(server)
        try:
            await client.jetstream(timeout=20).publish(NAME, text.encode())
        finally:
            await client.close()

    asyncio.run(run())


def make_nats(server: Nats | NatsCluster, **settings: Any) -> None:
    async def run() -> None:
        client = await _connect(server)
        try:
            replicas = len(server.nodes) if isinstance(server, NatsCluster) else 1
            config = StreamConfig(NAME, subjects=[NAME], num_replicas=replicas, **settings)
            await client.jetstream(timeout=20).add_stream(config)
        finally:
            await client.close()

    asyncio.run(run())


def get_nats(server: Nats | NatsCluster) -> list[str]:
    async def run() -> list[str]:
        client = await _connect(server)
        try:
            stream = client.jetstream(timeout=20)
            last = (await stream.stream_info(NAME)).state.last_seq
            messages = [await stream.get_msg(NAME, seq) for seq in range(1, last + 1)]
            return [(message.data or b"").decode() for message in messages]
        finally:
            await client.close()

    return asyncio.run(run())


def leader_of_nats(cluster: NatsCluster) -> Nats:
    async def run() -> str:
        client = await _connect(cluster)
        try:
            info = await client.jetstream(timeout=20).stream_info(NAME)
            return str(info.cluster and info.cluster.leader)
        finally:
            await client.close()

    name = asyncio.run(run())
    return next(node for node in cluster.nodes if f"node{node.port}" == name)


def put_redis(server: Redis, text: str) -> None:
    with server.client() as client:
        client.xadd(NAME, {"text": text})


def get_redis(server: Redis) -> list[str]:
    with server.client() as client:
        entries: Any = client.xrange(NAME)
        return [fields[b"text"].decode() for _, fields in entries]


async def _queue(channel: AbstractChannel) -> None:
    """Declare a classic queue: a quorum queue of a single node finds no leader after a SIGKILL (RabbitMQ 3.10)."""
    await channel.queue_declare(NAME, durable=True)


def make_rabbitmq(server: RabbitMQ) -> None:
    """Declare the queue, and restart the server: RabbitMQ 3.10 forgets what was declared just before a kill."""

    async def run() -> None:
        async with channel(server.url) as one:
            await _queue(one)

    asyncio.run(run())
    server.restart()


def put_rabbitmq(
    server: RabbitMQ, text: str, url: str = "", timeout: float = 20, context: ssl.SSLContext | None = None
) -> None:
    async def run() -> None:
        async with channel(url or server.url, context) as one:
            await _queue(one)
            properties = spec.Basic.Properties(delivery_mode=2)
            await one.basic_publish(text.encode(), routing_key=NAME, properties=properties, timeout=timeout)

    asyncio.run(run())


def get_rabbitmq(server: RabbitMQ) -> list[str]:
    """Read the messages, and give them back by not acking them."""

    async def run() -> list[str]:
        async with channel(server.url) as one:
            await _queue(one)
            found = []
            while (message := await one.basic_get(NAME, timeout=20)).delivery_tag:
                found.append(message.body.decode())
            return found

    return asyncio.run(run())


def put_kafka(server: AnyKafka, text: str, patience: float = 30.0, topic: str = NAME, **settings: Any) -> None:
    """Raises KafkaException where the message was not acknowledged by all replicas in sync within `patience` seconds."""
    properties = {"bootstrap.servers": server.bootstrap_servers, "message.timeout.ms": int(patience * 1000), "acks": -1}
    errors: list[Any] = []
    producer = Producer({**properties, **QUIET, **settings})
    producer.produce(topic, text.encode(), partition=0, on_delivery=lambda error, _: errors.append(error))
    producer.flush(patience + 5)
    assert errors, "librdkafka did not say what became of the message"
    if errors[0] is not None:  # a KafkaError cannot be compared with None
        raise KafkaException(errors[0])


def get_kafka(server: AnyKafka, **settings: Any) -> list[str]:
    consumer = Consumer(
        {
            "bootstrap.servers": server.bootstrap_servers,
            "group.id": NAME,
            "enable.auto.commit": False,
            **QUIET,
            **settings,
        }
    )
    try:
        partition = TopicPartition(NAME, 0, OFFSET_BEGINNING)
        _, end = consumer.get_watermark_offsets(partition, timeout=20)
        consumer.assign([partition])
        messages = consumer.consume(end, timeout=20)
        return [(message.value() or b"").decode() for message in messages]
    finally:
        consumer.close()
