"""What the tests of the alerts share: a store with a queue, destinations on this machine, and what they received."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.brokers.http import HttpTarget
from tests.harness.world import NewDatabase, World, eventually, store_database

# Apprise loads all of its plugins, and one of them uses a module that Python 3.13 no longer has.
LOADS_APPRISE = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


@pytest.fixture
def new_database() -> NewDatabase:
    """Databases with a store, since a bridge that makes it takes half a second more."""
    return store_database


def url(target: HttpTarget) -> str:
    """The URL of Apprise for a local HTTP server."""
    return f"json://127.0.0.1:{target.port}/a-secret-path"


def declare(world: World, *urls: str, every: str = "1s", severity: str = "warning", **rules: Any) -> None:
    """A queue whose messages come from publish(), and one destination."""
    world.consumers = []
    world.consumer("billing", (), topics=["t"], visibility_timeout="30s", max_deliveries=1)
    to = [{"name": "team", "urls": list(urls), "severity": severity}]
    world.settings["name"] = "shop"
    world.top_settings["alerts"] = {"every": every, "to": to, "rules": rules}


def kill_message(world: World, count: int = 1) -> None:
    """Make dead letters of the queue `billing`."""
    for _ in range(count):
        world.rows("select publish('t', 'k', '{}')")
        world.rows("select nack('billing', array(select receipt from receive('billing', 1)), dead => true)")


def received(target: HttpTarget) -> list[dict[str, Any]]:
    """The notifications that a server got, in their order."""
    return [json.loads(request.body) for request in target.requests]


def titles(target: HttpTarget) -> list[str]:
    return [one["title"] for one in received(target)]


def streams(world: World) -> None:
    eventually(world.active, "the bridge streams")


def conditions(world: World) -> list[tuple[Any, ...]]:
    return world.rows("select rule, subject, began_at is not null from alert_conditions order by 1, 2")


@pytest.fixture
def own15_world(own15: EmbeddedServer, tmp_path: Path) -> Iterator[World]:
    """A database on a server of the test's own."""
    with store_database(own15) as database:
        made = World(own15, database, "pgoutput", tmp_path)
        yield made
        made.close()


def all_delivered(world: World) -> None:
    eventually(lambda: world.rows("select from alert_notifications") == [], "every notification is delivered")


def judges(world: World, times: int) -> None:
    """Wait until bridges have judged so many times more."""
    for _ in range(times):
        before = world.value("select judged_at from alert_state")

        def later(before: object = before) -> bool:
            return bool(world.value("select judged_at from alert_state") != before)

        eventually(later, "a bridge judges")
