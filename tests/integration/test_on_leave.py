"""`on_leave: delete`: a row that stops matching the filter is delivered once more, as a delete, from every path."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.world import World, eventually

FILTER = "record.status == 'paid'"


def messages(world: World, name: str = "c", *, ack: bool = True) -> list[dict[str, Any]]:
    got = world.rows("select to_json(r) from receive(%s, 100) r", name)
    if ack:
        world.rows("select ack(%s, %s::text[])", name, [r["receipt"] for (r,) in got])
    return [r for (r,) in got]


def waits(world: World, count: int, name: str = "c") -> None:
    query = "select pending from consumer_lag() where name = %s"
    eventually(lambda: world.value(query, name) >= count, f"{count} wait for {name}")
    assert world.value(query, name) == count


def told(got: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["data"]["op"], r["key"], r["data"]["record"]) for r in got]


def change(world: World) -> None:
    """Rows that enter, stay, leave, never match, change their key while they leave, and go."""
    world.execute(
        "insert into t values (1, 'paid', 10.50, 9007199254740993), (2, 'open', 20, 2), (3, 'paid', 30, 3)",
        "update t set amount = 11.50 where id = 1",
        "update t set status = 'cancelled', amount = 0 where id = 1",
        "update t set amount = 21 where id = 2",
        "update t set id = 4, status = 'cancelled' where id = 3",
        "delete from t where id = 2",
    )


def table(world: World, identity: str) -> None:
    world.execute(
        "create table t (id int primary key, status text, amount numeric, big bigint)",
        f"alter table t replica identity {identity}",
    )


WHOLE = [
    ("insert", "1", {"id": 1, "status": "paid", "amount": 10.50, "big": 9007199254740993}),
    ("insert", "3", {"id": 3, "status": "paid", "amount": 30, "big": 3}),
    ("update", "1", {"id": 1, "status": "paid", "amount": 11.50, "big": 9007199254740993}),
    ("delete", "1", {"id": 1, "status": "paid", "amount": 11.50, "big": 9007199254740993}),
    ("delete", "3", {"id": 3, "status": "paid", "amount": 30, "big": 3}),
]  # fmt: skip
# Where the WAL has no old row, an update that does not match is a delete: the row may have matched before.
BY_KEY = [
    *WHOLE[:3],
    ("delete", "1", {"id": 1}),
    ("delete", "2", {"id": 2}),
    ("delete", "3", {"id": 3}),
    ("delete", "2", {"id": 2}),  # of the row itself: its other columns are not in the WAL, so it is delivered
]


@pytest.mark.parametrize(("identity", "expected"), [("full", WHOLE), ("default", BY_KEY)])
def test_a_row_that_leaves_is_deleted_and_every_path_says_so(world: World, identity: str, expected: list[Any]) -> None:
    table(world, identity)
    both: dict[str, Any] = {"filter": FILTER, "on_leave": "delete"}
    world.consumer(**both)
    world.consumer("fifo", mode="fifo", **both)
    world.consumer("plain", filter=FILTER)
    world.consumer("everything")
    with world.bridge():
        change(world)
        for name in ("c", "fifo"):
            waits(world, len(expected), name)
        peeked = world.rows("select to_json(r) from peek('c', 100) r")
        assert told([r for (r,) in peeked]) == expected
        got = messages(world)
        assert told(got) == expected
        assert all(
            r["data"]["old"] is None and r["data"]["unchanged"] == [] for r in got if r["data"]["op"] == "delete"
        )
        assert world.value("select count(*) from redriven") == sum(r["data"]["op"] == "delete" for r in got) - (
            identity == "default"
        )
        assert told(messages(world, "fifo")) == expected
        assert world.value("select count(*) from redriven") == 0, "nothing is kept of what is finished"
        assert [op for op, _, _ in told(messages(world, "plain"))].count("delete") == (identity == "default")
        updates = [r["data"]["record"]["status"] for r in messages(world, "everything") if r["data"]["op"] == "update"]
        assert updates == ["paid", "cancelled", "open", "cancelled"], "others get the update as it is"
    # a new consumer gets the same from the log, and a replay gives the same again
    world.consumer("late", start="earliest", mode="fifo", **both)
    with world.bridge():
        waits(world, len(expected), "late")
        assert [r["data"] for r in messages(world, "late")] == [r["data"] for r in got]
        for name in ("c", "late"):
            world.json("consumers", "replay", name, "--from", "earliest")
            again = messages(world, name)
            assert [(r["data"], r["key"], r["seq"]) for r in again] == [(r["data"], r["key"], r["seq"]) for r in got]
    assert '"amount":11.50,"big":9007199254740993' in str(world.rows("select data::text from messages"))


def test_a_dead_letter_of_a_row_that_left_is_the_delete_and_comes_again_as_one(world: World) -> None:
    table(world, "full")
    world.consumer(filter=FILTER, on_leave="delete", max_message_bytes=120)
    with world.bridge():
        world.execute(
            "insert into t values (1, 'paid', 1, 1)",
            "update t set status = 'cancelled'",
            f"insert into t values (2, 'paid', 1{'0' * 100}, 1)",
            "update t set status = 'cancelled' where id = 2",
        )
        waits(world, 2)
        assert (
            sorted(reason.partition(":")[0] for (reason,) in world.rows("select reason from dead_messages"))
            == ["oversized"] * 2
        )
        assert world.rows("select data ->> 'op' from dead_messages order by seq") == [("insert",), ("delete",)]
        insert, left = messages(world, ack=False)
        assert (insert["data"]["op"], left["data"]["op"]) == ("insert", "delete")
        world.rows("select nack('c', %s, dead => true)", [left["receipt"]])
        query = "select data ->> 'op', data -> 'record' ->> 'status' from dead_messages where reason like 'nacked%%'"
        assert world.rows(query) == [("delete", "paid")]
        world.rows("select redrive('c')")
        world.rows("select nack('c', %s, '0s')", [insert["receipt"]])
        assert sorted(r["data"]["op"] for r in messages(world)) == ["delete", "delete", "insert", "insert"]
        assert world.value("select count(*) from redriven") == 0


def test_columns_and_a_key_of_the_consumers_hold_for_the_delete_too(world: World) -> None:
    table(world, "full")
    world.consumer(filter=FILTER, on_leave="delete", key=["status", "id"], columns={"exclude": ["amount"]}, mode="fifo")
    with world.bridge():
        world.execute("insert into t values (1, 'paid', 1, 1)", "update t set status = 'cancelled'")
        waits(world, 2)
        row = {"id": 1, "status": "paid", "big": 1}
        assert told(messages(world)) == [("insert", '["paid","1"]', row), ("delete", '["paid","1"]', row)]


@pytest.mark.parametrize("how", ["record.id > 5", "op == 'insert' || record.status == 'paid'", "has(record.status)"])
def test_a_row_of_which_nobody_was_told_is_not_deleted(world18: World, how: str) -> None:
    """Where the WAL tells that the row did not match: the identity is what it was, or the old row is whole."""
    table(world18, "default" if "id" in how else "full")
    world18.consumer(filter=how, on_leave="delete")
    with world18.bridge():
        world18.execute(
            "insert into t values (1, 'open', 1, 1)",
            "update t set amount = 2",
            "insert into t values (9, 'paid', 1, 1)",
        )
        expected = {"record.id > 5": ["insert"], "has(record.status)": ["insert", "update", "insert"]}
        eventually(lambda: world18.value("select count(*) from messages where key = '9'") == 1)
        ops = [op for op, _, _ in told(messages(world18))]
        # An insert of any row matches the second filter, so this row was told.
        assert ops == expected.get(how, ["insert", "delete", "insert"])


def test_rows_of_a_snapshot_are_filtered_and_their_leaving_is_told(world: World) -> None:
    table(world, "full")
    world.execute("insert into t values (1, 'paid', 1, 1), (2, 'open', 2, 2)")
    world.consumer(filter=FILTER, on_leave="delete", start="snapshot", mode="fifo")
    with world.bridge():
        waits(world, 1)
        world.execute("update t set status = 'cancelled'")
        waits(world, 2)
        row = {"id": 1, "status": "paid", "amount": 1, "big": 1}
        assert told(messages(world)) == [("read", "1", row), ("delete", "1", row)]


def test_the_configuration_refuses_what_cannot_be_told(world18: World) -> None:
    for settings, said in (
        ({"mode": "stream"}, "a stream reads the log as it is"),
        ({}, "needs a filter"),
        ({"filter": FILTER, "operations": ["insert", "delete"]}, "needs the operation update"),
        ({"filter": "old == null || old.status != record.status"}, "reads `old`"),
    ):
        given: dict[str, Any] = {**settings, "on_leave": "delete"}
        world18.consumer(**given)
        done = world18.run_program("config", "check")
        assert done.returncode == 2, done.stdout
        assert said in done.stderr


def test_what_is_queued_stays_when_on_leave_is_taken_back(world18: World) -> None:
    table(world18, "full")
    world18.consumer(filter=FILTER, on_leave="delete")
    with world18.bridge():
        world18.execute("insert into t values (1, 'paid', 1, 1)", "update t set status = 'cancelled'")
        waits(world18, 2)
    world18.consumer(filter=FILTER)
    assert world18.json("consumers", "apply", "--json")["changed"] == ["c"]
    assert world18.json("consumers", "apply", "--json")["changed"] == []
    assert [op for op, _, _ in told(messages(world18))] == ["insert", "delete"]
    with world18.bridge():
        world18.execute("insert into t values (2, 'paid', 1, 1)", "update t set status = 'cancelled' where id = 2")
        world18.execute("insert into t values (3, 'paid', 1, 1)")
        eventually(lambda: world18.value("select count(*) from messages where key = '3'") == 1)
    assert [op for op, _, _ in told(messages(world18))] == ["insert", "insert"]
    world18.consumer(filter=FILTER, on_leave="delete")
    assert world18.json("consumers", "apply", "--json")["changed"] == ["c"]
