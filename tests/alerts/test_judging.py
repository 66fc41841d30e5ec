"""The last evaluation of a bridge that has ended with an error, without a bridge."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from prometheus_client import CollectorRegistry

from cdcbridge.alerts.courier import Courier
from cdcbridge.alerts.delivery import urls
from cdcbridge.alerts.judging import Judge
from cdcbridge.alerts.metrics import AlertMetrics
from cdcbridge.observe.health import Health
from cdcbridge.observe.lag import Lag
from tests.alerts.conftest import LOADS_APPRISE, declare, received, titles, url
from tests.harness.brokers.http import HttpTarget
from tests.harness.world import World, eventually

pytestmark = LOADS_APPRISE
ENDED = ["shop: no leader: bridge"]
LEAD = "select pg_advisory_lock('cdcbridge_internal.leaders'::regclass::oid::int, 0)"
WAITS = (
    "select count(*) from pg_stat_activity"
    " where application_name like 'cdcbridge alerts%%' and wait_event_type = 'Lock'"
)


@dataclass
class Measurement:
    latest: Lag | None = None
    failure: Exception | None = None
    interval: float = 1.0
    looked: threading.Event = field(default_factory=threading.Event)


def last_evaluation(world: World) -> tuple[Judge, Courier]:
    """The threads of a bridge that has ended with an error."""
    config = world.config()
    assert config.alerts is not None
    (found,) = urls(config.alerts)
    metrics = AlertMetrics(CollectorRegistry(), ["team"])
    courier = Courier(config, found, [found.id], metrics)
    judge = Judge(config, config.alerts, "shop", Measurement(), Health(), [courier], metrics)
    courier.start()
    judge.finish("It is broken.")
    judge.start()
    return judge, courier


def ends(judge: Judge, courier: Courier) -> None:
    assert judge.join(30) and courier.join(30)


@contextmanager
def another_leads(world: World, holder: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(world.dsn, autocommit=True) as other:
        pid = other.info.backend_pid
        other.execute("insert into cdcbridge_internal.leaders (holder, pid) values (%s, %s)", (holder, pid))
        other.execute(LEAD)
        yield other


def here() -> str:
    return f"{socket.gethostname()} pid {os.getpid()}"


def test_another_bridge_that_evaluates_just_now_is_waited_for(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    with psycopg.connect(world18.dsn) as other:
        other.execute("select from cdcbridge_internal.alert_state for update")
        threads = last_evaluation(world18)
        eventually(lambda: world18.value(WAITS) == 1, "it waits for the other one")
        eventually(lambda: world18.value(WAITS) == 0, "its patience of a second ends")
        assert titles(http_target) == []
    ends(*threads)
    assert titles(http_target) == ENDED


def test_the_bridges_own_session_that_has_not_ended_yet_is_no_leader(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    with another_leads(world18, here()):
        ends(*last_evaluation(world18))
    assert titles(http_target) == ENDED


def test_a_standby_that_has_taken_over_tells_what_is_wrong(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    began = time.monotonic()
    with another_leads(world18, "db2 pid 7"):
        ends(*last_evaluation(world18))
        assert time.monotonic() - began < 5, "it does not wait"
    assert titles(http_target) == []


def without_store(world: World) -> None:
    world.store_dsn = "host=127.0.0.1 port=1 dbname=x connect_timeout=1"


def test_a_bridge_that_ends_without_the_store_obeys_the_rule(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target), no_leader={"severity": "warning"})
    without_store(world18)
    judge, courier = last_evaluation(world18)
    http_target.wait(1)
    assert titles(http_target) == ENDED and received(http_target)[0]["type"] == "warning"
    ends(judge, courier)


def test_a_rule_that_is_off_tells_nothing_without_the_store(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target), no_leader="off")
    without_store(world18)
    ends(*last_evaluation(world18))
    assert titles(http_target) == []


def test_a_silence_holds_without_the_store(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    config = world18.config()
    assert config.alerts is not None
    (found,) = urls(config.alerts)
    metrics = AlertMetrics(CollectorRegistry(), ["team"])
    with Courier(config, found, [found.id], metrics) as courier:
        judge = Judge(config, config.alerts, "shop", Measurement(), Health(), [courier], metrics)
        world18.rows("insert into alert_silences values ('no_leader', now() + interval '1 hour') returning 1")
        assert judge._judge()
        with psycopg.connect(world18.dsn, autocommit=True) as other:
            other.execute("alter table cdcbridge_internal.alert_state rename to gone")
        judge.finish("It is broken.")
        assert judge._judge()
        courier.finish()
        assert courier.join(30)
    assert titles(http_target) == []
