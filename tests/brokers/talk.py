"""Put a text into each kind of broker, and read all texts, through the library that the sinks use."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeAlias, TypeVar

import aio_pika
import nats
from aio_pika.abc import AbstractChannel
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from nats.aio.client import Client
from nats.js.api import StreamConfig

from tests.harness.brokers.kafka import QUIET, Kafka, KafkaCluster, MockKafka
from tests.harness.brokers.nats import Nats, NatsCluster
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.harness.brokers.redis import Redis

NAME = "talk"
T = TypeVar("T")
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


async def _queue(channel: AbstractChannel) -> Any:
    """Declare a classic queue: a quorum queue of a single node finds no leader after a SIGKILL (RabbitMQ 3.10)."""
    return await channel.declare_queue(NAME, durable=True)


async def _finished(work: Coroutine[Any, Any, T]) -> T:
    """Let aiormq end the tasks that a closed connection leaves behind, because nothing else waits for them."""
    try:
        return await work
    finally:
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=5)
        for _ in range(5):
            await asyncio.sleep(0)  # closes the sockets


def make_rabbitmq(server: RabbitMQ) -> None:
    """Declare the queue, and restart the server: RabbitMQ 3.10 forgets what was declared just before a kill."""

    async def run() -> None:
        async with await aio_pika.connect(server.url) as connection:
            await _queue(await connection.channel())

    asyncio.run(_finished(run()))
    server.restart()


def put_rabbitmq(server: RabbitMQ, text: str, url: str = "", timeout: float = 20, **options: Any) -> None:
    async def run() -> None:
        async with await aio_pika.connect(url or server.url, **options) as connection:
            channel = await connection.channel(publisher_confirms=True)
            await _queue(channel)
            message = aio_pika.Message(text.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, routing_key=NAME, timeout=timeout)

    asyncio.run(_finished(run()))


def get_rabbitmq(server: RabbitMQ) -> list[str]:
    """Read the messages, and give them back by not acking them."""

    async def run() -> list[str]:
        async with await aio_pika.connect(server.url) as connection:
            queue = await _queue(await connection.channel())
            found = []
            while (message := await queue.get(fail=False, timeout=20)) is not None:
                found.append(message.body.decode())
            return found

    return asyncio.run(_finished(run()))


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
