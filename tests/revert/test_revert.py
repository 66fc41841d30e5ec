"""Changes are undone in the source: each kind of change, and each reason for which one is not undone."""

from __future__ import annotations

import threading

import psycopg
import pytest

from tests.harness.world import World, eventually
from tests.revert.conftest import caught_up, checksum, planned, revert, rows


def test_a_change_a_delete_and_an_insert_are_undone(world: World) -> None:
    world.execute(
        "create table t (id int primary key, a text, b numeric)",
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 'x', 1.50), (2, 'y', 2)")
        world.execute("update t set a = 'wrong' where id = 1", "delete from t where id = 2", "insert into t values (3)")
        last = caught_up(world)
        plan = revert(world, str(last - 2), str(last - 1), str(last))
        assert "Nothing was changed. --apply undoes 3 changes" in plan.stderr
        assert 'a: "wrong" -> "x"' in plan.stdout and "begin;" in plan.stdout
        assert rows(world, "select id, a from t order by id") == [(1, "wrong"), (3, None)]
        done = revert(world, str(last), str(last - 2), str(last - 1), "--apply")
        assert "Undid 3 changes" in done.stderr
        assert rows(world, "select id, a, b::text from t order by id") == [(1, "x", "1.50"), (2, "y", "2")]
        caught_up(world)
    annotated = world.rows("select data ->> 'op', data -> 'annotation' from messages where seq > %s order by seq", last)
    assert [op for op, _ in annotated] == ["delete", "insert", "update"]
    assert {str(a) for _, a in annotated} == {
        str({"reverts": {"seqs": [last - 2, last - 1, last], "changes": 3}})
    }
