"""What the file says of consumers, and what the two plugins make of the same WAL."""

from __future__ import annotations

import pytest

from cdcbridge.config import load
from tests.harness.world import World, eventually


def queued(world: World, name: str = "c") -> list[str]:
    return [
        key
        for (key,) in world.rows(
            "select m.key from consumer_messages m join consumers c on c.id = m.consumer_id where c.name = %s order by m.seq",
            name,
        )
    ]


def test_both_plugins_make_the_same_messages_of_the_same_wal(world15: World, tmp_path_factory: object) -> None:
    other = World(world15.server, world15.database, "pgoutput", world15.folder / "other")
    other.folder.mkdir()
    other.slot, other.schema = f"{world15.slot}_b", "cdcbridge_b"
    other.settings["publication"] = "both"
    world15.execute(
        "create table t (id int primary key, v text, big text, n numeric, a text[], at timestamptz)",
        "alter table t alter big set storage external",
        "create table f (id int, v text)",
        "alter table f replica identity full",
        "create table p (id int primary key, v text) partition by range (id)",
        "create table p1 partition of p for values from (0) to (10)",
        "create table p2 partition of p for values from (10) to (20)",
    )
    for one in (world15, other):
        one.consumer(tables=("public.t", "public.f", "public.p"))
    with world15.bridge(), other.bridge():
        world15.execute(
            "insert into t select g, 'v', repeat('x', 9000), g * 1.10, array['a', null], now() from generate_series(1, 20) g",
            "update t set v = 'w' where id < 5",
            "update t set id = id + 100 where id < 3",
            "update t set big = 'short' where id = 7",
            "delete from t where id > 10 and id < 15",
            "insert into f values (1, 'a'), (1, null)",
            "update f set v = 'b' where v is null",
            "delete from f",
            "insert into p values (1, 'a'), (11, 'b')",
            "update p set id = 12 where id = 1",
            "truncate p",
            "begin; insert into t (id) values (500); savepoint s; insert into t (id) values (501); rollback to s;"
            " insert into t (id) values (502); commit",
            "truncate t, f",
        )
        query = "select topic, key, partition, data::text, commit_lsn, xid, commit_time from messages order by seq"
        count = 20 + 4 + 2 + 1 + 104 + 2 + 1 + 2 + 2 + 2 + 1 + 2 + 2 - 100
        ours, theirs = world15.messages(count, query), other.messages(count, query)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert ours == theirs
    other.close()


def test_earliest_gets_what_the_log_holds_filtered_and_then_the_rest(world: World) -> None:
    world.execute("create table t (id int primary key, v text)", "create table u (id int primary key)")
    world.consumer("first", ("public.t", "public.u"))
    with world.bridge():
        world.execute(
            "insert into t select g, case when g % 2 = 0 then 'even' else 'odd' end from generate_series(1, 300) g",
            "insert into t values (301, 'nine'), (302, null)",
            "insert into u values (7)",
            "delete from t where id = 1",
        )
        world.messages(304)
    world.consumer("late", filter="record.v == 'even' || int(record.v) > 0", key=["id"], start="earliest")
    world.consumer("now")
    with world.bridge():
        world.execute("insert into t values (400, 'even')")
        eventually(lambda: "400" in queued(world, "late"), "the live change")
    assert queued(world, "late") == [str(n) for n in range(2, 301, 2)] + ["1", "400"]
    assert queued(world, "now") == ["400"]
    reasons = world.rows("select key, left(reason, 13) from dead_messages order by id")
    assert reasons == [(str(n), "filter_error:") for n in range(1, 301, 2)] + [
        ("301", "filter_error:"),
        ("302", "filter_error:"),
    ]


def test_a_changed_filter_and_key_count_from_the_next_change(world: World) -> None:
    world.execute("create table t (id int primary key, v int)", "alter table t replica identity full")
    world.consumer(filter="record.v == 1")
    with world.bridge():
        world.execute("insert into t values (1, 1), (2, 2)")
        world.messages(1)
    world.consumer(filter="record.v == 2", key=["v"])
    with world.bridge():
        world.execute("insert into t values (3, 1), (4, 2)")
        world.messages(2)
    assert queued(world) == ["1", "2"], "the first one's key is the log's, the other's is v"


def test_operations_columns_and_a_consumer_that_left_the_file(world: World) -> None:
    world.execute("create table t (id int primary key, card text)")
    world.consumer("c", operations=["delete"])
    world.consumer("hidden", columns={"exclude": ["card"]})
    with world.bridge():
        world.execute("insert into t values (1, '4242')", "update t set card = '1'", "delete from t")
        world.messages(3)
    assert queued(world) == ["1"]
    assert world.rows("select data::text from receive('hidden', 1)")[0][0].count("card") == 0
    world.consumers = [c for c in world.consumers if c["name"] == "c"]
    with world.bridge():
        world.execute("insert into t values (2, '4242')", "delete from t where id = 2")
        world.messages(4)
    assert queued(world) == ["1", "2"]
    assert len(queued(world, "hidden")) == 3, "keeps what it has, gets nothing new"


def test_many_consumers_of_many_tables(world18: World) -> None:
    for number in range(40):
        world18.execute(f"create table t{number} (id int primary key)")
        world18.consumer(f"c{number}", (f"public.t{number}",))
    with world18.bridge():
        for number in range(40):
            world18.execute(f"insert into t{number} values (1), (2)")
        world18.messages(80)
    assert world18.rows("select count(*), count(distinct consumer_id) from consumer_messages") == [(80, 40)]
    assert load(world18.write_config()).consumers[39].name == "c39"


def test_consumers_are_applied_and_removed_while_the_bridge_runs(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer("first")
    with world.bridge():
        world.execute("insert into t values (1), (2)")
        world.messages(2)
        world.consumer("late", start="earliest")
        assert "added: late" in world.run_program("consumers", "apply").stdout
        world.execute("insert into t values (3)")
        eventually(lambda: "3" in queued(world, "late"), "the live change")
        assert queued(world, "late") == queued(world, "first") == ["1", "2", "3"]
        world.consumers = [c for c in world.consumers if c["name"] == "late"]
        assert world.run_program("consumers", "remove", "first", "--yes").returncode == 0
        world.execute("insert into t values (4)")
        eventually(lambda: "4" in queued(world, "late"), "the next change")
    assert world.rows("select topic, key from messages order by seq") == [("public.t", str(n)) for n in range(1, 5)]


def test_a_table_without_identity_is_declared_later_with_traffic_between(world: World) -> None:
    world.execute("create table t (id int primary key)", "create table bare (v int)")
    world.consumer("all")
    with world.bridge():
        world.execute("insert into t values (1)")
        world.messages(1)
    world.execute("insert into t values (2)")
    world.consumer("inserts", ("public.bare",), operations=["insert"])
    with world.bridge():
        world.execute("insert into bare values (7)", "update bare set v = 8", "insert into t values (3)")
        topics = [topic for topic, _, _ in world.messages(4)]
    assert topics == ["public.t", "public.t", "public.bare", "public.t"]


def test_json_that_json_operators_refuse_is_cut_to_columns_and_stops_nobody(world: World) -> None:
    world.execute("create table t (id int primary key, j json, secret text)")
    world.consumer("c", columns={"exclude": ["secret"]})
    world.consumer("f", filter="record.id > 0")  # does not read the document
    world.consumer("g", filter="type(record.j) != type(1)")
    with world.bridge():
        world.execute(
            """insert into t values (1, '"\\u0000"', 's'), (2, '"\\ud800"', 's'), (3, '{"a":\n 1}', 's')""",
            "select pg_logical_emit_message(true, 'x', '\\xff'::bytea)",
        )
        world.messages(3)
    got = world.rows("select key, data::text from receive('c', 10)")
    assert [key for key, _ in got] == ["1", "2", "3"]
    assert all("secret" not in data and "\n" not in data for _, data in got)
    reasons = world.rows(
        "select c.name, d.key, left(d.reason, 12) from dead_messages d join consumers c on c.id = d.consumer_id order by 1, 2"
    )
    assert reasons == [("g", "2", "filter_error")]
    assert [key for (key,) in world.rows("select key from receive('f', 10)")] == ["1", "2", "3"]


@pytest.mark.parametrize("mode", ["queue", "fifo", "stream"])
def test_a_consumer_is_removed_without_a_word_from_the_server(world18: World, mode: str) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer(mode=mode)
    with world18.bridge():
        pass
    removed = world18.run_program("consumers", "remove", "c", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert "notice" not in removed.stderr and "skipping" not in removed.stderr
    left = "select count(*) from pg_class where relname ~ '^(waiting|dead_messages)_[0-9]+$' and relkind = 'r'"
    assert world18.value(left) == 0
