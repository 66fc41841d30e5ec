"""Snapshot and backfills while everything is written to and the bridge is killed: each consumer comes to the table's state, and
no row comes twice at the seam, or older than a change before it.
"""

from __future__ import annotations

import random
import signal
import threading
from typing import Any

import psycopg
import pytest

from cdcbridge.backfill.verify import verify
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.instants import Instant
from tests.conftest import FAST
from tests.harness.standby import Standby
from tests.harness.world import PATIENCE, World, eventually

ROWS = 10_000
KILLS = 5  # while the snapshots are read; and as many while backfills are
PAUSE = 0.01  # seconds between two transactions of a writer, which would take the processor from the bridge otherwise
NAMES = {"queue": "q", "fifo": "f", "stream": "s"}


class Writer(threading.Thread):
    """Inserts, updates, deletes, changes of keys and truncates; each row's v is larger than all that were before it."""

    def __init__(self, dsn: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._dsn = dsn
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self.transactions = 0

    def run(self) -> None:
        with psycopg.connect(self._dsn) as session:
            while not self._stopping.is_set():
                try:
                    self._transact(session)
                except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                    session.rollback()
                self.transactions += 1
                self._stopping.wait(PAUSE)

    def _transact(self, session: psycopg.Connection[Any]) -> None:
        for _ in range(self._random.choice((1, 1, 5))):
            if self._random.random() < 0.2:
                with session.transaction(force_rollback=self._random.random() < 0.3):
                    self._write(session)
            else:
                self._write(session)
        (session.rollback if self._random.random() < 0.1 else session.commit)()

    def _write(self, session: psycopg.Connection[Any]) -> None:
        key = self._random.randrange(1, ROWS * 11 // 10)
        table = self._random.choice(("big", "big", "big", "small"))
        if table == "small":
            key %= 300
            if self._random.random() < 0.02:
                session.execute("truncate small")
                return
        statement = self._random.choice(
            (
                "insert into {} values ({}, nextval('v')) on conflict do nothing",
                "update {} set v = nextval('v') where id = {}",
                "delete from {} where id = {}",
                "update {0} set id = -id, v = nextval('v') where id = {1} and not exists (select from {0} where id = -{1})",
                "with d as (delete from {0} where id = {1}) select",
                "delete from {0} where id = {1}; insert into {0} values ({1}, nextval('v'))",
            )
        ).format(table, key)
        for one in statement.split(";"):
            session.execute(one.encode())

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def fill(world: World, rows: int) -> None:
    """Two tables, and a consumer of each mode that wants what is in them."""
    world.execute(
        "create sequence v",
        "create table big (id int primary key, v bigint)",
        "create table small (id int primary key, v bigint)",
        f"insert into big select i, nextval('v') from generate_series(1, {rows}) i",
        "insert into small select i, nextval('v') from generate_series(1, 200) i",
    )
    for mode, name in NAMES.items():
        world.consumer(name, ("public.big", "public.small"), mode=mode, start="snapshot")


def fold(rows: list[tuple[int, str, str, dict[str, Any]]]) -> tuple[dict[str, dict[int, int]], list[str]]:
    """The state that a consumer's messages lead to, and what is wrong with them on the way."""
    state: dict[str, dict[int, int]] = {"public.big": {}, "public.small": {}}
    latest: dict[tuple[str, int], int] = {}
    wrong = []
    for seq, topic, _key, data in rows:
        table, op, record = state[topic], data["op"], data["record"]
        if op == "truncate":
            table.clear()
        elif op == "delete":
            table.pop(record["id"], None)
        else:
            if data["old"]:
                table.pop(data["old"]["id"], None)
            place = (topic, record["id"])
            if record["v"] <= latest.get(place, 0):
                wrong.append(f"seq {seq}: {op} of {place} has v {record['v']} after {latest[place]}")
            latest[place] = record["v"]
            table[record["id"]] = record["v"]
    return state, wrong


def messages(world: World, name: str) -> list[tuple[int, str, str, dict[str, Any]]]:
    """What the consumer got, in order."""
    if name == "s":
        return world.rows(
            "with s as materialized (select wish_of(c) as wish from consumers c where name = 's')"
            " select m.seq, m.topic, m.key, m.data from messages m, s"
            " where is_wanted(m.topic, m.data, m.reader, s.wish) order by m.seq"
        )
    return world.rows(
        "select m.seq, m.topic, m.key, m.data from consumer_messages w join consumers c on c.id = w.consumer_id"
        " join messages m using (seq) where c.name = %s order by m.seq",
        name,
    )


@pytest.mark.timeout(360)
def test_the_first_start_from_the_slots_snapshot(world: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    fill(world, ROWS)
    writers = [Writer(world.dsn, seed + n) for n in range(2)]
    for writer in writers:
        writer.start()
    process = world.start_process("--consistent", crash=("chunk handed over", 8))
    assert process.wait(PATIENCE) == -signal.SIGKILL, world.log()
    assert not finished(world)
    assert "bridge.streaming" not in world.log(), "all of this is before the stream begins"
    world.start_process("--consistent")
    eventually(lambda: finished(world), patience=120)
    for writer in writers:
        writer.stop()
    assert_complete(world)


@pytest.mark.timeout(200)
def test_rows_are_read_from_a_standby_that_lags(world18: World, pg18: EmbeddedServer) -> None:
    world = world18
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    fill(world, ROWS)
    with Standby(pg18, settings={**FAST, "recovery_min_apply_delay": "300ms"}) as standby:
        world.settings["read_dsn"] = standby.dsn(world.database)
        writer = Writer(world.dsn, seed)
        writer.start()
        with world.bridge():
            with psycopg.connect(standby.dsn(), autocommit=True) as session:
                reading = "select count(*) from pg_stat_activity where application_name = 'cdcbridge backfill'"
                eventually(lambda: session.execute(reading).fetchone() != (0,), "the standby is read")
            eventually(lambda: finished(world), patience=120)
            writer.stop()
            assert verify(world.config(), "public.big").ok
            assert verify(world.config(), "public.small").ok
        for name in NAMES.values():
            assert fold(messages(world, name))[1] == [], name


@pytest.mark.parametrize("option", [(), ("--consistent",)], ids=["beside the stream", "consistent"])
@pytest.mark.parametrize(("instant", "count"), [("table described", 2), ("chunk handed over", 3)])
def test_killed_at_each_step_of_a_snapshot(world: World, instant: Instant, count: int, option: tuple[str, ...]) -> None:
    fill(world, 3000)
    process = world.start_process(*option, crash=(instant, count))
    assert process.wait(PATIENCE) == -signal.SIGKILL, world.log()
    assert not finished(world)
    world.execute("update big set v = nextval('v') where id % 3 = 0", "delete from small where id % 3 = 0")
    world.start_process(*option)
    eventually(lambda: finished(world))
    assert_complete(world)


def assert_complete(world: World) -> None:
    """Each consumer's messages lead to the rows that the tables have, and none of them came in a wrong order."""
    assert world.json("verify", "public.big", "--json")["ok"]
    assert world.json("verify", "public.small", "--json")["ok"]
    for name in NAMES.values():
        state, wrong = fold(messages(world, name))
        assert wrong == [], name
        for table, rows in state.items():
            assert rows == dict(world.sql.execute(f"select id, v from {table}".encode()).fetchall()), (name, table)


def finished(world: World) -> bool:
    return bool(world.value("select bool_and(state = 'done') from backfills"))


@pytest.mark.timeout(400)
def test_snapshots_and_backfills_while_the_bridge_is_killed(world: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    fill(world, ROWS)
    writers = [Writer(world.dsn, seed + n) for n in range(2)]
    process = world.start_process()
    eventually(world.active)
    for writer in writers:
        writer.start()
    for _ in range(KILLS):
        threading.Event().wait(chance.uniform(0.1, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = world.start_process()
        eventually(world.active)
    eventually(lambda: finished(world), patience=120)
    before = {name: len(messages(world, name)) for name in NAMES.values()}
    for name in NAMES.values():
        world.json("backfill", "start", name, "public.big")
        world.json("backfill", "start", name, "public.small", "--rate", "200")
    for _ in range(KILLS):
        threading.Event().wait(chance.uniform(0.1, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = world.start_process()
        eventually(world.active)
    eventually(lambda: finished(world), patience=120)
    for writer in writers:
        writer.stop()
    assert world.json("verify", "public.big", "--json")["ok"]
    assert world.json("verify", "public.small", "--json")["ok"]
    tables = {
        f"public.{t}": dict(world.sql.execute(f"select id, v from {t}".encode()).fetchall()) for t in ("big", "small")
    }
    for name in NAMES.values():
        got = messages(world, name)
        state, wrong = fold(got[: before[name]])
        assert wrong == [], f"the snapshot of {name}"
        reads = sum(1 for row in got[before[name] :] if row[3]["op"] == "read")
        assert reads > len(tables["public.big"]) // 3, "the backfill"
        state, wrong = fold(got)
        wrong = [w for w in wrong if ": read" not in w]
        assert wrong == [], name
        assert state == tables, name
    print(f"{sum(writer.transactions for writer in writers)} transactions, {len(got)} messages")
