"""Transactions that the source sends before they commit: the log is the same as if they had been sent at their commit."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.source import plugins
from tests.conftest import DEBIAN_15, FAST, NEWER
from tests.harness.world import World, eventually, fresh_database

LOW = {**FAST, "logical_decoding_work_mem": "64kB", "max_prepared_transactions": "10"}
LOG = """
    select topic, key, partition, data::text, commit_lsn::text, ordinal, xid, commit_time, old_key from messages
    where topic <> 'cdcbridge.gap' order by seq
"""
TABLES = """
    create table t (id int primary key, v text);
    create table u (id int, n int, primary key (id, n)) partition by hash (id);
    create table u_0 partition of u for values with (modulus 2, remainder 0);
    create table u_1 partition of u for values with (modulus 2, remainder 1);
"""


@pytest.fixture(scope="module", params=["15", "18"])
def low(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server that sends a transaction as soon as it has 64 kB of changes."""
    binaries = DEBIAN_15 if request.param == "15" else NEWER
    with EmbeddedServer(binaries, settings=LOW) as server:
        yield server


@pytest.fixture
def world(low: EmbeddedServer, tmp_path: Path) -> Iterator[World]:
    with fresh_database(low) as database:
        made = World(low, database, "pgoutput", tmp_path)
        made.execute(*[statement for statement in TABLES.split(";") if statement.strip()])
        made.consumer(tables=("public.t", "public.u"), topics=["news"])
        yield made
        made.close()


def spilled(world: World) -> int:
    return int(world.value("select count(*) from spilled"))


def scenario(world: World) -> None:
    """Three sessions in turn, each with more than the server keeps; savepoints, messages, DDL, truncates, roll-backs."""
    first, second, third = (psycopg.connect(world.dsn) for _ in range(3))
    first.execute("insert into t select g, repeat('a', 100) from generate_series(1, 3000) g")
    second.execute("insert into u select g, 0 from generate_series(1, 3000) g")
    first.execute("savepoint a")
    first.execute("update t set v = repeat('b', 100) where id <= 1500")
    third.execute("insert into t select g, repeat('c', 100) from generate_series(10001, 13000) g")
    first.execute("rollback to a")
    first.execute("savepoint b; delete from t where id > 2900")
    second.execute("savepoint x; update u set n = n + 1; savepoint y; update u set id = id + 10000 where id < 1000")
    second.execute("rollback to y")
    second.execute('select pg_logical_emit_message(true, \'cdcbridge:news\', \'{"key": "k", "data": 1}\')')
    world.execute("insert into t values (-1, 'between')")
    eventually(lambda: spilled(world) > 0, "what is in progress is put aside")
    assert {key for _, key, _ in world.messages(1)} == {"-1"}, "and seen by nobody"
    third.rollback()
    first.execute("release b; update t set id = -id where id between 10 and 2000")
    second.execute("truncate u; insert into u values (1, 1), (2, 2)")
    first.commit()
    second.commit()
    third.execute("alter table t add column w int default 7; insert into t (id) select generate_series(20001, 23000)")
    third.execute(
        "savepoint d; alter table t add column gone int default 8; insert into t (id) select generate_series(30001, 33000)"
    )
    third.execute("rollback to d; insert into t (id, w) select g, g from generate_series(40001, 40100) g")
    third.commit()
    world.execute("insert into t values (-2, 'last', 1)")
    for session in (first, second, third):
        session.close()


def test_the_log_is_as_if_each_had_been_sent_at_its_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.sql.execute("create publication cdcbridge for table t, u with (publish_via_partition_root = true)")
    world.sql.execute("create publication cdcbridge_inserts with (publish = 'insert, truncate')")
    world.sql.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", (f"{world.slot}_b",))
    with world.bridge():
        scenario(world)
        eventually(lambda: world.rows("select from messages where key = '-2'"), "the last row")
        streamed = world.rows(LOG)
        eventually(lambda: spilled(world) == 0, "nothing is left aside")
    assert world.sql.execute("select stream_txns > 0 from pg_stat_replication_slots where slot_name = %s",
                             (world.slot,)).fetchone() == (True,)  # fmt: skip
    original = plugins.plugin_options

    def plain(*given: Any) -> dict[str, str]:
        options = original(*given)
        del options["streaming"]
        return {**options, "proto_version": "1"}

    monkeypatch.setattr(plugins, "plugin_options", plain)
    world.slot, world.schema = f"{world.slot}_b", "other"
    with world.bridge():
        eventually(lambda: world.rows("select from messages where key = '-2'"), "the last row")
        assert world.rows(LOG) == streamed
    assert len(streamed) > 13_000


def test_a_transaction_that_is_rolled_back_leaves_nothing_behind(world: World) -> None:
    with world.bridge(), psycopg.connect(world.dsn) as session:
        session.execute("insert into t select g, repeat('a', 100) from generate_series(1, 30000) g")
        eventually(lambda: spilled(world) > 3, "blocks aside")
        session.rollback()
        eventually(lambda: spilled(world) == 0, "they are gone")
        world.execute("insert into t values (1, 'x')")
        assert [key for _, key, _ in world.messages(1)] == ["1"]


def test_a_logical_message_that_was_rolled_back_with_its_savepoint_is_not_delivered(world: World) -> None:
    """The server sends it in progress, and does not say which subtransaction it was of."""
    with world.bridge(), psycopg.connect(world.dsn) as session:
        session.execute("savepoint a")
        session.execute('select pg_logical_emit_message(true, \'cdcbridge:news\', \'{"key": "k", "data": "void"}\')')
        session.execute("insert into t select g, repeat('a', 100) from generate_series(1, 30000) g")
        eventually(lambda: spilled(world) > 0, "it is sent in progress")
        session.execute("rollback to a")
        session.execute('select pg_logical_emit_message(true, \'cdcbridge:news\', \'{"key": "k", "data": "kept"}\')')
        session.execute("insert into t values (-1, 'last')")
        session.commit()
        rows = world.messages(2, "select topic, key, ordinal from messages order by seq")
    assert rows == [("news", "k", None), ("public.t", "-1", 1)]
    assert world.value("select data ->> 'record' from messages where topic = 'news'") == "kept"


def test_much_that_was_rolled_back_is_passed_over_in_pieces(world: World) -> None:
    """A session must not fall silent over it: it reads no more of it at once than of anything else."""
    with world.bridge(), psycopg.connect(world.dsn) as session:
        pid = "select active_pid from pg_replication_slots where slot_name = %s"
        streaming = world.sql.execute(pid, (world.slot,)).fetchone()
        session.execute("savepoint a")
        session.execute("insert into t select g, repeat('a', 1000) from generate_series(1, 60000) g")
        session.execute("rollback to a")
        session.execute("insert into t values (-1, 'last')")
        session.commit()
        assert [key for _, key, _ in world.messages(1)] == ["-1"]
        assert world.sql.execute(pid, (world.slot,)).fetchone() == streaming


@pytest.mark.timeout(400)  # half a million rows, of which each kill takes back the ones that were not confirmed
def test_transactions_in_progress_while_the_bridge_is_killed(world: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    ended = threading.Event()
    kept: list[int] = []

    def write(number: int) -> None:
        """Transactions of some hundred rows, slowly, some of them or parts of them rolled back."""
        mine = random.Random(seed + number)
        next_id = number * 10_000_000
        with psycopg.connect(world.dsn) as session:
            while not ended.is_set():
                rows: list[int] = []
                for part in range(mine.randrange(1, 5)):
                    ids = range(next_id, next_id + mine.choice((1, 300, 900)))
                    next_id = ids.stop
                    session.execute(f"savepoint p{part}")
                    session.execute("insert into t select g, repeat('x', 150) from generate_series(%s::int, %s::int) g",
                                    (ids.start, ids.stop - 1))  # fmt: skip
                    if mine.random() < 0.25:
                        session.execute(f"rollback to p{part}")
                    else:
                        rows += ids
                    ended.wait(mine.uniform(0, 0.05))
                if mine.random() < 0.2:
                    session.rollback()
                else:
                    session.commit()
                    kept.extend(rows)

    process = world.start_process()
    eventually(world.active, "it streams")
    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    try:
        for number in range(8):
            ended.wait(chance.uniform(0.2, 1.2))
            if number % 2:
                eventually(lambda: spilled(world) > 0, "rows are aside")
            seen += spilled(world) > 0
            process.kill()
            process.wait()
            process = world.start_process()
            eventually(world.active, "the next one streams")
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    assert seen, "nothing was aside when it was killed: the test tests nothing"
    eventually(lambda: world.value("select count(*) from messages") >= len(kept), f"{len(kept)} rows", patience=150)
    keys = [int(key) for _, key, _ in world.messages(len(kept))]
    assert sorted(keys) == sorted(kept)
    positions = "select count(*) - count(distinct (commit_lsn, ordinal)) from messages"
    assert world.value(positions) == 0
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize("plugin", ["pgoutput", "wal2json"])
def test_a_prepared_transaction_comes_when_it_is_committed_and_not_when_it_is_rolled_back(
    low: EmbeddedServer, tmp_path: Path, plugin: str
) -> None:
    if plugin == "wal2json" and low.binaries != DEBIAN_15:
        plugin = "pgoutput"  # this server has no other
    with fresh_database(low) as database:
        world = World(low, database, plugin, tmp_path)
        world.execute("create table t (id int primary key, v text)")
        world.consumer()
        with world.bridge():
            for number, end in ((0, "rollback"), (1, "commit")):
                gid = f"{database}_{number}"
                first = number * 10_000
                with psycopg.connect(world.dsn, autocommit=True) as session:
                    session.execute("begin")
                    session.execute("insert into t select g, repeat('x', 200) from generate_series(%s::int, %s::int) g",
                                    (first, first + 1999))  # fmt: skip
                    session.execute(f"prepare transaction '{gid}'".encode())
                world.execute(f"insert into t values ({-1 - number}, 'between')")
                eventually(lambda: world.rows("select from messages where key = %s", str(-1 - number)))  # noqa: B023
                assert world.value("select count(*) from messages") == number + 1
                world.execute(f"{end} prepared '{gid}'")
            keys = [int(key) for _, key, _ in world.messages(2002)]
        assert keys == [-1, -2, *range(10_000, 12_000)]
        world.close()


@pytest.mark.parametrize("subtransactions", [100_000])
def test_a_hundred_thousand_subtransactions(world: World, subtransactions: int) -> None:
    """Every third one rolled back."""
    with world.bridge():
        world.execute(
            f"""do $$ begin
                for n in 1 .. {subtransactions} loop
                    begin
                        insert into t values (n, 'x');
                        if n % 3 = 0 then raise exception 'no'; end if;
                    exception when raise_exception then null;
                    end;
                end loop;
            end $$"""
        )
        left = subtransactions - subtransactions // 3
        world.messages(left, "select 1 from messages")
        assert world.value("select count(*) filter (where key::int % 3 = 0) from messages") == 0
