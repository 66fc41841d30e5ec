"""Worlds with a store in them already, because the sinks' tests need one at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.brokers.kafka import Kafka
from tests.harness.world import NewDatabase, store_database


@pytest.fixture
def new_database() -> NewDatabase:
    return store_database


@pytest.fixture(scope="module")
def own_kafka() -> Iterator[Kafka]:
    """A broker for the tests of one module, whose progress topic no other test writes to."""
    with Kafka() as running:
        yield running
