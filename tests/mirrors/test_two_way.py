"""Each kind of encounter of two writes, with both sides written, and what both sides have at the end."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import psycopg
import pytest

from tests.harness.world import eventually
from tests.mirrors.pair import Pair

CASES = {
    "update against update": ("update t set v = 'a'", "update t set v = 'b'"),
    "update against delete": ("update t set v = 'a'", "delete from t"),
    "delete against update": ("delete from t", "update t set v = 'b'"),
    "delete against delete": ("delete from t", "delete from t"),
    "insert against insert": ("insert into t values (2, 'a')", "insert into t values (2, 'b')"),
    "delete and insert against update": ("delete from t; insert into t values (1, 'a again')", "update t set v = 'b'"),
    "a new key against update": ("update t set id = 3, v = 'a'", "update t set v = 'b'"),
    "truncate against update": ("truncate t", "update t set v = 'b'"),
    "truncate against insert": ("truncate t", "insert into t values (5, 'b')"),
    "insert and delete against insert": ("insert into t values (2, 'a'); delete from t where id = 2",
                                         "insert into t values (2, 'b')"),
}  # fmt: skip


@contextlib.contextmanager
def apart(pair: Pair) -> Iterator[None]:
    """The two sides cannot see each other's writes: both mirrors are paused."""
    pair.pause()
    yield
    pair.resume()


@pytest.mark.parametrize("later", ["a", "b"])
def test_the_later_write_wins_on_both_sides(pair18: Pair, later: str) -> None:
    a, b = pair18.sides
    pair18.both(*(f"create table t{n} (id int primary key, v text)" for n in range(len(CASES))))
    a.execute(*(f"insert into t{n} values (1, 'both')" for n in range(len(CASES))))
    pair18.two_way(start="adopt")
    with pair18.running():
        pair18.settle(*(f"t{n}" for n in range(len(CASES))))
        with apart(pair18):
            for side in (b, a) if later == "a" else (a, b):
                for n, statements in enumerate(CASES.values()):
                    side.execute(re.sub(r"\bt\b", f"t{n}", statements[0 if side is a else 1]))
                time.sleep(0.01)  # the commits of the other side are later
        pair18.settle(*(f"t{n}" for n in range(len(CASES))))
        for n, name in enumerate(CASES):
            found = pair18.table(a, f"t{n}")
            if name == "update against update":
                assert found == [(1, later)]
            if name in ("update against delete", "delete against update"):
                deleted = later == ("b" if name.startswith("update") else "a")
                assert (found == []) == deleted, name
            if name == "insert against insert":
                assert (2, later) in found
            if name == "truncate against insert":
                assert ((5, "b") in found) == (later == "b"), found
        lost = a.rows("select * from cdcbridge.conflicts") + b.rows("select * from cdcbridge.conflicts")
        assert lost


def test_a_write_that_saw_the_other_wins_whatever_the_clock_says(pair18: Pair) -> None:
    """Side a has its clock an hour ahead: its write counts as later than everything on b."""
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text)")
    pair18.two_way()
    with pair18.running():
        a.execute("insert into t values (1, 'a')")
        pair18.settle("t")
        a.rows("update positions set effective_time = effective_time + 3600000000 returning 1")
        a.rows("select take_lead('the test', '1 min')")  # the bridge starts again with that time
        eventually(a.active, "the bridge streams again")
        a.execute("update t set v = 'a, an hour ahead'")
        pair18.settle("t")
        b.execute("update t set v = 'b saw it'")
        pair18.settle("t")
        assert pair18.table(a, "t") == pair18.table(b, "t") == [(1, "b saw it")]
    assert pair18.conflicts(a) == pair18.conflicts(b) == []


def test_adopting_two_databases(pair15: Pair) -> None:
    a, b = pair15.sides
    pair15.both("create table t (id int primary key, v text, n numeric(8, 2))")
    a.execute(
        "insert into t select g, 'same', 1.50 from generate_series(1, 100) g", "insert into t values (200, 'a', 1)"
    )
    b.execute(
        "insert into t select g, 'same', 1.50 from generate_series(1, 100) g", "insert into t values (300, 'b', 1)"
    )
    a.execute("insert into t values (400, 'a is older', 1)")
    b.execute("insert into t values (400, 'b is newer', 1)")
    b.execute("insert into t values (500, 'b is older', 1)")
    a.execute("insert into t values (500, 'a is newer', 1)")
    pair15.two_way(start="adopt")
    with pair15.running():
        with contextlib.suppress(AssertionError):
            eventually(lambda: pair15.table(a, "t") == pair15.table(b, "t"), "both are equal")
        pair15.settle("t")
    found = {key: v for key, v, _ in pair15.table(a, "t")}
    assert found[400] == "b is newer" and found[500] == "a is newer"
    assert len(found) == 104
    lost = {key for side in pair15.sides for _, key, _, _ in pair15.conflicts(side)}
    assert lost == {"400", "500"}


@pytest.mark.parametrize("ending", ["a", "b"])
def test_a_hold_ends_with_the_next_write(pair18: Pair, ending: str) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text)")
    pair18.two_way(conflict="hold")
    with pair18.running():
        a.execute("insert into t values (1, 'both'), (2, 'both')")
        pair18.settle("t")
        with apart(pair18):
            a.execute("update t set v = 'a' where id = 1")
            b.execute("update t set v = 'b' where id = 1")
        pair18.settle()
        assert pair18.table(a, "t")[0] == (1, "a") and pair18.table(b, "t")[0] == (1, "b")
        assert pair18.conflicts(a) == pair18.conflicts(b) == [("update_origin_differs", "1", None, "held")]
        side = a if ending == "a" else b
        side.execute("update t set v = 'decided' where id = 1")
        pair18.settle("t")
        assert pair18.table(a, "t") == [(1, "decided"), (2, "both")]
        states = {state for one in pair18.sides for *_, state in pair18.conflicts(one)}
        eventually(lambda: states == {"superseded"} or "held" not in
                   {s for one in pair18.sides for *_, s in pair18.conflicts(one)}, "no hold is left")  # fmt: skip


@pytest.mark.parametrize("unique", ["hold", "newest"])
def test_a_unique_value_on_both_sides(pair18: Pair, unique: str) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, mail text unique)")
    pair18.two_way(unique=unique)
    with pair18.running():
        with apart(pair18):
            a.execute("insert into t values (1, 'ada@example.com'), (3, 'x')")
            time.sleep(0.01)
            b.execute("insert into t values (2, 'ada@example.com'), (4, 'y')")
        if unique == "hold":
            pair18.settle()
            assert pair18.table(a, "t") == [(1, "ada@example.com"), (3, "x"), (4, "y")]
            assert pair18.table(b, "t") == [(2, "ada@example.com"), (3, "x"), (4, "y")]
            assert pair18.conflicts(b) == [("insert_exists", "1", None, "held")]
        else:
            pair18.settle("t")
            assert pair18.table(a, "t") == [(2, "ada@example.com"), (3, "x"), (4, "y")]
            assert pair18.conflicts(b) == [("insert_exists", "1", "target", "decided")]
            assert pair18.conflicts(a) == [("insert_exists", "2", "source", "decided")]


def test_the_peer_must_fit(pair18: Pair) -> None:
    a = pair18.a
    pair18.both("create table t (id int primary key)")
    pair18.two_way(conflict="prefer_source")
    with pair18.running():
        stopped = eventually(lambda: a.rows("select stopped, hint from mirrors where stopped is not null"), "it stops")
    assert (
        "the mirror 'to_a' has conflict: prefer_source, which does not fit conflict: prefer_source here"
        in stopped[0][0]
    )
    assert "prefer_target" in stopped[0][1]


def test_a_mirror_waits_for_the_bridge_of_its_target(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.two_way()
    back, b.mirrors = b.mirrors, []
    with pair18.running():
        a.execute("insert into t values (1)")
        eventually(lambda: a.rows("select from mirrors where error like '%does not have the mirror ''to_a'' yet'"
                                  " or error like '%has not run yet%'"), "it says so")  # fmt: skip
        assert b.sql.execute("select count(*) from t").fetchone() == (0,)
    b.mirrors = back
    with pair18.running():
        eventually(lambda: b.sql.execute("select count(*) from t").fetchone() == (1,), "it arrives")


def test_nothing_loops_between_two_mirrors_without_two_way(pair18: Pair) -> None:
    """Two mirrors that lead to each other by mistake do not send each other's changes back."""
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text)")
    pair18.mirror(start="now")
    b.mirrors = [{"name": "to_a", "target": {"dsn": a.dsn}, "tables": ["public.*"], "start": "now"}]
    with pair18.running():
        a.execute("insert into t values (1, 'a')")
        b.execute("insert into t values (2, 'b')")
        pair18.settle("t")
        a.execute("update t set v = 'again'")
        pair18.settle("t")
        before = [side.value("select last_value from messages_seq") for side in pair18.sides]
        time.sleep(1)  # nothing may happen, so there is nothing to wait for
        assert [side.value("select last_value from messages_seq") for side in pair18.sides] == before


def test_a_second_process_waits(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute("create table t (id int primary key)")
    pair18.mirror()
    with pair18.running():
        eventually(lambda: b.value("select to_regclass('public.t') is not null or true"), "")
        second = a.start_mirrors()
        eventually(lambda: "another process applies the mirror" in a.log("mirrors.log"), "the second one waits")
        with contextlib.suppress(psycopg.Error):
            a.execute("insert into t values (1)")
        pair18.settle("t")
        second.terminate()
        second.wait(timeout=30)


def test_a_backfill_after_a_transaction_of_the_other_side(pair18: Pair) -> None:
    """Its rows have the LSN of that transaction, which is not mirrored back."""
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text)")
    b.execute("insert into t values (7, 'only on b')")
    pair18.two_way()
    with pair18.running():
        a.execute("insert into t values (1, 'a')")
        pair18.settle()
        assert b.run_program("backfill", "start", "to_a", "public.t").returncode == 0
        eventually(lambda: pair18.table(a, "t") == [(1, "a"), (7, "only on b")], "the row arrives")
        pair18.settle("t")


def test_the_peer_must_take_the_same_tables(pair18: Pair) -> None:
    a = pair18.a
    pair18.both("create table t (id int primary key)", "create table u (id int primary key)")
    pair18.two_way(back={"tables": ["public.t"]})
    with pair18.running():
        a.execute("insert into t values (1)")
        pair18.settle("t")
        a.execute("insert into u values (1)")
        stopped = eventually(lambda: a.rows("select stopped from mirrors where stopped is not null"), "it stops")
    assert "'to_a' of the target's bridge does not take the table public.u" in stopped[0][0]


def test_rules_by_table_must_fit(pair18: Pair) -> None:
    a = pair18.a
    pair18.both("create table t (id int primary key)")
    pair18.two_way(conflict={"public.t": "prefer_source"})
    with pair18.running():
        stopped = eventually(lambda: a.rows("select stopped, hint from mirrors where stopped is not null"), "it stops")
    assert "does not fit conflict: {public.t: prefer_source} here" in stopped[0][0]
    assert "conflict: {public.t: prefer_target}" in stopped[0][1]


def test_rows_without_a_key_are_not_adopted(pair18: Pair) -> None:
    a = pair18.a
    pair18.both("create table t (v text)", "alter table t replica identity full", "insert into t values ('both')")
    pair18.two_way(start="adopt")
    with pair18.running():
        stopped = eventually(lambda: a.rows("select stopped from mirrors where stopped is not null"), "it stops")
    assert "the table public.t has no key" in stopped[0][0]
    assert pair18.table(a, "t") == [("both",)]
