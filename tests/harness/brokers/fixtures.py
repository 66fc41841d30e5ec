"""Fixtures for brokers. The servers are shared by all tests of a run: give each stream, queue and topic a name of its own.

A test that kills, fills or configures a server starts one itself: `with Redis() as redis:`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.brokers import kafka
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.http import HttpTarget
from tests.harness.brokers.kafka import Kafka, KafkaCluster, MockKafka
from tests.harness.brokers.mosquitto import Mosquitto
from tests.harness.brokers.nats import Nats, NatsCluster
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.harness.brokers.redis import Redis
from tests.harness.brokers.shared import shared
from tests.harness.brokers.sqs import Ministack, Moto

REAL_KAFKA = "needs_kafka"
WITHOUT_KAFKA = "no Kafka broker is installed (`make servers`): its tests use librdkafka's mock cluster alone"


def _mock_alone() -> bool:
    """Return whether the tests of a real Kafka cannot run. CI runs them, and they fail there."""
    return not kafka.installed() and not os.environ.get("CI")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of tests that start a Kafka of their own."""
    config.addinivalue_line("markers", f"{REAL_KAFKA}: starts a Kafka broker without a fixture of this module")


def pytest_report_header() -> list[str]:
    """Say in one line what is missing."""
    return [WITHOUT_KAFKA] if _mock_alone() else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of a real Kafka out where it cannot be had."""
    if _mock_alone():
        fixtures = {"kafka_broker", "kafka_cluster"}
        without = [
            item
            for item in items
            if item.get_closest_marker(REAL_KAFKA) or fixtures & set(getattr(item, "fixturenames", ()))
        ]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority, with certificates for a server and a client."""
    return Certificates(Path(tmp_path_factory.mktemp("certificates")))


@pytest.fixture(scope="session")
def mosquitto_server() -> Mosquitto:
    """A broker of MQTT."""
    found: Mosquitto = shared("mosquitto")
    return found


@pytest.fixture(scope="session")
def nats_server() -> Nats:
    """One node with JetStream, without users."""
    found: Nats = shared("nats")
    return found


@pytest.fixture(scope="session")
def nats_cluster() -> NatsCluster:
    """Three nodes with JetStream."""
    found: NatsCluster = shared("nats_cluster")
    return found


@pytest.fixture(scope="session")
def redis_server() -> Redis:
    """Redis without users."""
    found: Redis = shared("redis")
    return found


@pytest.fixture(scope="session")
def rabbitmq_server() -> RabbitMQ:
    """RabbitMQ for AMQP and streams."""
    found: RabbitMQ = shared("rabbitmq")
    return found


@pytest.fixture(scope="session")
def kafka_broker() -> Kafka:
    """One node of Kafka, with addresses for everybody and for users."""
    found: Kafka = shared("kafka")
    return found


@pytest.fixture(scope="session")
def kafka_cluster() -> KafkaCluster:
    """Three nodes of Kafka, with three replicas of which two must write."""
    found: KafkaCluster = shared("kafka_cluster")
    return found


@pytest.fixture
def kafka_mock() -> Iterator[MockKafka]:
    """librdkafka's mock cluster, which needs no server."""
    with MockKafka() as mock:
        yield mock


@pytest.fixture(scope="session")
def moto_server() -> Moto:
    """SQS by moto: close to AWS in its rules, and slow."""
    found: Moto = shared("moto")
    return found


@pytest.fixture(scope="session")
def ministack_server() -> Ministack:
    """SQS by ministack: fast enough for load."""
    found: Ministack = shared("ministack")
    return found


@pytest.fixture
def http_target() -> Iterator[HttpTarget]:
    """An HTTP server of the test's own that answers as told."""
    with HttpTarget() as target:
        yield target
