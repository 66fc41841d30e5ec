"""Clocks that are wrong: a side whose clock steps back decides as the other side does, and what lost is listed."""

from __future__ import annotations

import psycopg

from tests.mirrors.pair import Pair
from tests.mirrors.workload import pin_time, take_origin


def write_at(dsn: str, seconds: float, statement: str) -> None:
    """Commit a statement at a time that is wrong by so many seconds."""
    with psycopg.connect(dsn, autocommit=True) as session:
        take_origin(session, "a wrong clock")
        with session.transaction():
            session.execute(statement.encode())
            pin_time(session, seconds)


def test_a_clock_that_steps_back_divides_nobody(pair18: Pair) -> None:
    """On side a a row is written an hour ahead, and then now. Side b writes it half an hour ahead in between."""
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text)", "insert into t values (1, 'both')")
    pair18.two_way(create_tables=False)
    with a.bridge(), b.bridge():
        write_at(a.dsn, 3600, "update t set v = 'a ahead' where id = 1")
        a.execute("update t set v = 'a later' where id = 1")
        write_at(b.dsn, 1800, "update t set v = 'b' where id = 1")
        mirrors = [side.start_mirrors() for side in pair18.sides]
        pair18.settle("t")
        assert pair18.table(a, "t") == [(1, "a later")]
        assert pair18.conflicts(a) == [("update_origin_differs", "1", "target", "decided")]
        assert [conflict[2] for conflict in pair18.conflicts(b)] == ["source"]
        for process in mirrors:
            process.terminate()
            assert process.wait(30) == 0
