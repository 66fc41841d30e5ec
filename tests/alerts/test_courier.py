"""The thread that delivers to one URL, without a bridge."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cdcbridge.alerts.courier import Courier, pause_after
from cdcbridge.alerts.delivery import urls
from cdcbridge.alerts.metrics import AlertMetrics
from tests.alerts.conftest import LOADS_APPRISE, all_delivered, declare, titles, url
from tests.harness.brokers.http import HttpTarget
from tests.harness.world import World

pytestmark = LOADS_APPRISE


def courier(world: World) -> Courier:
    config = world.config()
    assert config.alerts is not None
    (found,) = urls(config.alerts)
    return Courier(config, found, [found.id], AlertMetrics(CollectorRegistry(), ["team"]))


def queue(world: World, title: str) -> None:
    world.rows(
        "insert into alert_notifications (destination, kind, severity, title, body)"
        " values ('team', 'begins', 'warning', %s, 'text') returning id",
        title,
    )


def test_one_bridge_at_a_time_delivers_to_a_url(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    queue(world18, "first")
    http_target.pause()
    other = courier(world18)
    with courier(world18) as delivering:
        delivering.wake()
        http_target.wait(1)
        assert other._from_store() == "elsewhere"
        http_target.resume()
        all_delivered(world18)
    assert other._from_store() == ""
    assert titles(http_target) == ["first"]


def test_it_delivers_what_waits_and_then_ends(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    for title in ("first", "second"):
        queue(world18, title)
    last = courier(world18)
    last.start()
    last.finish()
    assert last.join(30)
    assert titles(http_target) == ["first", "second"]
    all_delivered(world18)


def test_pauses_after_failures() -> None:
    assert [pause_after(number) for number in (1, 2, 3, 6, 7, 8, 5000)] == [5, 10, 20, 160, 300, 300, 300]
