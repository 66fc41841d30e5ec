"""What holds for every type of sink, with the engine, a real store and a real target.

The same tests run for each type. A test kills the process of the sinks at each step, kills the target, and looks at what
another program finds in the target.
"""

from __future__ import annotations

import collections
import json
import secrets
import signal
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from cdcbridge.instants import SinkInstant
from tests.harness.world import World, eventually
from tests.sinks.case import Case, Received, by_key
from tests.sinks.cases import KINDS

MODES = ("stream", "fifo", "queue")
ROWS = 300
PARTITIONS = 4


@pytest.fixture(params=sorted(KINDS))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """One type of sink, with a destination of the test's own."""
    kind = KINDS[request.param]
    server = request.getfixturevalue(kind.fixture) if kind.fixture is not None else None
    made = kind.case(server, f"t{secrets.token_hex(4)}", partitions=PARTITIONS)
    yield made
    made.close()


@pytest.fixture(params=sorted(name for name, kind in KINDS.items() if kind.server is not None and kind.keeps))
def served(request: pytest.FixtureRequest) -> Iterator[Case]:
    """As `case`, on a server of the test's own, which it may kill."""
    kind = KINDS[request.param]
    assert kind.server
    with kind.server() as server:
        made = kind.case(server, f"t{secrets.token_hex(4)}", partitions=PARTITIONS)
        made.settle()
        yield made


@pytest.fixture
def world(world18: World) -> World:
    world18.execute("create table t (id int primary key, n int not null default 0)")
    return world18


def declare(world: World, case: Case, mode: str = "stream", **settings: Any) -> None:
    sink = {**case.sink(), **settings}
    world.store_settings["partitions"] = PARTITIONS
    world.consumer("events", mode=mode, sink=sink)


def fill(world: World, first: int = 1, rows: int = ROWS) -> None:
    """Insert rows, change each third and delete each seventh, so that keys have several messages."""
    world.execute(
        f"insert into t select n from generate_series({first}, {first + rows - 1}) n",
        f"update t set n = n + 1 where id >= {first} and id % 3 = 0",
        f"delete from t where id >= {first} and id % 7 = 0",
    )


def expected(world: World) -> list[tuple[str, str]]:
    """(id, key) of each message that the sink must deliver, in order."""
    system, timeline = world.rows("select system_identifier, timeline from source")[0]
    rows = world.rows("select seq, key, commit_lsn::text, ordinal from messages order by seq")
    return [(f"{system}/{timeline}/{lsn}/{ordinal}", key) for seq, key, lsn, ordinal in rows]


def wait_for_all(world: World, case: Case, count: int) -> list[Received]:
    """Everything in the target, once each message of the log is there."""
    world.messages(count)
    # Reading the whole target is expensive, so it comes after the store says that nothing is left to deliver.
    eventually(lambda: left(world) == 0, "the sink has delivered all", 60)
    wanted = {one for one, _ in expected(world)}
    found: list[Received] = []

    def complete() -> bool:
        found[:] = case.received()
        return wanted <= {one.id for one in found}

    eventually(complete, "every message is in the target")
    return found


def left(world: World) -> int:
    """The number of messages that are not acknowledged."""
    (number,) = world.rows("select pending + in_flight from consumer_lag() where name = 'events'")[0]
    assert isinstance(number, int)
    return number


def messages_of(rows: int, first: int = 1) -> int:
    ids = range(first, first + rows)
    return rows + sum(1 for n in ids if n % 3 == 0) + sum(1 for n in ids if n % 7 == 0)


def check(world: World, case: Case, received: list[Received], mode: str) -> None:
    """Nothing lost, nothing foreign, each key in order, and nothing twice where that is promised."""
    wanted = expected(world)
    got = [(one.id, one.key) for one in received]
    assert {one for one, _ in got} == {one for one, _ in wanted}
    if mode == "stream" and case.exactly_once:
        assert len(got) == len(wanted), collections.Counter(got).most_common(3)
    if mode != "queue":
        assert by_key(got) == by_key(wanted)


def confirmed(world: World) -> bool:
    """Whether the server may remove the WAL of everything in the log."""
    query = "select confirmed_flush_lsn >= (select max(commit_lsn) from messages) from pg_replication_slots where slot_name = %s"
    return bool(world.value(query, world.slot))


def settled(world: World) -> bool:
    """Whether the consumer has nothing left to do."""
    pending, in_flight, dead = world.rows("select pending, in_flight, dead from consumer_lag() where name = 'events'")[
        0
    ]
    return (pending, in_flight, dead) == (0, 0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_each_message_arrives_in_order(world: World, case: Case, mode: str) -> None:
    declare(world, case, mode)
    with world.bridge():
        world.start_sinks()
        fill(world)
        received = wait_for_all(world, case, messages_of(ROWS))
        check(world, case, received, mode)
        eventually(lambda: settled(world), "offsets and acks follow")
        counted = "select coalesce(max(delivered), 0) from sinks"
        eventually(lambda: world.value(counted) >= len(received) - 1, "the counters follow within a second")


@pytest.mark.parametrize(
    ("mode", "instant"),
    [("stream", one) for one in get_args(SinkInstant) if one != "claimed"]
    + [("fifo", one) for one in get_args(SinkInstant)],
)
def test_nothing_is_lost_when_the_process_dies(world: World, case: Case, mode: str, instant: SinkInstant) -> None:
    declare(world, case, mode, batch={"max_messages": 40} if case.type != "http" else None)
    world.consumers[-1]["visibility_timeout"] = "2s"
    with world.bridge():
        times = 1 if instant == "target opened" or case.type == "http" else 3
        dying = world.start_sinks(crash=(instant, times))
        fill(world)
        assert eventually(lambda: dying.poll() is not None and dying.wait(), "it dies", 60) == -signal.SIGKILL
        world.start_sinks()
        check(world, case, wait_for_all(world, case, messages_of(ROWS)), mode)
        eventually(lambda: settled(world), "offsets and acks follow")


def test_another_process_takes_over_within_five_seconds(world: World, case: Case) -> None:
    declare(world, case)
    with world.bridge():
        first = world.start_sinks()
        fill(world, 1, 30)
        wait_for_all(world, case, messages_of(30))
        second = world.start_sinks()
        eventually(lambda: world.value("select count(*) from sink_members") == 2, "both are there")
        holders = "select count(distinct member) from sink_lanes where leased_until > clock_timestamp()"
        lanes = world.value("select count(*) from sink_lanes")
        eventually(lambda: world.value(holders) == min(2, lanes), "they share the lanes")
        first.kill()
        fill(world, 1001, 30)
        world.messages(messages_of(30) + messages_of(30, 1001))
        wanted = {one for one, _ in expected(world)}
        eventually(lambda: wanted <= {one.id for one in case.received()}, "the other one delivers all", 5.5)
        check(world, case, case.received(), "stream")
        assert second.poll() is None


def test_a_target_that_was_killed_gets_the_rest(world: World, served: Case) -> None:
    case = served
    declare(world, case, batch={"max_messages": 40} if case.type != "http" else None, timeout="3s")
    with world.bridge():
        world.start_sinks()
        fill(world, 1, 100)
        eventually(lambda: len(case.received()) > 20, "it delivers")
        case.server.kill()
        fill(world, 1001, 100)
        eventually(lambda: world.value("select max(error) from sinks") is not None, "the error is told")
        assert world.json("sinks", "list", "--json")[0]["state"] == "failing"
        eventually(lambda: confirmed(world), "the slot does not wait for the sink")
        case.server.restart()
        check(world, case, wait_for_all(world, case, messages_of(100) + messages_of(100, 1001)), "stream")
        eventually(lambda: world.value("select max(error) from sinks") is None, "the error is over", 40)


def test_a_sink_that_is_paused_delivers_nothing(world: World, case: Case) -> None:
    declare(world, case)
    with world.bridge():
        world.start_sinks()
        fill(world, 1, 10)
        wait_for_all(world, case, messages_of(10))
        assert world.json("sinks", "pause", "events") == {"paused": "events"}
        eventually(lambda: world.value("select count(*) from sink_members") == 0, "it leaves its lanes")
        before = case.received()
        fill(world, 101, 10)
        world.messages(messages_of(10) + messages_of(10, 101))
        assert case.received() == before
        assert world.json("sinks", "resume", "events") == {"resumed": "events"}
        check(world, case, wait_for_all(world, case, messages_of(10) + messages_of(10, 101)), "stream")


def test_a_changed_file_is_followed_while_it_runs(world: World, case: Case) -> None:
    declare(world, case)
    with world.bridge():
        world.start_sinks()
        fill(world, 1, 10)
        wait_for_all(world, case, messages_of(10))
        declare(world, case, mask={"n": "null"})
        world.write_config()
        eventually(lambda: "sinks.changed" in world.log("sinks.log"), "the file is read again")
        fill(world, 101, 10)
        received = wait_for_all(world, case, messages_of(10) + messages_of(10, 101))
        check(world, case, received, "stream")
        last = json.loads(received[-1].body)
        assert "n" not in str(last["data"]["record"]) or last["data"]["record"].get("n") is None


def test_it_ends_after_the_batches_in_progress(world: World, case: Case) -> None:
    declare(world, case)
    with world.bridge():
        process = world.start_sinks()
        fill(world)
        eventually(case.received, "it delivers")
        process.terminate()
        assert process.wait(30) == 0
        assert world.value("select count(*) from sink_lanes where member is not null") == 0
        world.start_sinks()
        check(world, case, wait_for_all(world, case, messages_of(ROWS)), "stream")


def test_check_finds_nothing_missing(world: World, case: Case) -> None:
    declare(world, case)
    done = world.run_program("sinks", "check")
    assert (done.stdout, done.returncode) == ("ok\n", 0), done
