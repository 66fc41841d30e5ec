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
