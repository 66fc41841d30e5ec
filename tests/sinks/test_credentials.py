"""A target that no longer accepts the credentials of a sink, and accepts them again later: nothing is lost, and an alarm
says why nothing arrives.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import admin

from tests.harness.brokers.http import Answer, HttpTarget, Request
from tests.harness.brokers.kafka import Kafka
from tests.harness.world import World, eventually
from tests.sinks.cases.kafka import KafkaCase

MODES = ("stream", "fifo")
ALARM = "code=sink_failing"


@pytest.fixture
def world(world15: World) -> World:
    world15.execute("create table t (id int primary key)")
    return world15


def refused_for_a_while(
    world: World, received: Callable[[], list[int]], refuse: Callable[[], Any], accept: Callable[[], Any], reason: str
) -> None:
    """Deliver, be refused, and be accepted again."""
    process = world.start_process()
    eventually(world.active, "the bridge reads")
    world.execute("insert into t values (1), (2), (3)")
    eventually(lambda: received() == [1, 2, 3], "the first ones arrive")
    refuse()
    rows = itertools.count(4)

    def failing() -> bool:
        world.execute(f"insert into t values ({next(rows)})")  # a target may not ask for the password at once
        (found,) = world.json("sinks", "list", "--json")
        return found["state"] == "failing" and reason in found["reason"]

    eventually(failing, "the state says why")
    eventually(lambda: ALARM in world.log() and reason in world.log().partition(ALARM)[2], "an alarm says why")
    last = next(rows)
    world.execute(f"insert into t values ({last})")
    assert last not in received() and process.poll() is None
    accept()
    eventually(lambda: received() == list(range(1, last + 1)), "the rest arrives", patience=60)
    assert world.value("select count(*) from dead_messages") == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_webhook_that_refuses_the_token_for_a_while(world: World, mode: str) -> None:
    accepted: list[int] = []
    valid = ["Bearer right"]

    def answer(request: Request) -> Answer:
        if request.headers["authorization"] not in valid:
            return Answer(401)
        accepted.append(int(json.loads(request.body)["key"]))
        return Answer()

    with HttpTarget() as target:
        target.otherwise = answer
        sink = {"type": "http", "url": f"{target.url}hook", "headers": {"authorization": "Bearer right"}}
        world.consumer("events", mode=mode, sink=sink)
        refused_for_a_while(
            world, lambda: sorted(accepted), valid.clear, lambda: valid.append("Bearer right"), "answered HTTP 401"
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.needs_kafka
def test_a_user_of_kafka_that_is_removed_and_made_again(world: World, mode: str) -> None:
    """A broker asks for the password again only if it limits the time of a login."""
    with Kafka(settings={"connections.max.reauth.ms": "2000"}) as server:
        case = KafkaCase(server, "events", partitions=1)
        login = {name: value for name, value in server.sasl.items() if name != "bootstrap.servers"}
        sink = {**case.sink(), "bootstrap_servers": [server.sasl["bootstrap.servers"]], "producer": login}
        world.consumer("events", mode=mode, sink={**sink, "timeout": "5s"})

        def alter(change: Any) -> None:
            client: Any = server.client()
            for done in client.alter_user_scram_credentials([change]).values():
                done.result(30)

        scram: Any = admin
        kind = scram.ScramMechanism.SCRAM_SHA_256
        made = scram.UserScramCredentialUpsertion(
            server.user, scram.ScramCredentialInfo(kind, 4096), server.password.encode()
        )
        refused_for_a_while(
            world,
            lambda: sorted(int(one.key or 0) for one in case.received()),
            lambda: alter(scram.UserScramCredentialDeletion(server.user, kind)),
            lambda: alter(made),
            "Authentication failed",
        )
