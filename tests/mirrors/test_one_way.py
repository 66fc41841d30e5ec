"""A mirror with one direction: the target shows what the source has."""

from __future__ import annotations

from tests.harness.world import eventually
from tests.mirrors.pair import Pair


def test_snapshot_and_changes(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute(
        "create table t (id int primary key, v text)", "insert into t select n, 'old' from generate_series(1, 100) n"
    )
    pair18.mirror()
    with pair18.running():
        eventually(lambda: b.value("select to_regclass('public.t') is not null"), "the table")
        a.execute(
            "insert into t values (101, 'new')",
            "update t set v = 'changed' where id <= 10",
            "delete from t where id > 90 and id < 100",
            "update t set id = 1000 where id = 50",
        )
        pair18.settle("t")
        assert len(pair18.table(b, "t")) == 92
        a.execute("truncate t", "insert into t values (1, 'again')")
        pair18.settle("t")
    assert pair18.conflicts(b) == []


def test_fifteen_to_eighteen(pair15: Pair) -> None:
    a, b = pair15.sides
    a.execute(
        "create table t (id int, part text, v numeric(10, 3), j jsonb, primary key (id, part))",
        "create table log (v text)",
        "alter table log replica identity full",
        "alter table t replica identity full",
    )
    pair15.mirror(start="now")
    with pair15.running():
        a.execute(
            'insert into t select n, \'x\', n / 7.0, \'{"a": [1, null, "},\\"old\\":"]}\' from generate_series(1, 30) n',
            "update t set v = 1.5, j = 'null' where id < 5",
            "delete from t where id > 20",
            "insert into log select 'line' from generate_series(1, 3)",
            "update t set id = id + 100 where id between 10 and 12",
        )
        pair15.settle("t", "log")
    assert pair15.conflicts(b) == []


def test_two_way(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text)")
    pair18.two_way()
    with pair18.running():
        a.execute("insert into t select n, 'from a' from generate_series(1, 10) n")
        b.execute("insert into t select n, 'from b' from generate_series(11, 20) n")
        pair18.settle("t")
        b.execute("update t set v = 'b changed' where id <= 5")
        a.execute("update t set v = 'a changed' where id > 15", "delete from t where id = 11")
        pair18.settle("t")
        assert len(pair18.table(a, "t")) == 19
        assert pair18.conflicts(a) == pair18.conflicts(b) == []
        for n in range(30):
            a.execute(f"update t set v = 'a{n}' where id = 1")
            b.execute(f"update t set v = 'b{n}' where id = 1")
        pair18.settle("t")
    print(pair18.conflicts(a), pair18.conflicts(b))
