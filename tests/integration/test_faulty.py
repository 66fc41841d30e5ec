"""Trouble of one table or one consumer while the bridge runs: it is told within seconds, and stops nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.harness.world import World, eventually


@pytest.fixture
def shop(world: World) -> World:
    """Two tables with keys, and a consumer of each."""
    world.execute(
        "create table orders (id int primary key, v int)",
        "create table stock (id int primary key, v int)",
    )
    world.consumer("billing", ("public.orders",))
    world.consumer("warehouse", ("public.stock",))
    return world


@contextlib.contextmanager
def process(world: World) -> Iterator[Any]:
    """A bridge as a process that must still run at the end."""
    running = world.start_process()
    eventually(lambda: world.active() or running.poll() is not None, "it streams")
    assert running.poll() is None, world.log()
    try:
        yield running
        assert running.poll() is None, world.log()
    finally:
        running.kill()
        running.wait()
        eventually(lambda: not world.active(), "the server freed the slot")


def keys(world: World, name: str, topic: str = "public.orders") -> list[str]:
    query = (
        "select m.key from consumer_messages w join consumers c on c.id = w.consumer_id join messages m using (seq)"
        " where c.name = %s and m.topic = %s order by seq"
    )
    return [key for (key,) in world.rows(query, name, topic)]


def problem(world: World, name: str) -> str:
    """What the store's note of the feeds says of a consumer."""
    return str(world.value("select coalesce(feeds -> 'consumers' -> %s ->> 'reason', '') from source", name))


def unhealthy(world: World, *said: str) -> None:
    """The log, `status`, `lag` and `consumers list` all tell what is wrong."""
    status, lag = world.run_program("status"), world.run_program("lag")
    assert status.returncode == 1, status
    for text in said:
        assert text in world.log(), text
        for shown in (status, lag):
            assert text in " ".join((shown.stdout + shown.stderr).split()), (text, shown)


def healthy(world: World) -> bool:
    return bool(world.json("lag", "--json")["alarms"] == [])


def test_a_table_that_is_dropped_is_told_and_stops_no_other_consumer(shop: World) -> None:
    with process(shop):
        assert "consumer.faulty" not in shop.log()
        shop.execute("drop table stock")
        eventually(lambda: "there is no table public.stock" in problem(shop, "warehouse"), "it is noticed")
        eventually(shop.active)
        unhealthy(shop, "there is no table public.stock")
        assert "consumer.faulty" in shop.log()
        shop.execute("insert into orders values (1, 1)")
        eventually(lambda: keys(shop, "billing") == ["1"])
    with process(shop):  # after kill -9
        shop.execute("insert into orders values (2, 2)")
        eventually(lambda: keys(shop, "billing") == ["1", "2"], "a restart feeds the others, too")
        shop.execute("create table stock (id int primary key, v int)")
        eventually(lambda: problem(shop, "warehouse") == "", "it is taken up again")
        eventually(shop.active)
        shop.execute("insert into stock values (3, 3)")
        eventually(lambda: keys(shop, "warehouse", "public.stock") == ["3"])
        assert healthy(shop)


def test_a_new_consumer_that_cannot_work_still_refuses_the_start_beside_a_faulty_one(shop: World) -> None:
    with shop.bridge():
        pass
    shop.execute("drop table stock")
    shop.consumer("new", ("public.absent",))
    refused = shop.run_program("run")
    assert refused.returncode == 2 and "there is no table public.absent" in refused.stderr
    shop.consumers = [c for c in shop.consumers if c["name"] != "new"]
    shop.consumer("warehouse", ("public.stock", "public.orders"))  # changed, and its table is gone
    refused = shop.run_program("run")
    assert refused.returncode == 2 and "there is no table public.stock" in refused.stderr


def test_a_named_table_that_loses_its_key_is_told_and_can_be_written_again(shop: World) -> None:
    with process(shop):
        shop.execute("insert into stock values (1, 1)")
        eventually(lambda: keys(shop, "warehouse", "public.stock") == ["1"])
        shop.execute("alter table stock drop constraint stock_pkey cascade")
        eventually(lambda: "no usable replica identity" in problem(shop, "warehouse"), "it is noticed")
        eventually(shop.active)
        unhealthy(shop, "public.stock, which has no usable replica identity", "replica identity full")
        if shop.plugin == "pgoutput":
            shop.execute("update stock set v = 2")  # the publication has it no longer
        shop.execute("insert into orders values (2, 2)")
        eventually(lambda: keys(shop, "billing") == ["2"], "the others go on")
        shop.execute("alter table stock replica identity full")
        eventually(lambda: problem(shop, "warehouse") == "", "it is taken up again")
        eventually(shop.active)
        shop.execute("update stock set v = 4")
        eventually(
            lambda: shop.value(
                "select count(*) from messages where topic = 'public.stock' and data -> 'record' ->> 'v' = '4'"
            )
        )
        assert healthy(shop)


def test_a_new_table_without_a_key_under_a_wildcard_is_told(world: World) -> None:
    world.execute("create table orders (id int primary key, v int)")
    world.consumer("audit", ("public.*",))
    with process(world):
        world.execute("create table scratch (id int, v int)", "insert into scratch values (1, 1)")
        eventually(lambda: "no usable replica identity" in problem(world, "audit"), "it is noticed")
        eventually(world.active)
        unhealthy(world, "public.scratch, which has no usable replica identity", "replica identity full")
        if world.plugin == "pgoutput":
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                world.execute("update scratch set v = 2")
            assert "PostgreSQL refuses the application's UPDATE and DELETE" in problem(world, "audit")
        world.execute("insert into orders values (2, 2)")
        eventually(lambda: keys(world, "audit") == ["2"])
        world.execute("alter table scratch replica identity full")
        eventually(lambda: problem(world, "audit") == "", "it is mended")
        assert healthy(world)


@pytest.mark.parametrize("drift", ["alter table stock rename v to w", "alter table stock drop v"])
def test_a_filter_whose_column_is_gone_is_told(shop: World, drift: str) -> None:
    shop.consumer("warehouse", ("public.stock",), filter="record.v > 1")
    with process(shop):
        shop.execute("insert into stock values (1, 5)")
        eventually(lambda: keys(shop, "warehouse", "public.stock") == ["1"])
        shop.execute(drift)
        eventually(lambda: "the filter reads v" in problem(shop, "warehouse"), "it is noticed")
        unhealthy(shop, "the filter reads v")
        shop.execute("insert into orders values (2, 2)")
        eventually(lambda: keys(shop, "billing") == ["2"])
        shop.execute("alter table stock rename w to v" if "rename" in drift else "alter table stock add v int")
        eventually(lambda: problem(shop, "warehouse") == "", "it is mended")


def test_what_does_not_concern_the_consumers_starts_no_session_anew(shop: World) -> None:
    with process(shop):
        eventually(lambda: shop.sql.execute(
            "select count(*) from pg_stat_activity where application_name = 'cdcbridge recheck'").fetchone() != (0,)
        )  # fmt: skip
        shop.execute(
            "create table other (v int)", "alter table orders add w int", "create index on orders (w)",
            "analyze", "create table stocks (v int)", "drop table other",
        )  # fmt: skip
        shop.execute("drop table stock")
        eventually(lambda: problem(shop, "warehouse"), "by then it has looked")
        assert shop.log().count("bridge.again") == 1, shop.log()


def test_a_refused_change_that_the_bridge_reads_later_is_told_as_it_is(shop: World) -> None:
    shop.consumer("old", ("public.orders",))
    with process(shop):
        shop.consumer("billing", ("public.orders",), mode="fifo")
        assert shop.run_program("consumers", "apply").returncode == 2
        shop.consumers = [c for c in shop.consumers if c["name"] != "old"]
        assert shop.run_program("consumers", "remove", "old", "--yes").returncode == 0
        eventually(lambda: "which cannot become fifo" in problem(shop, "billing"), "the bridge has read the file")
        eventually(shop.active)
        shop.execute("insert into orders values (1, 1)")
        eventually(lambda: keys(shop, "billing") == ["1"])
        listed = shop.run_program("consumers", "list")
        said = "the consumer billing continues with its earlier settings: the file asks for mode: fifo, which cannot be done"
        for shown in (listed, shop.run_program("lag"), shop.run_program("status")):
            text = " ".join((shown.stdout + shown.stderr).split())
            assert said in text and "does not work" not in text and "(faulty)" not in text, text
        assert "billing (as before)" in listed.stdout
        assert "it continues with its earlier settings" in shop.log()


# changes that wal2json drops


def gaps(world: World, name: str) -> list[dict[str, Any]]:
    query = (
        "select m.data -> 'record' from consumer_messages w join consumers c on c.id = w.consumer_id"
        " join messages m using (seq) where c.name = %s and m.data ->> 'op' = 'gap' order by seq"
    )
    return [record for (record,) in world.rows(query, name)]


@pytest.fixture
def json_shop(world15: World) -> World:
    world15.plugin = "wal2json"
    world15.execute("create table orders (id int primary key, v int)")
    world15.consumer("audit", ("public.*",))
    world15.consumer("billing", ("public.orders",))
    world15.consumer("inserts", ("public.*",), operations=["insert"])
    return world15


def test_updates_of_a_new_table_without_a_key_stop_nobody(json_shop: World) -> None:
    world = json_shop
    expected = [str(n) for n in range(20)]
    with process(world):
        world.execute("create table scratch (id int, v int)", "insert into scratch values (1, 1)")
        for n in range(20):
            world.execute(f"begin; update scratch set v = {n}; insert into orders values ({n}, {n}); commit")
        eventually(lambda: keys(world, "billing") == expected, "no row of the others is lost")
        assert keys(world, "audit") == keys(world, "inserts") == expected
        eventually(lambda: "no usable replica identity" in problem(world, "audit"), "it is a fault")
        unhealthy(world, "public.scratch, which has no usable replica identity", "replica identity full")
        (told,) = gaps(world, "audit")
        assert told["table"] == "public.scratch" and "replica identity" in told["reason"] and told["to"] is None
        assert gaps(world, "billing") == gaps(world, "inserts") == [], "only those who take these changes are told"
        assert "changes.missing" in world.log()
    with process(world):  # after kill -9
        world.execute("update scratch set v = 100", "insert into orders values (100, 1)")
        eventually(lambda: keys(world, "audit") == [*expected, "100"])
        assert len(gaps(world, "audit")) == 1
        world.execute("alter table scratch replica identity full")
        eventually(lambda: problem(world, "audit") == "", "it is taken up again")
        eventually(world.active)
        _, end = gaps(world, "audit")
        assert end["from"] == told["from"] and end["to"] is not None and end["table"] == "public.scratch"
        world.execute("update scratch set v = 200")
        eventually(lambda: world.value("select count(*) from messages where data -> 'record' ->> 'v' = '200'"))
        assert gaps(world, "billing") == [] and len(gaps(world, "audit")) == 2
        assert healthy(world)


def test_a_table_that_gets_its_key_before_anybody_looks(json_shop: World) -> None:
    world = json_shop
    world.settings["heartbeat_interval"] = "1h"  # a look every 5 s
    with process(world):
        world.execute(
            "begin; create table scratch (id int, v int); insert into scratch values (1, 1); commit",
            "begin; insert into orders values (1, 1); update scratch set v = 2; delete from scratch;"
            " insert into orders values (2, 2); commit",
            "alter table scratch add primary key (id)",
            "insert into scratch values (2, 2)",
            "update scratch set v = 3",
        )
        eventually(lambda: len(gaps(world, "audit")) == 2, "the gap begins and ends")
        eventually(lambda: world.value("select count(*) from messages where data -> 'record' ->> 'v' = '3'") == 1)
        assert keys(world, "audit") == keys(world, "billing") == ["1", "2"]
        world.execute("alter table scratch drop constraint scratch_pkey", "update scratch set v = 4")
        eventually(lambda: len(gaps(world, "audit")) == 3, "a later gap is told, too")


@pytest.mark.parametrize("way", ["drop constraint stock_pkey", "replica identity nothing"])
def test_updates_of_a_named_table_that_lost_its_identity_stop_nobody(json_shop: World, way: str) -> None:
    world = json_shop
    world.execute("create table stock (id int primary key, v int)", "insert into stock values (1, 1)")
    world.consumer("warehouse", ("public.stock",), mode="fifo")
    world.consumer("replica", ("public.stock",), mode="stream")
    with process(world):
        world.execute(f"alter table stock {way}")
        world.execute(*(
            f"begin; insert into orders values ({n}, 1); update stock set v = {n}; insert into orders values ({n + 1}, 1); commit"
            for n in range(1, 40, 2)
        ))  # fmt: skip
        eventually(lambda: keys(world, "billing") == [str(n) for n in range(1, 41)], "no row of the others is lost")
        eventually(lambda: "no usable replica identity" in problem(world, "warehouse"))
        assert [gap["table"] for gap in gaps(world, "warehouse")] == ["public.stock"]
        read = world.rows("select data from read_stream('replica', 100, '1 min')")
        assert [data["record"]["table"] for (data,) in read if data["op"] == "gap"] == ["public.stock"]
        world.execute("drop table stock")
        eventually(lambda: len(gaps(world, "audit")) == 2, "a gap ends with its table, too")


def test_two_tables_in_one_transaction_that_is_appended_in_parts(json_shop: World) -> None:
    world = json_shop
    with process(world):
        world.execute(
            "create table a (id int, v int)", "insert into a values (1, 1)",
            "create table b (id int, v int)", "insert into b values (1, 1)",
            "begin; insert into orders select n, n from generate_series(1, 20000) n; update a set v = 2;"
            " insert into orders select n, n from generate_series(20001, 40000) n; update b set v = 2;"
            " insert into orders select n, n from generate_series(40001, 60000) n; commit",
        )  # fmt: skip
        count = "select count(*), count(distinct key) from messages where topic = 'public.orders'"
        eventually(lambda: world.rows(count) == [(60000, 60000)], "no row of the others is lost", 60)
        eventually(lambda: [gap["table"] for gap in gaps(world, "audit")] == ["public.a", "public.b"])
        positions = "select count(*), count(distinct (commit_lsn, ordinal)) from messages where topic = 'cdcbridge.gap'"
        assert world.rows(positions) == [(2, 2)]


# a publication that cannot be changed yet


@pytest.fixture
def busy(world18: World) -> Iterator[tuple[World, psycopg.Connection[Any]]]:
    """A bridge's consumer, and a session that locks another table."""
    world18.execute(
        "create table orders (id int primary key, v int)",
        "create table order_items (id int primary key, v int)",
        "create table more (id int primary key, v int)",
    )
    world18.consumer("billing", ("public.orders",))
    with psycopg.connect(world18.dsn) as locker:
        yield world18, locker


def lock(locker: psycopg.Connection[Any], table: str = "order_items") -> int:
    locker.execute(f"lock table {table} in share update exclusive mode".encode())
    return locker.info.backend_pid


def test_a_lock_on_the_table_of_a_new_consumer_stops_nobody(busy: tuple[World, psycopg.Connection[Any]]) -> None:
    world, locker = busy
    with process(world):
        pid = lock(locker)
        world.consumer("items", ("public.order_items",), start="snapshot")
        world.execute("insert into order_items values (1, 1)")
        applied = world.run_program("consumers", "apply")
        assert applied.returncode == 0 and f"pid {pid}" in applied.stderr, applied
        eventually(world.active)
        world.execute("insert into orders values (1, 1)")
        eventually(lambda: keys(world, "billing") == ["1"], "the others go on")
        unhealthy(world, f"pid {pid}", "lock table order_items in share update exclusive mode")
        assert "consumer.refused" in world.log() and "bridge.retry" not in world.log()
        assert "no bridge has been running" not in world.run_program("lag").stdout
        world.execute("insert into order_items values (2, 2)")
    with process(world):  # a restart with that file
        world.execute("insert into orders values (2, 2)")
        eventually(lambda: keys(world, "billing") == ["1", "2"], "the others go on")
        locker.rollback()
        eventually(lambda: problem(world, "items") == "" and world.active(), "it is taken up")
        world.execute("insert into order_items values (3, 3)")
        eventually(lambda: sorted(keys(world, "items", "public.order_items")) == ["1", "2", "3"], "nothing is missing")
        assert world.value("select count(*) from messages where data ->> 'op' = 'gap'") == 0
        assert healthy(world)


def test_a_lock_on_a_table_of_a_changed_consumer_stops_nobody(busy: tuple[World, psycopg.Connection[Any]]) -> None:
    world, locker = busy
    world.consumer("changed", ("public.more",))
    world.consumer("removed", ("public.order_items",))
    with process(world):
        pid = lock(locker, "more")
        world.consumers = [c for c in world.consumers if c["name"] != "removed"]
        assert world.run_program("consumers", "remove", "removed", "--yes").returncode == 0
        world.execute("insert into orders values (1, 1)", "insert into more values (1, 1)")
        eventually(lambda: keys(world, "billing") == ["1"], "a publication that has too much is enough")
        world.consumer("changed", ("public.more", "public.later"))
        world.execute("create table later (id int primary key)")
        world.run_program("consumers", "apply")
        eventually(lambda: f"pid {pid}" in problem(world, "changed"), "it is told")
        world.execute("insert into more values (2, 2)")
        eventually(lambda: keys(world, "changed", "public.more") == ["1", "2"], "it goes on without the new table")
        locker.rollback()
        eventually(lambda: problem(world, "changed") == "" and world.active(), "it is taken up")
        world.execute("insert into later values (3)")
        eventually(lambda: keys(world, "changed", "public.later") == ["3"])
        assert world.value("select count(*) from messages where data ->> 'op' = 'gap'") == 0


def test_a_new_consumer_of_the_file_waits_for_a_lock_at_the_start(busy: tuple[World, psycopg.Connection[Any]]) -> None:
    world, locker = busy
    with world.bridge():
        pass
    pid = lock(locker)
    world.consumer("items", ("public.order_items",))
    with process(world):
        world.execute("insert into orders values (1, 1)")
        eventually(lambda: keys(world, "billing") == ["1"], "the others go on")
        assert f"pid {pid}" in problem(world, "items") and "consumer.refused" in world.log()
        locker.rollback()
        eventually(lambda: problem(world, "items") == "" and world.active(), "it is taken up")
