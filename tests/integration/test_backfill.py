"""Rows that were there before: the seam to what comes through the stream, and what may go wrong at it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.backfill.verify import verify
from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import World, eventually, fresh_database


def ops(world: World, query: str = "select data ->> 'op', key from messages order by seq") -> list[tuple[str, str]]:
    return world.rows(query)


def finished(world: World) -> bool:
    return bool(world.value("select count(*) > 0 and bool_and(state = 'done') from backfills"))


def has_read(world: World, rows: int) -> bool:
    return int(listed(world)["rows"]) >= rows


def listed(world: World) -> Any:
    """The youngest backfill, as people see it."""
    return world.json("backfill", "list", "c", "--json")[-1]


@pytest.mark.parametrize("mode", ["queue", "fifo", "stream"])
def test_a_new_consumer_gets_the_rows_that_are_there_then_the_changes(world: World, mode: str) -> None:
    world.execute(
        "create table t (id int primary key, v text)", "insert into t select i, 'a' from generate_series(1, 2500) i"
    )
    world.consumer(mode=mode, start="snapshot")
    world.consumer("other", mode=mode)
    with world.bridge():
        eventually(lambda: finished(world))
        world.execute("update t set v = 'b' where id = 7")
        eventually(lambda: world.value("select count(*) from messages") == 2501)
    assert ops(world)[:-1] == [("read", str(n)) for n in range(1, 2501)]
    assert ops(world)[-1] == ("update", "7")
    assert world.rows("select data::jsonb from messages where seq = 3")[0][0] == {
        "op": "read",
        "record": {"id": 3, "v": "a"},
        "old": None,
        "unchanged": [],
    }
    pending = dict(world.rows("select name, pending from consumer_lag()"))
    assert pending == {"c": 2501, "other": 1}


def test_the_log_tells_the_table(world: World) -> None:
    world.execute(
        "create table t (a int, b text, n numeric, big text, primary key (b, a))",
        "alter table t alter big set storage external",
        "insert into t select i, 'k' || i % 5, i / 3.0, repeat('x', 3000) from generate_series(1, 500) i",
    )
    world.consumer(start="snapshot")
    with world.bridge():
        eventually(lambda: finished(world))
        world.execute(
            "update t set n = n + 1 where a % 3 = 0",
            "delete from t where a % 7 = 0",
            "update t set a = a + 1000 where a % 11 = 0",
            "insert into t values (7, 'k2', 1.50, null)",
        )
        assert world.json("verify", "public.t", "--json") == {
            "table": "public.t", "key": ["b", "a"], "ok": True, "rows": 430, "missing": [], "extra": [], "different": []
        }  # fmt: skip
        world.execute("update cdcbridge.messages set data = replace(data::text, '\"n\":1.50', '\"n\":1.51')::json")
        result = world.run_program("verify", "public.t")
        assert result.returncode == 2 and 'different: 1: ["k2","7"]' in result.stdout


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_filter_key_limit_and_columns_are_the_consumers(world: World, mode: str) -> None:
    world.execute(
        "create table t (id int primary key, customer int, status text, note text)",
        "alter table t replica identity full",
        "insert into t select i, i % 3, case when i % 2 = 0 then 'paid' else 'open' end, repeat('x', i * 100)"
        " from generate_series(1, 20) i",
    )
    world.consumer(
        mode=mode, start="snapshot", filter="record.status == 'paid'", key=["customer"], max_message_bytes="1850B",
        columns={"exclude": ["note"]},
    )  # fmt: skip
    with world.bridge():
        eventually(lambda: finished(world))
    got = world.rows("select key, data -> 'record' from receive('c', 100)")
    assert [(key, record["id"]) for key, record in got] == [(str(n % 3), n) for n in range(2, 18, 2)]
    assert got[0][1] == {"id": 2, "customer": 2, "status": "paid"}
    assert [reason.split(":")[0] for (reason,) in world.rows("select reason from dead_messages")] == ["oversized"] * 2
    assert world.value("select count(*) from messages") == 10, "what nobody takes is not in the log"


def test_a_backfill_that_is_asked_for_is_for_its_consumer_alone(world15: World) -> None:
    world = world15
    world.execute(
        "create table t (id int primary key, v text, w int)",
        "insert into t select i, 'a', i from generate_series(1, 50) i",
    )
    for mode in ("queue", "stream"):
        world.consumer(mode[0], mode=mode)
        world.consumer(f"other-{mode}", mode=mode)
    with world.bridge():
        for name in ("q", "s"):
            started = world.run_program(
                "backfill", "start", name, "public.t", "--where", "id <= 10", "--columns", "id, v", "--follow"
            )
            assert started.returncode == 0, started.stderr
            assert json.loads(started.stdout)["messages"] == 10
        pending = dict(world.rows("select name, pending from consumer_lag()"))
        assert pending == {"q": 10, "s": 10, "other-queue": 0, "other-stream": 0}
        world.consumer("late", start="earliest")
        world.json("consumers", "apply", "--json")
        assert world.value("select pending from consumer_lag() where name = 'late'") == 0
        (data,) = world.rows("select data from receive('q', 1)")[0]
    assert data == {"op": "read", "record": {"id": 1, "v": "a"}, "old": None, "unchanged": ["w"]}


def test_pause_resume_and_cancel(world15: World) -> None:
    world = world15
    world.execute("create table t (id int primary key)", "insert into t select generate_series(1, 10000)")
    world.consumer()
    with world.bridge():
        world.json("backfill", "start", "c", "public.t", "--rate", "200")
        again = world.run_program("backfill", "start", "c", "public.t")
        assert again.returncode == 2 and "has not ended yet" in again.stderr
        eventually(lambda: listed(world)["rows"] > 0)
        assert world.json("backfill", "pause", "c") == {"paused": 1}
        eventually(lambda: not world.sql.execute(
            "select from pg_stat_activity where application_name = 'cdcbridge backfill'").fetchall())  # fmt: skip
        held = listed(world)
        assert held["state"] == "paused" and 0 < held["rows"] < 10_000 and 1 <= held["percent"] <= 99
        assert held["id"] in [b["id"] for b in world.json("lag", "--json")["backfills"]]
        assert world.json("backfill", "resume", "c", "public.t") == {"resumed": 1}
        eventually(lambda: listed(world)["rows"] > held["rows"])
        assert world.json("backfill", "cancel", "c") == {"cancelled": 1}
        assert listed(world)["state"] == "cancelled"
        nothing = world.run_program("backfill", "resume", "c")
        assert nothing.returncode == 2 and "has no backfill that is paused or failed" in nothing.stderr
        world.json("backfill", "start", "c", "public.t")
        eventually(lambda: listed(world)["state"] == "done")
    keys = [key for (key,) in world.rows("select key from messages order by seq")]
    assert keys[-10_000:] == [str(n) for n in range(1, 10_001)]
    assert keys[:-10_000] == [str(n) for n in range(1, len(keys) - 9_999)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nobody", "public.t"), 2, "no consumer named 'nobody'"),
        (("c", "public.absent"), 2, "the source has no table public.absent\n"),
        (("c", "other"), 2, "the source has no table other; did you mean public.other?"),
        (("c", "public.othr"), 2, "the source has no table public.othr; did you mean public.other?"),
        (("c", "sales.Other"), 2, "the source has no table sales.Other; did you mean public.other?"),
        (("c", "public.other"), 2, "consumer 'c' does not take public.other"),
        (("c", "public.t", "--where", "id >"), 2, "the condition 'id >' cannot be used: syntax error"),
        (("c", "public.t", "--where", "true); drop table t; select (1"), 2, "cannot insert multiple commands"),
        (("c", "public.t", "--columns", "id,nope"), 2, "public.t has no column 'nope'"),
        (("c", "public.t", "--rate", "0"), 2, "--rate"),
    ],
)
def test_what_cannot_be_backfilled_is_refused(
    world15: World, arguments: tuple[str, ...], code: int, message: str
) -> None:
    world15.execute("create table t (id int primary key)", "create table other (id int primary key)")
    world15.consumer()
    with world15.bridge():
        pass
    result = world15.run_program("backfill", "start", *arguments)
    assert result.returncode == code and message in result.stderr, result.stderr
    assert world15.value("select count(*) from backfills") == 0


def test_keys_of_all_kinds_are_read_in_their_order(world: World) -> None:
    keys = {
        "uuid": "md5(i::text)::uuid", "timestamptz": "'2024-01-01'::timestamptz + i * interval '1.5 h'",
        "numeric": "i / 7.0", 'text collate "C"': "chr(60 + i % 60) || i", "bytea": "int4send(i)", "bool": "i = 1",
        "float8": "i / 3.0", "inet": "'10.0.0.0'::inet + i", "date": "'2024-01-01'::date + i", "int4[]": "array[i, null]",
    }  # fmt: skip
    tables = []
    for number, (kind, expression) in enumerate(keys.items()):
        rows = 2 if kind == "bool" else 60
        world.execute(
            f"create table k{number} (k {kind}, n int, primary key (k, n))",
            f"insert into k{number} select {expression}, i % 3 from generate_series(1, {rows}) i",
            f"create table s{number} (k {kind} primary key)",
            f"insert into s{number} select k from k{number}",
        )
        tables += [f"public.k{number}", f"public.s{number}"]
    world.consumer(tables=tuple(tables), start="snapshot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdcbridge.backfill.worker.FIRST_ROWS", 7)
        patch.setattr("cdcbridge.backfill.worker.READ_SECONDS", 0.0)
        patch.setattr("cdcbridge.backfill.worker.FEWEST_ROWS", 7)
        with world.bridge():
            eventually(lambda: finished(world))
            for table in tables:
                assert verify(world.config(), table).ok, table
    assert world.value("select count(*) from messages") == world.value(
        "select count(distinct (topic, key)) from messages"
    )


def test_a_table_without_a_key_is_read_by_its_pages(world: World) -> None:
    world.execute(
        "create table t (v int, w text) partition by range (v)",
        "create table t1 partition of t for values from (0) to (1000)",
        "create table t2 partition of t for values from (1000) to (10000)",
        "insert into t select i, repeat('x', 100) from generate_series(0, 4999) i",
    )
    world.consumer(start="snapshot", operations=["insert", "truncate"])
    with world.bridge():
        eventually(lambda: finished(world))
        world.execute("insert into t values (1, 'new')")
        eventually(lambda: world.value("select count(*) from messages") == 5001)
    read = [
        v for (v,) in world.rows("select (data -> 'record' ->> 'v')::int from messages where data ->> 'op' = 'read'")
    ]
    assert sorted(read) == list(range(5000))
    assert world.value("select count(*) from messages where key is null and partition = 0") == 5001


def test_ddl_while_a_table_is_read(world15: World) -> None:
    world = world15
    world.execute(
        "create table t (id int primary key, v text, gone int)",
        "insert into t select i, 'a', 1 from generate_series(1, 2000) i",
    )
    world.consumer()
    with world.bridge():
        world.json("backfill", "start", "c", "public.t", "--rate", "1000")
        eventually(lambda: world.value("select count(*) from messages") > 0)
        world.execute("alter table t drop column gone, add column more int not null default 7")
        eventually(lambda: finished(world))
        assert world.value("select data -> 'record' from messages order by seq desc limit 1") == {
            "id": 2000, "v": "a", "more": 7
        }  # fmt: skip
        world.json("backfill", "start", "c", "public.t", "--rate", "1000")
        eventually(lambda: world.value("select count(*) from messages") > 2000)
        world.execute("alter table t drop constraint t_pkey, add primary key (v, id)")
        eventually(lambda: listed(world)["state"] == "failed")
        assert "the key of public.t was changed" in listed(world)["note"]
        world.json("backfill", "start", "c", "public.t", "--rate", "100")
        eventually(lambda: listed(world)["rows"] > 0)
        world.execute("drop table t")
        eventually(lambda: listed(world)["state"] == "failed")
        assert "public.t" in listed(world)["note"]


def test_a_consumer_that_is_removed_takes_its_backfill_with_it(world15: World) -> None:
    world = world15
    world.execute("create table t (id int primary key)", "insert into t select generate_series(1, 2000)")
    world.consumer()
    world.consumer("stays")
    with world.bridge():
        world.json("backfill", "start", "c", "public.t", "--rate", "500")
        eventually(lambda: world.value("select count(*) from messages") > 0)
        world.consumers = [c for c in world.consumers if c["name"] != "c"]
        removed = world.run_program("consumers", "remove", "c", "--yes")
        assert removed.returncode == 0, removed.stderr
        eventually(world.active)
        assert world.value("select count(*) from backfills") == 0
        assert world.value("select count(*) from backfill_progress") == 0
        world.execute("insert into t values (0)")
        eventually(lambda: world.value("select pending from consumer_lag() where name = 'stays'") == 1)


def test_a_transaction_that_writes_is_waited_for_and_named(world15: World) -> None:
    world = world15
    world.execute(
        "create table t (id int primary key, v int)", "insert into t select i, 0 from generate_series(1, 100) i"
    )
    world.consumer()
    with world.bridge(), psycopg.connect(world.dsn) as writer:
        writer.execute("update t set v = 1 where id <= 50")
        world.json("backfill", "start", "c", "public.t")
        note = eventually(lambda: world.json("backfill", "list", "--json")[0]["note"])
        assert note.startswith(f"waits for pid {writer.info.backend_pid} (idle in transaction")
        assert world.value("select count(*) from messages") == 0
        writer.commit()
        eventually(lambda: finished(world))
        assert world.json("verify", "public.t", "--json")["ok"]
    assert sorted(ops(world)) == sorted(
        [("update", str(n)) for n in range(1, 51)] + [("read", str(n)) for n in range(51, 101)]
    ), "what came as a change is not read again"


def test_a_role_without_rights_is_told_what_it_lacks(world15: World) -> None:
    world = world15
    world.execute("create table t (id int primary key)", "insert into t values (1)")
    world.consumer()
    with world.bridge():
        pass
    world.execute("create role poor login")
    world.store_dsn = world.dsn
    try:
        world.user = "poor"
        result = world.run_program("backfill", "start", "c", "public.t")
    finally:
        world.user = "postgres"
        world.execute("drop role poor")
    assert result.returncode == 3 and "grant select on public.t to poor" in result.stderr, result.stderr


def test_verify_says_why_it_cannot(world15: World) -> None:
    world = world15
    world.execute(
        "create table t (id int primary key)", "create table bare (v int)", "create table part (id int primary key)"
    )
    world.consumer(tables=("public.t", "public.part"), operations=["insert"])
    with world.bridge():
        pass
    refused = world.run_program("verify", "public.t")
    assert refused.returncode == 2 and "no consumer takes all operations of public.t" in refused.stderr
    world.consumer(tables=("public.t",))
    world.run_program("consumers", "apply")
    stopped = world.run_program("verify", "public.t", "--wait", "0.1")
    assert stopped.returncode == 1 and "Is the bridge running?" in stopped.stderr


def test_it_goes_on_after_a_restart_of_the_server(own15: EmbeddedServer, tmp_path: Path) -> None:
    with fresh_database(own15) as database:
        world = World(own15, database, "wal2json", tmp_path)
        world.execute(
            "create table t (id int primary key, v int)", "insert into t select i, 0 from generate_series(1, 3000) i"
        )
        world.consumer()
        with world.bridge():
            world.json("backfill", "start", "c", "public.t", "--rate", "200")
            for mode in ("immediate", "fast"):
                wanted = listed(world)["rows"] + 1
                eventually(partial(has_read, world, wanted))
                world.leave()
                own15.stop(mode)
                own15.start()
                eventually(world.active)
                world.execute("update t set v = v + 1 where id % 100 = 0")
            eventually(lambda: finished(world))
            assert verify(world.config(), "public.t").ok
        world.close()


def test_what_the_stream_brings_before_any_snapshot_sees_it_is_not_followed_by_the_old_row(
    own15: EmbeddedServer, tmp_path: Path
) -> None:
    """A commit that waits for a synchronous standby stands in the WAL, and is invisible."""
    with fresh_database(own15) as database:
        world = World(own15, database, "pgoutput", tmp_path)
        world.execute("alter role postgres set synchronous_commit = local")
        world.leave()
        world.execute(
            "create table t (id int primary key, v int)", "insert into t select i, 0 from generate_series(1, 300) i"
        )
        world.consumer()
        with world.bridge():
            world.json("backfill", "start", "c", "public.t", "--rate", "60")
            eventually(partial(has_read, world, 1))
            world.execute("alter system set synchronous_standby_names = 'absent'", "select pg_reload_conf()")
            with ThreadPoolExecutor() as pool, psycopg.connect(world.dsn, autocommit=True) as writer:
                writer.execute("set synchronous_commit = on")
                update = pool.submit(writer.execute, "update t set v = 1 where id = 290")
                eventually(lambda: world.value("select count(*) from messages where data ->> 'op' = 'update'") == 1)
                assert world.sql.execute("select v from t where id = 290").fetchone() == (0,), "nobody sees it"
                eventually(lambda: finished(world))
                assert not update.done()
                world.execute("alter system reset synchronous_standby_names", "select pg_reload_conf()")
                update.result(30)
            assert verify(world.config(), "public.t").ok
        assert ops(world, "select data ->> 'op', key from messages where key = '290'") == [("update", "290")]
        world.close()


def test_a_consumer_that_was_away_gets_by_its_snapshot_what_it_missed(world15: World) -> None:
    world = world15
    world.execute("create table t (id int primary key)", "insert into t select generate_series(1, 10)")
    world.consumer("all")
    with world.bridge():
        pass
    world.consumer(start="snapshot")
    with psycopg.connect(world.dsn) as writer:
        writer.execute("insert into t values (20)")
        with world.bridge():
            eventually(lambda: listed(world)["note"])  # nothing is read before the writer has ended
        writer.rollback()
    world.consumers = [c for c in world.consumers if c["name"] != "c"]
    with world.bridge():
        world.execute("insert into t values (1000)")
        eventually(lambda: world.value("select pending from consumer_lag() where name = 'all'") == 1)
        eventually(lambda: listed(world)["state"] == "failed")
    world.consumer(start="snapshot")
    with world.bridge():
        world.json("backfill", "resume", "c")
        eventually(lambda: finished(world))
    # The gap comes first: a row that the snapshot had read may have been deleted meanwhile.
    got = world.rows("select data ->> 'op', key from receive('c', 100)")
    assert got == [("gap", None), *(("read", str(n)) for n in (*range(1, 11), 1000))]
