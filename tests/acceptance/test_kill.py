"""kill -9 at every step, at random moments, and in the middle of a large transaction: nothing lost, nothing twice."""

from __future__ import annotations

import random
import signal
import threading

import psycopg
import pytest

from cdcbridge.instants import Instant
from tests.harness.world import PATIENCE, World, eventually

# Each step of a change's path, and the how manieth time is the last one: in the middle of a transaction where it can be.
STEPS: dict[Instant, int] = {
    "received": 600,
    "decoded": 600,
    "collected": 600,
    "submitted": 1,
    "append begun": 1,
    "rows copied": 1,
    "position written": 1,
    "committed": 1,
    "about to confirm": 1,
    "confirmed": 1,
    "about to note feeds": 1,
}

ONCE = """
    select (select count(*) from public.t) as rows,
           (select count(*) from messages) as messages,
           (select count(distinct key) from messages) as keys,
           (select count(distinct (commit_lsn, ordinal)) from messages) as positions,
           (select array_agg(n order by n) from (select count(*) as n from consumer_messages group by consumer_id) c),
           (select array_agg(n order by n)
            from (select count(distinct seq) as n from consumer_messages group by consumer_id) c)
"""


def expect_each_row_once(world: World, consumers: int) -> None:
    """Every row of t is in the log once, and once in each consumer's queue."""
    count = world.sql.execute("select count(*) from t").fetchone()
    assert count is not None
    eventually(lambda: world.value("select count(distinct key) from messages") >= count[0], f"{count[0]} rows")
    assert world.rows(ONCE) == [(count[0],) * 4 + ([count[0]] * consumers, [count[0]] * consumers)]


@pytest.mark.parametrize("instant", STEPS)
def test_killed_at_each_step(world: World, instant: Instant) -> None:
    world.execute("create table t (id int primary key, v text)")
    world.consumer("one")
    world.consumer("two", filter="record.id > 0")
    first = world.start_process()
    eventually(world.active, "the bridge streams")
    first.send_signal(signal.SIGTERM)
    assert first.wait(PATIENCE) == 0
    for number in range(5):
        world.execute(
            f"insert into t select g, repeat('x', 100) from generate_series({number * 400 + 1}, {number * 400 + 400}) g"
        )
    crashing = world.start_process(crash=(instant, STEPS[instant]))
    assert crashing.wait(PATIENCE) == -signal.SIGKILL, world.log()
    world.start_process()
    expect_each_row_once(world, 2)


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_killed_while_the_log_is_given_to_a_new_consumer(world: World, mode: str) -> None:
    world.execute("create table t (id int primary key, v text)")
    world.consumer("one")
    with world.bridge():
        world.execute("insert into t select g, 'x' from generate_series(1, 7000) g")
        world.messages(7000, "select from messages")
    world.consumer("late", mode=mode, start="earliest")
    crashing = world.start_process(crash=("log page filled in", 2))
    assert crashing.wait(PATIENCE) == -signal.SIGKILL, world.log()
    assert world.value("select count(*) from consumers") == 1, "all of the log, or no consumer"
    world.execute("insert into t values (7001, 'y')")
    world.start_process()
    expect_each_row_once(world, 2)


def test_killed_at_random_moments_under_load(world: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    world.execute("create table t (id bigint generated always as identity primary key, v text)")
    world.consumer("one")
    world.consumer("two")
    first = world.start_process()
    eventually(world.active, "the slot is there before the first row")
    first.kill()
    first.wait()
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(world.dsn, autocommit=True) as session:
            while not stop.is_set():
                session.execute("insert into t (v) select 'x' from generate_series(1, %s)", (moments.randint(1, 80),))
                stop.wait(0.005)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(6):
            process = world.start_process()
            eventually(world.active, "the bridge streams")
            stop.wait(moments.uniform(0, 0.7))
            process.kill()
            process.wait()
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    world.start_process()
    expect_each_row_once(world, 2)


def test_killed_inside_a_large_transaction_and_restarted_with_other_tables(world: World) -> None:
    """The transaction is finished with the options it was begun with; the next one goes by the new file."""
    world.execute("create table t (id int primary key, v text)", "create table u (id int primary key)")
    world.consumer("one")
    started = world.start_process()
    eventually(world.active, "the bridge streams")
    started.send_signal(signal.SIGTERM)
    started.wait()
    world.execute(
        "begin; insert into t select g, repeat('x', 200) from generate_series(1, 30000) g; insert into u values (1);"
        " insert into t select g, 'tail' from generate_series(30001, 30010) g; commit"
    )
    crashing = world.start_process(crash=("committed", 2))
    assert crashing.wait(PATIENCE) == -signal.SIGKILL, world.log()
    part = world.value("select count(*) from messages")
    assert 0 < part < 30010
    assert world.value("select unfinished is not null from positions")
    before = world.sql.execute(
        "select confirmed_flush_lsn from pg_replication_slots where slot_name = %s", (world.slot,)
    )
    confirmed = before.fetchone()
    assert confirmed is not None
    assert world.value("select %s::pg_lsn < (select min(commit_lsn) from messages)", confirmed[0])
    world.consumer("one", ("public.u",))
    world.consumer("new", ("public.u", "public.t"))
    world.start_process()
    eventually(lambda: world.value("select count(*) from messages") >= 30010, "the rest of the transaction")
    eventually(lambda: world.value("select unfinished is null from positions"), "the transaction is finished")
    world.execute("insert into u values (2)", "insert into t values (50000)")
    eventually(lambda: world.value("select count(*) from messages") >= 30012, "the next transactions")
    assert world.rows("select topic, count(*), count(distinct key) from messages group by 1 order by 1") == [
        ("public.t", 30011, 30011),
        ("public.u", 1, 1),
    ]
    assert world.rows(
        "select c.name, count(*) from consumer_messages m join consumers c on c.id = m.consumer_id group by 1 order by 1"
    ) == [("new", 2), ("one", 30011)]
