"""What the stream must get right on each server and plugin: operations, keys, identity, TOAST, partitions, DDL."""

from __future__ import annotations

import json

import psycopg
import pytest

from tests.harness.world import World, eventually


def test_each_operation_has_its_record_and_old(world: World) -> None:
    world.execute("create table t (id int primary key, v text)")
    world.consumer()
    with world.bridge():
        world.execute(
            "insert into t values (1, 'a')",
            "update t set v = 'b'",
            "update t set id = 2",
            "delete from t",
            "truncate t",
        )
        messages = world.messages(5)
    assert messages == [
        ("public.t", "1", {"op": "insert", "record": {"id": 1, "v": "a"}, "old": None, "unchanged": []}),
        ("public.t", "1", {"op": "update", "record": {"id": 1, "v": "b"}, "old": None, "unchanged": []}),
        ("public.t", "2", {"op": "update", "record": {"id": 2, "v": "b"}, "old": {"id": 1}, "unchanged": []}),
        ("public.t", "2", {"op": "delete", "record": {"id": 2}, "old": None, "unchanged": []}),
        ("public.t", None, {"op": "truncate", "record": None, "old": None, "unchanged": []}),
    ]


def test_full_identity_carries_the_whole_old_row(world: World) -> None:
    world.execute("create table t (id int primary key, v text)", "alter table t replica identity full")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, null)", "update t set v = 'b'", "delete from t")
        data = world.data(3)
    assert data[1]["old"] == {"id": 1, "v": None}
    assert data[2]["record"] == {"id": 1, "v": "b"}
    assert [key for _, key, _ in world.messages(3)] == ["1", "1", "1"]


@pytest.mark.parametrize("identity", ["default", "full"])
def test_an_update_that_changes_the_key_tells_which_one_it_took_away(world: World, identity: str) -> None:
    world.execute(
        "create table t (a int, b text, v int, primary key (a, b))", f"alter table t replica identity {identity}"
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 'x', 0)", "update t set v = 1", "update t set b = 'y'", "delete from t")
        rows = world.messages(4, "select key, old_key from messages order by seq")
    assert rows == [('["1","x"]', None), ('["1","x"]', None), ('["1","y"]', '["1","x"]'), ('["1","y"]', None)]


def test_an_unchanged_toast_value_is_listed_and_never_null(world: World) -> None:
    world.execute(
        "create table t (id int primary key, small text, big text)", "alter table t alter big set storage external"
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 'a', repeat('x', 100000))", "update t set small = 'b'")
        data = world.data(2)
        assert data[1] == {"op": "update", "record": {"id": 1, "small": "b"}, "old": None, "unchanged": ["big"]}
        world.execute("alter table t replica identity full", "update t set small = 'c'")
        data = world.data(3)
    # The old row under FULL carries what the new one left out.
    assert data[2]["record"] == {"id": 1, "small": "c", "big": "x" * 100000}
    assert data[2]["unchanged"] == []


def test_generated_columns_are_not_in_record(world: World) -> None:
    world.execute("create table t (id int primary key, a int, twice int generated always as (a * 2) stored)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t (id, a) values (1, 4)", "update t set a = 5")
        data = world.data(2)
    assert [d["record"] for d in data] == [{"id": 1, "a": 4}, {"id": 1, "a": 5}]


def test_composite_keys_are_json_arrays_and_a_table_without_key_has_none(world: World) -> None:
    world.execute(
        "create table t (a int, b text, c date, primary key (b, a))",
        "create table bare (v int)",
    )
    world.consumer(tables=("public.t",))
    world.consumer("bare", ("public.bare",), operations=["insert", "truncate"])
    with world.bridge():
        world.execute("insert into t values (1, 'x\"y', '2024-01-01')", "insert into bare values (1)")
        messages = world.messages(2, "select topic, key, partition from messages order by seq")
    assert messages[0][1] == json.dumps(['x"y', "1"], separators=(",", ":"))
    assert messages[1] == ("public.bare", None, 0)


def test_the_application_never_fails_for_want_of_an_identity(world: World) -> None:
    """A table of which only inserts are taken is published so that its updates stay possible."""
    world.execute("create table bare (v int)", "create table t (id int primary key)")
    world.consumer("inserts", ("public.bare",), operations=["insert"])
    world.consumer("all", ("public.t",))
    with world.bridge():
        world.execute(
            "insert into bare values (1)", "update bare set v = 2", "delete from bare", "insert into t values (1)"
        )
        topics = [topic for topic, _, _ in world.messages(2)]
    assert topics == ["public.bare", "public.t"]


def test_a_partitioned_table_is_one_topic_and_one_truncate(world: World) -> None:
    world.execute(
        "create table t (id int, at date, v text, primary key (id, at)) partition by range (at)",
        "create table t_2023 partition of t for values from ('2023-01-01') to ('2024-01-01')",
        "create schema other",
        "create table other.t_2024 partition of t for values from ('2024-01-01') to ('2025-01-01')",
    )
    world.consumer()
    with world.bridge():
        world.execute(
            "insert into t values (1, '2023-05-05', 'a'), (2, '2024-05-05', 'b')",
            "update t set v = 'c' where id = 2",
            "truncate t",
        )
        messages = world.messages(4)
    assert {topic for topic, _, _ in messages} == {"public.t"}
    assert [data["op"] for _, _, data in messages] == ["insert", "insert", "update", "truncate"]


def test_partitions_attached_and_detached_in_mid_stream(world: World) -> None:
    world.execute(
        "create table t (id int primary key, v text) partition by range (id)",
        "create table p1 partition of t for values from (0) to (10)",
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 'in p1')")
        world.messages(1)
        world.execute(
            "create table p2 (id int primary key, v text)",
            "insert into p2 values (10, 'before attach: not of t')",
            "alter table t attach partition p2 for values from (10) to (20)",
            "insert into t values (11, 'in p2')",
            "insert into p2 values (12, 'into the leaf')",
        )
        world.messages(3)  # else wal2json's catalogue may take the row before for one of t's: see the next test
        world.execute(
            "alter table t detach partition p1",
            "insert into p1 values (2, 'after detach: not of t')",
            "begin; create table p3 partition of t for values from (20) to (30); insert into t values (21, 'in p3'); commit",
            "alter table t detach partition p2",
            "drop table p2",
        )
        data = world.data(4)
    assert [d["record"]["id"] for d in data] == [1, 11, 12, 21]


SHORT_LIVED = (
    "create table p1 (like t including all); alter table t attach partition p1 for values from (0) to (10)",
    "insert into t values (1, 'in one that is detached'); update t set v = 'changed'",
    "alter table t detach partition p1",
    "insert into p1 values (2, 'after detach: not of t')",
    "create table t_2 partition of t for values from (10) to (20)",
    "insert into t values (11, 'in one that is dropped')",
    "delete from t where id = 11",
    "drop table t_2",
    "create table p3 partition of t for values from (20) to (30)",
    "insert into t values (21, 'detached by the transaction that wrote to it')",
    "begin; update t set v = 'last' where id = 21; alter table t detach partition p3; commit",
    "create table other (id int primary key, v text); insert into other values (1); drop table other",
    "create table another (id int, v text, w int); insert into another values (1); drop table another",
)


@pytest.mark.parametrize("down", [True, False], ids=["down", "live"])
def test_partitions_that_are_gone_before_the_bridge_can_look_at_them(world: World, down: bool) -> None:
    world.execute("create table t (id int primary key, v text, w text) partition by range (id)")
    world.consumer()
    with world.bridge():
        if not down:
            world.execute(*SHORT_LIVED)
    if down:
        world.execute(*SHORT_LIVED)
    with world.bridge():
        data = world.data(6)
    assert [(d["op"], d["record"]["id"]) for d in data] == [
        ("insert", 1), ("update", 1), ("insert", 11), ("delete", 11), ("insert", 21), ("update", 21),
    ]  # fmt: skip


def test_partitions_moved_while_the_bridge_was_down(world: World) -> None:
    world.execute(
        "create table t (id int primary key) partition by range (id)",
        "create table p1 partition of t for values from (0) to (10)",
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1)")
        world.messages(1)
    world.execute("insert into t values (2)", "alter table t detach partition p1", "insert into p1 values (3)")
    with world.bridge():
        world.execute("create table p2 partition of t for values from (10) to (20)", "insert into t values (11)")
        data = world.data(3)
    assert [d["record"]["id"] for d in data] == [1, 2, 11]


def test_a_wildcard_takes_a_row_inserted_by_the_transaction_that_creates_its_table(world: World) -> None:
    world.execute("create schema sales", "create table sales.seen (id int primary key)")
    world.consumer(tables=("sales.*",))
    with world.bridge():
        world.execute(
            "begin; create table sales.fresh (id int primary key); insert into sales.fresh values (7); commit",
            "create table public.elsewhere (id int primary key)",
            "insert into public.elsewhere values (1)",
            "insert into sales.seen values (1)",
        )
        messages = world.messages(2)
    assert [(topic, key) for topic, key, _ in messages] == [("sales.fresh", "7"), ("sales.seen", "1")]


def test_everything_but_the_bridges_own_schema(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer(tables=("*.*",))
    with world.bridge():
        world.execute("insert into t select generate_series(1, 200)")
        world.messages(200)
        world.execute("insert into t values (1000)")
        messages = world.messages(201)
    assert {topic for topic, _, _ in messages} == {"public.t"}


def test_columns_added_dropped_renamed_and_retyped_in_mid_stream(world: World) -> None:
    world.execute("create table t (id int primary key, a text, b int)")
    world.consumer()
    with world.bridge():
        world.execute(
            "insert into t values (1, 'a', 1)",
            "alter table t add c numeric default 1.50",
            "update t set b = 2",
            "alter table t drop a",
            "update t set b = 3",
            "alter table t rename b to d",
            "update t set d = 4",
            "alter table t alter d type text",
            "update t set d = '5'",
        )
        data = world.data(5)
    assert [d["record"] for d in data] == [
        {"id": 1, "a": "a", "b": 1},
        {"id": 1, "a": "a", "b": 2, "c": 1.5},
        {"id": 1, "b": 3, "c": 1.5},
        {"id": 1, "d": 4, "c": 1.5},
        {"id": 1, "d": "5", "c": 1.5},
    ]
    assert all(d["unchanged"] == [] for d in data)


def test_positions_are_unique_and_in_log_order(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t select generate_series(1, 50)", "truncate t", "insert into t values (1)")
        world.messages(52)
    rows = world.rows("select commit_lsn, ordinal from messages order by seq")
    assert len(set(rows)) == 52
    assert world.value(
        "select bool_and(ordered) from (select (commit_lsn, ordinal) > lag((commit_lsn, ordinal))"
        " over (order by seq) is not false as ordered from messages) x"
    )
    assert [ordinal for _, ordinal in rows[:50]] == list(range(50))


def test_logical_messages_of_others_pass_by(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        world.execute(
            "select pg_logical_emit_message(true, 'someone', 'else')",
            "select pg_logical_emit_message(false, 'someone', 'outside')",
            "begin; select pg_logical_emit_message(true, 'cdcbridge:x', 'not json'); insert into t values (1); commit",
        )
        assert world.messages(1)[0][1] == "1"


def test_a_lost_identity_in_mid_stream_stops_no_other_table(world: World) -> None:
    world.execute("create table t (id int primary key, v int)", "create table u (id int primary key)")
    world.settings["heartbeat_interval"] = "1h"  # the stream finds it before the look does
    world.consumer(tables=("public.t", "public.u"))
    with world.bridge():
        world.execute("insert into t values (1, 1)")
        world.messages(1)
        world.execute("alter table t drop constraint t_pkey")
        try:
            world.execute("update t set v = 2")
        except psycopg.errors.ObjectNotInPrerequisiteState:
            # With a publication of updates PostgreSQL itself refuses; an insert then shows the new shape.
            world.execute("insert into t values (2, 2)")
        world.execute("insert into u values (3)")
        eventually(lambda: world.value("select count(*) from messages where topic = 'public.u'") == 1, "it goes on")
        reason = "select feeds -> 'consumers' -> 'c' ->> 'reason' from source"
        eventually(lambda: world.value(reason), "it is told")
        lost = "select count(*) from messages where topic = 'cdcbridge.gap' or key is null and topic = 'public.t'"
        assert world.value(lost) == 1, "a gap tells of the update, and the insert is there"
        world.execute("alter table t replica identity full")
        eventually(lambda: world.value(reason) == "" and world.active(), "it is taken up again")
        world.execute("update t set v = 4")
        eventually(lambda: world.value("select count(*) from messages where data -> 'record' ->> 'v' = '4'"))
