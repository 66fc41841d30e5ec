"""What the tests of the API share: a store with consumers, and `cdcbridge serve` as a process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.harness.world import NewDatabase, World, eventually, store_database

ADMIN = "an-admins-token"
BILLING = "a-consumers-token"
OPERATOR = "an-operators-token"
VIEWER = "a-viewers-token"
TOKENS: list[dict[str, Any]] = [
    {"name": "ops", "token": ADMIN, "role": "admin"},
    {"name": "billing", "token": BILLING, "role": "consumer", "consumers": ["billing"]},
    {"name": "night", "token": OPERATOR, "role": "operator"},
    {"name": "screen", "token": VIEWER, "role": "viewer"},
]


@pytest.fixture
def new_database() -> NewDatabase:
    """Databases with a store, since a bridge that makes it takes half a second more."""
    return store_database


def client(url: str, token: str | None = None, **named: Any) -> httpx.Client:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False, **named)


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert found["status"] == status and found["title"] and found["detail"]
    return found


def declare(world: World) -> None:
    """A queue, a fifo consumer and a stream, each with the topic t."""
    world.consumers = []
    world.consumer("billing", (), topics=["t"], visibility_timeout="30s", max_deliveries=2)
    world.consumer("search", (), mode="fifo", topics=["t", "other"])
    world.consumer("audit", (), mode="stream", topics=["t"], start="earliest")
    world.json("consumers", "apply", "--json")


@contextmanager
def serving(world: World, **api: Any) -> Iterator[str]:
    """The URL of a process, which ends with the block."""
    world.top_settings = {**world.top_settings, "api": {"listen": "127.0.0.1:0", **api}}
    before = len(listening(world))
    process = world._start(["serve"], "serve.log", None, None, None)
    try:
        yield str(eventually(lambda: process.poll() or listening(world)[before:], "the API listens")[0])
    finally:
        process.terminate()
        assert process.wait(30) == 0, world.log("serve.log")


def listening(world: World) -> list[str]:
    log = world.folder / "serve.log"
    return re.findall(r"api\.listening\s+url=(\S+)", log.read_text() if log.exists() else "")


@pytest.fixture
def url(world18: World) -> Iterator[str]:
    """An API without tokens."""
    declare(world18)
    with serving(world18) as found:
        yield found


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with client(url) as made:
        yield made
