"""A replay brings the rows of a consumer's backfills again, as `seek` does for a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.harness.world import World, eventually
from tests.integration.test_on_leave import messages, waits


def got(world: World, name: str = "c") -> list[tuple[Any, ...]]:
    return [(m["seq"], m["data"]["op"], m["key"], m["data"]["record"]["n"]) for m in messages(world, name)]


def done(world: World, count: int) -> None:
    eventually(lambda: world.value("select count(*) from backfills where state = 'done'") == count, "the backfill")


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_rows_of_the_own_snapshot_come_again(world: World, mode: str) -> None:
    world.execute(
        "create table t (id int primary key, n int)", "insert into t select i, i from generate_series(1, 9) i"
    )
    world.consumer(start="snapshot", mode=mode, filter="record.n > 2", key=["id"])
    world.consumer("other", start="now", mode=mode)
    with world.bridge():
        done(world, 1)
        world.execute("update t set n = 10 where id = 3", "insert into t values (11, 11)")
        waits(world, 9)
        first = got(world)
        assert [op for _, op, _, _ in first] == ["read"] * 7 + ["update", "insert"]
        replayed = world.json("consumers", "replay", "c", "--from", "earliest")
        assert (replayed["replayed"], replayed["skipped"]) == (9, 0)
        assert got(world) == first, "the same messages, in the order of the log"
        # a seq among the rows, and a time before them
        seq = first[4][0]
        assert world.json("consumers", "replay", "c", "--from", str(seq), "--to", str(seq + 2))["replayed"] == 2
        assert got(world) == first[4:6]
        # the commit that they stand behind
        began = world.value(
            "select min(coalesce(commit_time, inserted_at))::text from messages where reader is not null"
        )
        assert world.json("consumers", "replay", "c", "--from", began)["replayed"] == 9
        assert world.json("consumers", "replay", "c", "--from", began)["skipped"] == 9, "they wait"
        assert got(world) == first
        assert [op for _, op, _, _ in got(world, "other")] == ["update", "insert"]
        assert world.json("consumers", "replay", "other", "--from", "earliest")["replayed"] == 2
        assert [op for _, op, _, _ in got(world, "other")] == ["update", "insert"], "a backfill is for one"


def test_rows_of_a_later_backfill_and_of_tables_that_are_still_taken(world18: World) -> None:
    for name in ("t", "u"):
        world18.execute(f"create table {name} (id int primary key, n int)", f"insert into {name} values (1, 1), (2, 2)")
    both = ("public.t", "public.u")
    world18.consumer(tables=both)
    world18.consumer("s", both, mode="stream")
    with world18.bridge():
        for consumer in ("c", "s"):
            for table in both:
                assert world18.run_program("backfill", "start", consumer, table).returncode == 0
        done(world18, 4)
        assert len(got(world18)) == 4
        assert world18.json("consumers", "replay", "c", "--from", "earliest")["replayed"] == 4
        assert len(got(world18)) == 4, "and none of the stream's"
    world18.consumer(tables=("public.t",), operations=["insert"], filter="record.n == 2")
    world18.consumer("late", both, start="earliest")
    with world18.bridge():
        assert world18.json("consumers", "replay", "c", "--from", "earliest")["replayed"] == 1
        assert [key for _, _, key, _ in got(world18)] == ["2"]
        assert got(world18, "late") == [], "another consumer's rows are no part of the log for it"
    tried = json.loads(world18.run_program("filter", "test", "c", "--json").stdout)
    assert [trial["op"] for trial in tried] == ["read", "read"], "what the filter does with its snapshot"
