"""Rows that were there before: the seam to what comes through the stream, and what may go wrong at it."""

from __future__ import annotations

import pytest

from tests.world import World, eventually


def ops(world: World, query: str = "select data ->> 'op', key from messages order by seq") -> list[tuple[str, str]]:
    return world.rows(query)


def finished(world: World) -> bool:
    return bool(world.value("select count(*) > 0 and bool_and(state = 'done') from backfills"))


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
            "table": "public.t", "ok": True, "rows": 430, "missing": [], "extra": [], "different": []
        }  # fmt: skip
        world.execute("update cdcbridge.messages set data = replace(data::text, '\"n\":1.50', '\"n\":1.51')::json")
        result = world.run_program("verify", "public.t")
        assert result.returncode == 2 and 'different: 1: ["k2","7"]' in result.stdout
