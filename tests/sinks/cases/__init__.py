"""One case for each type of sink: its class, and the servers of its tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from tests.harness.brokers.http import HttpTarget
from tests.harness.brokers.kafka import Kafka
from tests.harness.brokers.mosquitto import Mosquitto
from tests.harness.brokers.nats import Nats
from tests.harness.brokers.redis import Redis
from tests.harness.brokers.sqs import Ministack
from tests.sinks.case import Case
from tests.sinks.cases.file import FileCase
from tests.sinks.cases.http import HttpCase
from tests.sinks.cases.kafka import KafkaCase
from tests.sinks.cases.mqtt import MqttCase
from tests.sinks.cases.nats import NatsCase
from tests.sinks.cases.rabbitmq import RabbitmqExchangeCase, RabbitmqStreamCase, steady_rabbitmq
from tests.sinks.cases.redis import RedisCase
from tests.sinks.cases.sqs import SqsCase


class Kind(NamedTuple):
    """A type of sink.

    Attributes:
        case: The class of its cases.
        fixture: The fixture of the server that tests share, or None.
        server: Starts a server that one test may kill. None: the type has no server.
        keeps: Whether the server keeps its messages when it is killed.
    """

    case: Callable[..., Case]
    fixture: str | None
    server: Callable[[], AbstractContextManager[Any]] | None
    keeps: bool = True


KINDS: dict[str, Kind] = {
    "file": Kind(FileCase, None, None),
    "kafka": Kind(KafkaCase, "kafka_broker", Kafka),
    "http": Kind(HttpCase, "http_target", HttpTarget),
    "mqtt": Kind(MqttCase, "mosquitto_server", Mosquitto, keeps=False),
    "nats": Kind(NatsCase, "nats_server", Nats),
    "rabbitmq_exchange": Kind(RabbitmqExchangeCase, "rabbitmq_server", steady_rabbitmq),
    "rabbitmq_stream": Kind(RabbitmqStreamCase, "rabbitmq_server", steady_rabbitmq),
    "redis": Kind(RedisCase, "redis_server", Redis),
    "sqs": Kind(SqsCase, "ministack_server", Ministack, keeps=False),
}
