"""What the tests of the SQS endpoint share: keys, and clients of boto3 against a real process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.harness.world import World
from tests.web.conftest import TOKENS, serving

REGION = "eu-central-1"
OPS = ("AKIAOPS", "the-secret-of-operations")
BILLING = ("AKIABILLING", "the-secret-of-billing")
VIEWER = ("AKIASCREEN", "the-secret-of-the-screen")
SQS = {
    "access_keys": [
        {"id": OPS[0], "secret": OPS[1], "token": "ops"},
        {"id": BILLING[0], "secret": BILLING[1], "token": "billing"},
        {"id": VIEWER[0], "secret": VIEWER[1], "token": "screen"},
    ]
}


def sqs_client(url: str, key: tuple[str, str] = OPS, **named: Any) -> Any:
    return boto3.client(
        "sqs",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=key[0],
        aws_secret_access_key=key[1],
        config=Config(**{"retries": {"total_max_attempts": 1}, "connect_timeout": 5, "read_timeout": 30, **named}),
    )


def declare_queues(world: World) -> None:
    """A queue, a fifo consumer, a queue without topics, and a stream."""
    world.consumers = []
    world.execute("create table orders (id int primary key, total numeric)")
    world.consumer("billing", (), topics=["t"], visibility_timeout="30s", max_deliveries=2)
    world.consumer("search", (), mode="fifo", topics=["f"], max_deliveries=3)
    world.consumer("tables", ("public.orders",))
    world.consumer("audit", (), mode="stream", topics=["t"], start="earliest")
    world.json("consumers", "apply", "--json")


@contextmanager
def serving_sqs(world: World, **api: Any) -> Iterator[str]:
    declare_queues(world)
    with serving(world, tokens=TOKENS, sqs=SQS, **api) as url:
        yield url


@pytest.fixture
def url(world18: World) -> Iterator[str]:
    with serving_sqs(world18) as found:
        yield found


@pytest.fixture
def sqs(url: str) -> Iterator[Any]:
    made = sqs_client(url)
    yield made
    made.close()


@pytest.fixture
def billing(sqs: Any) -> str:
    """The URL of a queue."""
    return str(sqs.get_queue_url(QueueName="billing")["QueueUrl"])


@pytest.fixture
def search(sqs: Any) -> str:
    """The URL of a fifo queue."""
    return str(sqs.get_queue_url(QueueName="search.fifo")["QueueUrl"])


def refused(code: str, call: Any, **named: Any) -> str:
    """The message of the error with this code, which the call raises."""
    with pytest.raises(ClientError) as caught:
        call(**named)
    error = caught.value.response["Error"]
    assert error["Code"] == code, error
    return str(error["Message"])


def bodies(answer: Any) -> list[str]:
    return [one["Body"] for one in answer.get("Messages", [])]
