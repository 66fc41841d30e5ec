"""A migrated store without a bridge, and messages put into it as an append does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import store_database
from tests.sql.queue import StoreQueue


@pytest.fixture(params=["pg18", "pg15"])
def queue(request: pytest.FixtureRequest) -> Iterator[StoreQueue]:
    server: EmbeddedServer = request.getfixturevalue(request.param)
    with store_database(server) as database:
        made = StoreQueue(server.dsn(database))
        yield made
        made.close()
