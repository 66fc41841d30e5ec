"""A row's key is the same in its insert, update, delete and read, with both plugins, live and while the bridge is behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cdcbridge.errors import OperatorNeeded
from tests.harness.world import World, eventually

KEYS = "select data ->> 'op', key from messages where topic = 'public.t' order by seq"


def _with_rows(world: World, running: bool, *statements: str, count: int) -> list[tuple[str, str | None]]:
    """The (op, key) of the changes that the statements make, while the bridge runs or before it starts again."""
    if running:
        with world.bridge():
            for statement in statements:
                world.sql.execute(statement.encode())
            eventually(lambda: len(world.rows(KEYS)) >= count, f"{count} messages")
    else:
        with world.bridge():
            pass
        for statement in statements:
            world.sql.execute(statement.encode())
        with world.bridge():
            eventually(lambda: len(world.rows(KEYS)) >= count, f"{count} messages")
    return world.rows(KEYS)


live_and_behind = pytest.mark.parametrize("running", [True, False], ids=["live", "behind"])


@live_and_behind
def test_the_key_of_an_identity_index_beside_a_primary_key(world: World, running: bool) -> None:
    """Deletes carry no id, so the key is what every change carries."""
    world.execute(
        "create table t (id int primary key, email text not null, v int)",
        "create unique index t_email on t (email)",
        "alter table t replica identity using index t_email",
        "insert into t values (0, 'read', 0)",
    )
    world.consumer(start="snapshot")
    found = _with_rows(
        world, running, "insert into t values (1, 'a', 1)", "update t set v = 2 where id = 1",
        "delete from t where id = 1", count=4,
    )  # fmt: skip
    assert sorted(found) == sorted([("read", "read"), ("insert", "a"), ("update", "a"), ("delete", "a")])


@live_and_behind
def test_an_identity_index_that_holds_the_primary_key_keeps_it(world: World, running: bool) -> None:
    world.execute(
        "create table t (b int not null, a int not null, email text not null, primary key (a, b))",
        "create unique index t_all on t (email, b, a)",
        "alter table t replica identity using index t_all",
    )
    world.consumer()
    found = _with_rows(
        world, running, "insert into t values (2, 1, 'x')", "update t set email = 'y'", "delete from t", count=3
    )
    assert found == [("insert", '["1","2"]'), ("update", '["1","2"]'), ("delete", '["1","2"]')]


@live_and_behind
@pytest.mark.parametrize("identity", ["default", "full"])
def test_a_key_that_is_stored_out_of_line_and_does_not_change(world: World, running: bool, identity: str) -> None:
    world.execute(
        "create table t (id text, v int, primary key (id))",
        "alter table t alter id set storage external",
        f"alter table t replica identity {identity}",
    )
    world.consumer()
    long = "x" * 2600
    found = _with_rows(
        world, running, f"insert into t values ('{long}', 1)", "update t set v = 2", "update t set id = id || 'y'",
        "delete from t", count=4,
    )  # fmt: skip
    assert found == [("insert", long), ("update", long), ("update", long + "y"), ("delete", long + "y")]
    data = [d for (d,) in world.rows("select data from messages order by seq")]
    assert data[1]["record"] == {"id": long, "v": 2} and data[1]["unchanged"] == []
    assert data[1]["old"] == ({"id": long, "v": 1} if identity == "full" else None)
    assert data[2]["old"] == ({"id": long, "v": 2} if identity == "full" else {"id": long})


@pytest.mark.parametrize("identity", ["default", "full"])
def test_a_primary_key_that_changes_while_the_bridge_is_behind(world: World, identity: str) -> None:
    world.execute(
        "create table t (a int not null, b int not null, v int, primary key (a))",
        f"alter table t replica identity {identity}",
    )
    world.consumer()
    found = _with_rows(
        world, False, "insert into t values (1, 2, 0)", "alter table t drop constraint t_pkey, add primary key (b, a)",
        "update t set v = 1", "delete from t", count=3,
    )  # fmt: skip
    assert found == [("insert", "1"), ("update", '["2","1"]'), ("delete", '["2","1"]')]


def test_a_key_column_that_is_renamed_while_the_bridge_is_behind(world: World) -> None:
    world.execute("create table t (id int primary key, v int)")
    world.consumer()
    found = _with_rows(
        world, False, "insert into t values (1, 0)", "alter table t rename id to ident", "update t set v = 1",
        "delete from t", count=3,
    )  # fmt: skip
    assert found == [("insert", "1"), ("update", "1"), ("delete", "1")]


@live_and_behind
def test_a_table_that_is_gone_has_its_own_keys_and_no_generated_columns(world: World, running: bool) -> None:
    world.execute("create table t (id int primary key, a int, twice int generated always as (a * 2) stored)")
    world.consumer(tables=("public.*",), operations=["insert", "delete"])
    found = _with_rows(
        world, running,
        "insert into t (id, a) values (1, 1)",
        "begin; drop table t; create table t (other int, a int primary key, c text); insert into t values (3, 4, 'c'); commit",
        "delete from t",
        "drop table t",
        count=3,
    )  # fmt: skip
    assert found == [("insert", "1"), ("insert", "4"), ("delete", "4")]
    assert world.rows("select data -> 'record' from messages order by seq") == [
        ({"id": 1, "a": 1},), ({"other": 3, "a": 4, "c": "c"},), ({"a": 4},),
    ]  # fmt: skip


# columns that the file names


def _stops(world: World, act: Callable[[], None]) -> OperatorNeeded:
    try:
        with world.bridge():
            act()
            eventually(lambda: not world.active(), "the bridge stops")
    except OperatorNeeded as stopped:
        return stopped
    raise AssertionError("the bridge did not stop")


@pytest.mark.parametrize(
    "settings",
    [{"key": ["customer"]}, {"columns": {"exclude": ["customer"]}}, {"columns": {"include": ["id", "customer"]}}],
    ids=["key", "exclude", "include"],
)
@pytest.mark.parametrize("tables", ["public.t", "public.*"])
def test_a_named_column_that_is_renamed_stops_before_it_is_delivered_otherwise(
    world: World, settings: dict[str, Any], tables: str
) -> None:
    world.execute("create table t (id int primary key, customer text)", "alter table t replica identity full")
    world.consumer("c", (tables,), **settings)

    def act() -> None:
        world.execute("insert into t values (1, 'secret')")
        world.messages(1)
        world.execute("alter table t rename customer to client", "insert into t values (2, 'secret')")

    stopped = _stops(world, act)
    assert "customer" in str(stopped) and "consumer c " in str(stopped)
    assert world.value("select count(*) from messages") == 1
    renamed = json.loads(json.dumps(settings).replace("customer", "client"))
    world.consumer("c", (tables,), **renamed)
    with world.bridge():
        assert [key for _, key, _ in world.messages(2)] == ["1", "2"]


# partitions whose identity is not their root's


def _data(world: World, count: int) -> list[tuple[str, object, object, list[str]]]:
    return [(d["op"], d["record"], d["old"], d["unchanged"]) for d in world.data(count)]


BIG = "b" * 5000


def test_a_root_with_full_identity_and_partitions_without(world: World) -> None:
    world.execute(
        "create table t (id int primary key, v text, big text) partition by range (id)",
        "alter table t replica identity full",
        "create table t1 partition of t for values from (0) to (100)",
        "alter table t alter big set storage external",
        "alter table t1 alter big set storage external",
    )
    world.consumer()
    with world.bridge():
        world.execute(
            f"insert into t values (1, 'a', '{BIG}')", "update t set v = 'b'", "update t set id = 2", "delete from t"
        )
        found = _data(world, 4)
    assert found == [
        ("insert", {"id": 1, "v": "a", "big": BIG}, None, []),
        ("update", {"id": 1, "v": "b"}, None, ["big"]),
        ("update", {"id": 2, "v": "b"}, {"id": 1}, ["big"]),
        ("delete", {"id": 2}, None, []),
    ]


def test_a_root_without_full_identity_and_partitions_with(world: World) -> None:
    world.execute(
        "create table t (id int primary key, v text, big text) partition by range (id)",
        "create table t1 partition of t for values from (0) to (100)",
        "alter table t1 replica identity full",
        "alter table t1 alter big set storage external",
    )
    world.consumer()
    with world.bridge():
        world.execute(
            f"insert into t values (1, null, '{BIG}')", "update t set v = 'b'", "update t set id = 2", "delete from t"
        )
        found = _data(world, 4)
    assert found == [
        ("insert", {"id": 1, "v": None, "big": BIG}, None, []),
        ("update", {"id": 1, "v": "b", "big": BIG}, {"id": 1, "v": None, "big": BIG}, []),
        ("update", {"id": 2, "v": "b", "big": BIG}, {"id": 1, "v": "b", "big": BIG}, []),
        ("delete", {"id": 2, "v": "b", "big": BIG}, None, []),
    ]


def test_partitions_with_different_identities_each_send_their_own(world: World) -> None:
    world.execute(
        "create table t (id int primary key, v text) partition by range (id)",
        "create table t1 partition of t for values from (0) to (10)",
        "create table t2 partition of t for values from (10) to (20) partition by range (id)",
        "create table t21 partition of t2 for values from (10) to (20)",
        "alter table t21 replica identity full",
    )
    world.consumer()
    with world.bridge():
        world.execute(
            "insert into t values (1, 'a'), (11, 'a')", "update t set v = 'b'", "update t set v = 'c' where id = 1",
            "update t set v = 'd' where id = 11", "delete from t where id = 1", "delete from t where id = 11",
        )  # fmt: skip
        found = _data(world, 8)
    assert found[2:] == [
        ("update", {"id": 1, "v": "b"}, None, []),
        ("update", {"id": 11, "v": "b"}, {"id": 11, "v": "a"}, []),
        ("update", {"id": 1, "v": "c"}, None, []),
        ("update", {"id": 11, "v": "d"}, {"id": 11, "v": "b"}, []),
        ("delete", {"id": 1}, None, []),
        ("delete", {"id": 11, "v": "d"}, None, []),
    ]


def test_a_materialized_view_under_a_wildcard_is_left_out(world: World) -> None:
    world.execute(
        "create table t (id int primary key, v int)",
        "create materialized view mv as select * from t",
        "create unique index on mv (id)",
    )
    world.consumer(tables=("public.*",))
    with world.bridge():
        world.execute("insert into t values (1, 1)", "refresh materialized view concurrently mv", "update t set v = 2",
                      "refresh materialized view concurrently mv", "delete from t",
                      "refresh materialized view concurrently mv", "insert into t values (2, 2)")  # fmt: skip
        assert [topic for topic, _, _ in world.messages(4)] == ["public.t"] * 4
