"""The thread that delivers to one URL, without a bridge."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cdcbridge.alerts.courier import Courier, pause_after
from cdcbridge.alerts.delivery import urls
from cdcbridge.alerts.metrics import AlertMetrics
from cdcbridge.alerts.notices import Notice
from tests.alerts.conftest import LOADS_APPRISE, all_delivered, declare, titles, url
from tests.harness.brokers.http import Answer, HttpTarget
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


def test_it_delivers_every_waiting_message_and_then_ends(world18: World, http_target: HttpTarget) -> None:
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


def once(courier: Courier) -> bool:
    """Run one round, and return whether something is left to deliver."""
    return courier._round() is not None


def test_a_failure_holds_up_the_later_messages(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    for title in ("begins", "ends"):
        queue(world18, title)
    one = courier(world18)
    http_target.answer(Answer(502))
    assert once(one) and titles(http_target) == ["begins"]
    assert not once(one) and titles(http_target) == ["begins", "begins", "ends"]
    all_delivered(world18)


def test_only_a_message_that_is_refused_again_and_again_is_given_up(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    for title in ("good", "refused", "later"):
        queue(world18, title)
    one = courier(world18)
    http_target.otherwise = lambda request: Answer(422 if b'"refused"' in request.body else 200)
    assert once(one) and once(one) and titles(http_target) == ["good", "refused", "refused"]
    assert world18.rows("select title from alert_notifications order by id") == [("refused",), ("later",)]
    assert not once(one) and titles(http_target)[3:] == ["refused", "later"]
    all_delivered(world18)


def test_a_service_that_refuses_everything_gets_everything_later(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    for number in range(4):
        queue(world18, f"m{number}")
    one = courier(world18)
    http_target.otherwise = Answer(401)
    for _ in range(20):
        assert once(one)
    assert titles(http_target)[:8] == ["m0", "m0", "m0", "m1", "m0", "m1", "m0", "m1"], "at most two a round"
    before = len(http_target.requests)
    http_target.otherwise = Answer()
    assert not once(one)
    assert titles(http_target)[before:] == ["m0", "m1", "m2", "m3"]
    all_delivered(world18)


def test_a_service_that_is_away_is_not_one_that_refuses(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    for title in ("first", "second"):
        queue(world18, title)
    one = courier(world18)
    http_target.answer(Answer(400), Answer(400), Answer(429), Answer(400), Answer(400))
    for _ in range(5):
        assert once(one)
    assert set(titles(http_target)) == {"first"}, "the second waits"


def test_a_message_from_memory_that_is_refused_does_not_hold_up_the_store(
    world18: World, http_target: HttpTarget
) -> None:
    declare(world18, url(http_target))
    queue(world18, "stored")
    one = courier(world18)
    one.tell(Notice("team", "begins", "critical", "memory", "text"))
    http_target.otherwise = lambda request: Answer(400 if b'"memory"' in request.body else 200)
    assert once(one) and once(one) and not once(one)
    assert titles(http_target) == ["memory"] * 3 + ["stored"]
    all_delivered(world18)
