"""A fresh topic of Kafka."""

from __future__ import annotations

from typing import Any, ClassVar

from confluent_kafka import Consumer, Message
from confluent_kafka.cimpl import TopicPartition

from tests.harness.brokers.kafka import QUIET, Kafka, KafkaCluster
from tests.sinks.case import Case, Received


class KafkaCase(Case):
    """A topic with as many partitions as the log.

    Args:
        server: The broker, or the cluster.
        name: The name of the topic.
        partitions: The partitions of the topic.
        proxy: The port through which the sink reaches the broker.
        config: Settings of the topic, for example `max_message_bytes`.
    """

    type: ClassVar[str] = "kafka"
    exactly_once: ClassVar[bool] = True

    def __init__(
        self, server: Kafka | KafkaCluster, name: str, *, partitions: int = 4, proxy: int | None = None, **config: str
    ) -> None:
        self.server = server
        self.name = name
        self.partitions = partitions
        self.address = server.bootstrap_servers if proxy is None else f"127.0.0.1:{proxy}"
        server.create_topic(name, partitions, **config)

    def sink(self) -> dict[str, Any]:
        return {"type": "kafka", "bootstrap_servers": self.address.split(","), "topic": self.name}

    def received(self) -> list[Received]:
        return [
            Received(dict(headers)["cdcbridge-id"].decode(), None if key is None else key.decode(), body, self.name)
            for key, headers, body in self.messages()
        ]

    def messages(self, topic: str | None = None) -> list[tuple[bytes | None, list[tuple[str, bytes]], bytes]]:
        """Return key, headers and content of all committed messages, partition after partition."""
        return [
            (
                _bytes(one.key()),
                _headers(one),
                _bytes(one.value()) or b"",
            )
            for one in self._committed(topic or self.name)
        ]

    def _committed(self, topic: str) -> list[Message]:
        consumer = Consumer(
            {
                "bootstrap.servers": self.server.bootstrap_servers,
                "group.id": "tests",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "enable.auto.commit": False,
                **QUIET,
            }
        )
        found: list[Message] = []
        try:
            for number in consumer.list_topics(topic, timeout=30).topics[topic].partitions:
                consumer.assign([TopicPartition(topic, number, 0)])
                while (message := consumer.poll(30)) is not None and message.error() is None:
                    found.append(message)
                assert message is not None, "the broker does not answer"
        finally:
            consumer.close()
        return found

    def close(self) -> None:
        self.server.client().delete_topics([self.name])[self.name].result(30)


def _bytes(content: str | bytes | None) -> bytes | None:
    return content.encode() if isinstance(content, str) else content


def _headers(message: Message) -> list[tuple[str, bytes]]:
    found: Any = message.headers() or []
    return [(name, value or b"") for name, value in found]
