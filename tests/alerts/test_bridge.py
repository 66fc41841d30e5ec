"""Alerts of a real bridge: what a destination receives, when bridges, destinations and the store come and go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import httpx
import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.alerts.conftest import (
    all_delivered,
    conditions,
    declare,
    judges,
    kill_message,
    received,
    streams,
    titles,
    url,
)
from tests.harness.brokers.http import Answer, HttpTarget
from tests.harness.brokers.server import free_port
from tests.harness.world import World, eventually, store_database

DEAD = "shop: dead letters: billing"


def test_a_condition_is_told_once_when_it_begins_and_once_when_it_ends(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    world18.start_process()
    streams(world18)
    kill_message(world18, 2)
    http_target.wait(1)
    (told,) = received(http_target)
    assert told["title"] == DEAD and told["type"] == "warning"
    assert "billing has 2 dead letters. `cdcbridge dead list billing`" in told["message"]
    all_delivered(world18)
    world18.rows("select redrive('billing')")
    http_target.wait(2)
    assert titles(http_target) == [DEAD, f"Over: {DEAD}"]
    assert received(http_target)[1]["type"] == "success"
    assert conditions(world18) == []


def test_a_consumer_that_stays_paused_is_told(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target), paused={"above": "2s"})
    world18.start_process()
    streams(world18)
    eventually(lambda: world18.value("select count(*) from consumers") == 1)
    assert world18.run_program("consumers", "pause", "billing").returncode == 0
    http_target.wait(1)
    assert world18.run_program("consumers", "resume", "billing").returncode == 0
    http_target.wait(2)
    assert titles(http_target) == ["shop: paused: billing", "Over: shop: paused: billing"]


def test_it_is_told_again_after_a_day(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    world18.start_process()
    streams(world18)
    kill_message(world18)
    http_target.wait(1)
    day = "interval '1 day'"
    world18.rows(f"update alert_conditions set notified_at = notified_at - {day}, since = since - {day} returning 1")
    http_target.wait(2)
    assert titles(http_target) == [DEAD, f"Still: {DEAD}"]
    assert "(1d 0h)" in received(http_target)[1]["message"]


def test_many_consumers_make_one_message(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target), oldest_age={"above": "500ms"})
    for number in range(20):
        world18.consumer(f"c{number}", (), topics=["many"])
    world18.start_process()
    streams(world18)
    eventually(lambda: world18.value("select count(*) from consumers") == 21)
    world18.rows("select publish('many', 'k', '{}')")
    http_target.wait(1)
    eventually(lambda: len(conditions(world18)) == 20)
    (told,) = received(http_target)
    assert told["title"] == "shop: 20 alerts: oldest age"
    assert told["message"].count("The oldest due message of") == 10
    assert told["message"].endswith("And 10 more: `cdcbridge alerts list`")


def test_a_critical_destination_gets_no_warning(world18: World, http_target: HttpTarget) -> None:
    with HttpTarget() as calm:
        declare(world18, url(http_target), sink_failing="off")
        alerts = world18.top_settings["alerts"]
        alerts["to"].append({"name": "oncall", "urls": [url(calm)], "severity": "critical"})
        alerts["rules"]["slot_retained"] = {"above": "0B"}
        world18.start_process()
        streams(world18)
        calm.wait(1)
        kill_message(world18)
        http_target.wait(2)
        assert set(titles(http_target)) == {DEAD, f"shop: slot retained: {world18.slot}"}
        assert titles(calm) == [f"shop: slot retained: {world18.slot}"]


def test_a_killed_bridge_loses_no_notification(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    bridge = world18.start_process()
    streams(world18)
    bridge.kill()
    bridge.wait()
    kill_message(world18)
    # The first judgement finds the condition, the second one queues the notification, and there the bridge dies.
    dying = world18.start_process(crash=("alert queued", 2))
    assert dying.wait(60) == -9, world18.log()
    assert titles(http_target) == [] and world18.value("select count(*) from alert_notifications") == 1
    world18.start_process()
    http_target.wait(1)
    all_delivered(world18)
    assert titles(http_target) == [DEAD]


def test_a_bridge_that_dies_after_the_delivery_may_deliver_again(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    world18.start_process(crash=("alert accepted", 1))
    streams(world18)
    kill_message(world18)
    http_target.wait(1)
    world18.start_process()
    http_target.wait(2)
    assert titles(http_target) == [DEAD, DEAD], "at least once"


def test_a_destination_that_was_away_gets_everything_once_and_in_order(world18: World, http_target: HttpTarget) -> None:
    with HttpTarget() as other:
        declare(world18, url(http_target), url(other))
        http_target.stop()
        world18.start_process()
        streams(world18)
        kill_message(world18)
        other.wait(1)
        world18.rows("select redrive('billing')")
        other.wait(2)
        assert titles(other) == [DEAD, f"Over: {DEAD}"], "the other URL does not wait"
        eventually(lambda: "alert.failed" in world18.log(), "an attempt failed")
        assert "a-secret-path" not in world18.log() and "127.0.0.1" not in world18.log().partition("alert.failed")[2]
        ((error,),) = world18.rows("select distinct error from alert_deliveries where error is not null")
        assert "Connection refused" in error and "a-secret-path" not in error
        http_target.start()
        http_target.wait(2, patience=60)
        all_delivered(world18)
        assert titles(http_target) == [DEAD, f"Over: {DEAD}"]
        assert titles(other) == [DEAD, f"Over: {DEAD}"]


def test_a_destination_that_hangs_holds_up_nobody(world18: World, http_target: HttpTarget) -> None:
    with HttpTarget() as other:
        declare(world18, url(other))
        world18.top_settings["alerts"]["to"].insert(0, {"name": "slow", "urls": [url(http_target)]})
        http_target.pause()
        world18.start_process()
        streams(world18)
        kill_message(world18)
        http_target.wait(1)
        other.wait(1, patience=10)  # less than the time that a destination has for its answer
        world18.rows("select redrive('billing')")
        other.wait(2, patience=10)
        began = time.monotonic()
        world18.rows("select publish('t', 'k', '{}')")
        eventually(lambda: world18.rows("select from receive('billing', 1)"))
        assert time.monotonic() - began < 5
        assert titles(other) == [DEAD, f"Over: {DEAD}"]
        http_target.resume()


@pytest.mark.parametrize("how", ["silent", "dripping"])
def test_a_bridge_ends_while_a_destination_hangs(world18: World, http_target: HttpTarget, how: str) -> None:
    declare(world18, f"{url(http_target)}?rto=300")
    http_target.otherwise = Answer(drips=how == "dripping")
    if how == "silent":
        http_target.pause()
    bridge = world18.start_process()
    streams(world18)
    kill_message(world18)
    http_target.wait(1)
    bridge.terminate()
    assert bridge.wait(30) == 0
    assert len(http_target.requests) == 1


def test_a_message_that_a_service_refuses_does_not_hold_up_the_next(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    http_target.otherwise = lambda request: Answer(400 if b'"warning"' in request.body else 200)
    world18.start_process()
    streams(world18)
    kill_message(world18)
    http_target.wait(1)
    world18.rows("select redrive('billing')")
    eventually(lambda: f"Over: {DEAD}" in titles(http_target), "the end is told", patience=90)
    all_delivered(world18)
    assert titles(http_target) == [*[DEAD] * 3, f"Over: {DEAD}"], "the beginning never follows its end"
    assert "alert.gave_up" in world18.log()


def test_what_cannot_be_delivered_for_two_weeks_is_given_up(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    http_target.otherwise = Answer(503)
    world18.start_process()
    streams(world18)
    kill_message(world18)
    http_target.wait(1)
    world18.rows("update alert_notifications set created_at = created_at - interval '13 days' returning 1")
    judges(world18, 2)
    assert "alert.gave_up" not in world18.log(), "nothing is lost in a long weekend"
    world18.rows("update alert_notifications set created_at = created_at + interval '13 days' returning 1")
    world18.rows("update alert_notifications set created_at = created_at - interval '14 days' returning 1")
    eventually(lambda: "alert.gave_up" in world18.log(), "the notification is given up")
    assert world18.rows("select from alert_notifications") == []


def test_two_bridges_notify_once(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    first = world18.start_process()
    streams(world18)
    world18.start_process()
    eventually(lambda: "bridge.standby" in world18.log(), "the second bridge stands by")
    kill_message(world18)
    http_target.wait(1)
    all_delivered(world18)
    first.kill()
    first.wait()
    streams(world18)
    world18.rows("select redrive('billing')")
    http_target.wait(2)
    assert titles(http_target) == [DEAD, f"Over: {DEAD}"]


@pytest.mark.settings(max_slot_wal_keep_size="64MB", max_wal_size="64MB", min_wal_size="32MB")
def test_a_bridge_tells_that_its_slot_is_lost_before_it_exits(own15_world: World, http_target: HttpTarget) -> None:
    world = own15_world
    declare(world, url(http_target), severity="critical")
    first = world.start_process()
    streams(world)
    first.terminate()
    assert first.wait(30) == 0
    world.execute("create table big (x text)", "alter table big alter column x set storage external")
    for _ in range(12):
        world.execute("insert into big select repeat('x', 1000000) from generate_series(1, 16)", "checkpoint")
    eventually(
        lambda: world.sql.execute("select wal_status from pg_replication_slots").fetchone() == ("lost",), "it is lost"
    )
    assert world.start_process().wait(60) == 3
    http_target.wait(1)
    (told,) = received(http_target)
    assert told["title"] == f"shop: slot lost: {world.slot}" and told["type"] == "failure"
    assert "cdcbridge slot recreate" in told["message"]


def test_a_bridge_that_ends_for_good_says_so(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    world18.start_process()
    streams(world18)
    for process in world18._processes:
        process.terminate()
        assert process.wait(30) == 0
    world18.rows("update source set system_identifier = '42' returning 1")
    assert world18.start_process().wait(60) == 3
    (told,) = received(http_target)
    assert told["title"] == "shop: no leader: bridge"
    assert "The bridge has ended, and no other leads" in told["message"]
    assert world18.start_process().wait(60) == 3
    assert titles(http_target) == ["shop: no leader: bridge"], "a bridge that is started again tells nothing new"


def test_without_a_leader_one_of_the_bridges_tells_it(
    world18: World, pg18: EmbeddedServer, http_target: HttpTarget
) -> None:
    with store_database(pg18) as store:
        world18.store_dsn = pg18.dsn(store)
        declare(world18, url(http_target), no_leader={"above": "2s"})
        for _ in range(2):
            world18.start_process()
        streams(world18)
        eventually(lambda: "bridge.standby" in world18.log(), "the other bridge stands by")
        world18.leave()
        with source_away(world18):
            http_target.wait(1, patience=60)
            (told,) = received(http_target)
            assert told["title"] == "shop: no leader: bridge" and told["type"] == "failure"
            assert "No bridge has led for" in told["message"] and "This one cannot: source: " in told["message"]
            judges(world18, 4)  # both bridges do
        http_target.wait(2)
        assert titles(http_target) == ["shop: no leader: bridge", "Over: shop: no leader: bridge"]


@contextlib.contextmanager
def source_away(world: World) -> Iterator[None]:
    """Nobody can connect to the database of the source, and its sessions are ended."""
    name = world.database
    with psycopg.connect(world.server.dsn(), autocommit=True) as admin:
        admin.execute(f"alter database {name} allow_connections false".encode())
        try:
            admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
            yield
        finally:
            admin.execute(f"alter database {name} allow_connections true".encode())


def test_a_store_that_is_away_is_told_from_memory(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target), store_away={"above": "1s"})
    world18.start_process()
    streams(world18)
    world18.leave()
    with source_away(world18):
        http_target.wait(1, patience=60)
    http_target.wait(2, patience=60)
    assert titles(http_target)[:2] == ["shop: store away: store", "Over: shop: store away: store"]


def test_a_silence_stops_notifications_until_it_ends(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    world18.start_process()
    streams(world18)
    assert world18.json("alerts", "silence", "dead_letters", "--for", "1h")["rule"] == "dead_letters"
    kill_message(world18)
    eventually(lambda: "alert.began" in world18.log(), "the condition begins")
    open_now = world18.json("alerts", "list", "--json")
    assert [(one["rule"], one["notified_at"]) for one in open_now["open"]] == [("dead_letters", None)]
    assert [one["rule"] for one in open_now["silences"]] == ["dead_letters"]
    world18.rows("select redrive('billing')")
    eventually(lambda: "alert.ended" in world18.log(), "it ends")
    kill_message(world18)
    eventually(lambda: world18.log().count("alert.began") == 2, "it begins again")
    assert titles(http_target) == [], "neither a beginning nor the end of something that nobody was told"
    world18.run_program("alerts", "silence", "dead_letters", "--for", "0")
    http_target.wait(1)
    assert titles(http_target) == [DEAD]
    world18.run_program("alerts", "silence", "dead_letters", "--for", "1h")
    world18.rows("select redrive('billing')")
    http_target.wait(2)
    assert titles(http_target) == [DEAD, f"Over: {DEAD}"], "an end is told, because people know of the beginning"


def test_a_transaction_that_holds_something_is_named_with_its_user_and_query(
    world18: World, http_target: HttpTarget
) -> None:
    declare(world18, url(http_target), xmin_held={"above": "1s"}, safe_seq_held={"above": "1s"})
    world18.start_process()
    streams(world18)
    with psycopg.connect(world18.dsn, application_name="report") as other:
        other.execute("select cdcbridge.publish('t', 'k', '{}')")
        pid = other.info.backend_pid
        http_target.wait(1)
        eventually(lambda: len(conditions(world18)) == 2)
    text = "\n".join(one["message"] for one in received(http_target))
    assert f"pid {pid} (report, user postgres)" in text and f"the transaction of pid {pid} (user postgres) has" in text
    assert "Its query is `select cdcbridge.publish('t', 'k', '{}')`." in text
    assert text.count(f"`select pg_terminate_backend({pid})`") == 2
    eventually(lambda: conditions(world18) == [])
    eventually(lambda: "Over: " in titles(http_target)[-1])


def test_the_metrics_of_alerts(world18: World, http_target: HttpTarget) -> None:
    port = free_port()
    world18.top_settings["http"] = {"listen": f"127.0.0.1:{port}"}
    declare(world18, url(http_target))
    http_target.answer(Answer(503))

    def shown(sample: str) -> bool:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        labels = f',slot="{world18.slot}",source="shop"'
        return any(line == sample.replace("}", f"{labels}}}") for line in map(_sorted, text.splitlines()))

    world18.start_process()
    streams(world18)
    kill_message(world18)
    http_target.wait(1)
    eventually(lambda: shown('cdcbridge_alerts_open{rule="dead_letters",severity="warning"} 1.0'), "it is open")
    eventually(lambda: shown('cdcbridge_alert_notifications_waiting{destination="team"} 1.0'), "one waits")
    eventually(lambda: shown('cdcbridge_alert_attempts_failed_total{destination="team"} 1.0'), "an attempt failed")
    world18.rows("select redrive('billing')")
    http_target.wait(3)
    eventually(lambda: shown('cdcbridge_alert_notifications_sent_total{destination="team"} 2.0'), "both were sent")
    eventually(lambda: shown('cdcbridge_alert_notifications_waiting{destination="team"} 0.0'), "none waits")
    assert not shown('cdcbridge_alerts_open{rule="dead_letters",severity="warning"} 1.0')


def _sorted(line: str) -> str:
    """A sample with its labels in the order of their names."""
    name, brace, rest = line.partition("{")
    labels, _, value = rest.rpartition("}")
    return f"{name}{{{','.join(sorted(labels.split(',')))}}}{value}" if brace else line
