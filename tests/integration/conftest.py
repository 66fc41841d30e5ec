"""What the tests of the Python clients share: a store on either server, and both clients under one shape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cdcbridge import AsyncQueue, AsyncStream, Queue, Stream
from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.proxy import Proxy
from tests.harness.waiting import Waiting
from tests.harness.world import NewDatabase, store_database
from tests.sql.queue import StoreQueue


@pytest.fixture
def new_database() -> NewDatabase:
    """Databases with a store, since a bridge that makes it takes half a second more."""
    return store_database


@pytest.fixture(params=["pg15", "pg18"])
def store(request: pytest.FixtureRequest) -> Iterator[StoreQueue]:
    """A store with a queue `c`, a fifo consumer `f` and a stream `s`, all with the topic t."""
    server: EmbeddedServer = request.getfixturevalue(request.param)
    with store_database(server) as database:
        made = StoreQueue(server.dsn(database, tcp=True))
        made.declare(topics=("t",), visibility_timeout="30s", retry_delay={"initial": "0s", "max": "0s"})
        made.declare("f", mode="fifo", topics=("t",), visibility_timeout="30s", max_deliveries=3,
                     retry_delay={"initial": "0s", "max": "0s"})  # fmt: skip
        made.declare("s", mode="stream", topics=("t",), start="earliest")
        yield made
        made.close()


@pytest.fixture(params=["sync", "async"])
def opened(request: pytest.FixtureRequest, store: StoreQueue) -> Iterator[Callable[..., Any]]:
    """Opens a client of a consumer: a Stream for `s`, a Queue for others."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner()) if request.param == "async" else None

        def open_(consumer: str = "c", dsn: str | None = None, **named: Any) -> Any:
            where = dsn or store.dsn
            if runner is None:
                kind: Any = Stream if consumer == "s" else Queue
                return stack.enter_context(kind.connect(where, consumer, **named))
            kind = AsyncStream if consumer == "s" else AsyncQueue
            return stack.enter_context(Waiting(runner.run(kind.connect(where, consumer, **named)), runner))

        yield open_


@pytest.fixture
def proxy(store: StoreQueue) -> Iterator[Proxy]:
    """A relay to the store; `through(store, proxy)` is the DSN."""
    with Proxy(int(store.dsn.split("port=")[1].split()[0])) as made:
        yield made


def through(store: StoreQueue, proxy: Proxy) -> str:
    """The store's DSN by way of the relay."""
    return " ".join(f"port={proxy.port}" if part.startswith("port=") else part for part in store.dsn.split())
