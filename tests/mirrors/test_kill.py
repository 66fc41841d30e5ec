"""`kill -9` of a mirror at each of its steps: each change is in the target exactly once."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from cdcbridge.instants import MIRROR_INSTANTS, MirrorInstant
from tests.harness.world import eventually
from tests.mirrors.pair import Pair


@pytest.mark.parametrize("instant", MIRROR_INSTANTS)
def test_each_change_once(pair18: Pair, instant: MirrorInstant) -> None:
    """A table without a key and a history would show a repeated change, and a counter a missing one."""
    a, b = pair18.sides
    a.execute(
        "create table c (id int primary key, n int)",
        "create table lines (v int)",
        "alter table lines replica identity full",
        "insert into c values (1, 0)",
    )
    b.execute("create table c (id int primary key, n int)", "create table lines (v int)", "insert into c values (1, 0)")
    target = {"dsn": b.dsn}
    a.mirrors = [
        {"name": "to_b", "target": target, "tables": ["public.*"], "start": "now"},
        {"name": "history", "target": target, "tables": {"public.c": "past.c"}, "apply": "append", "start": "now"},
    ]
    written = 0
    with a.bridge():
        process = a.start_mirrors(crash=(instant, 1 if instant == "mirror prepared" else 5))

        def write() -> bool:
            nonlocal written
            written += 1
            a.execute(f"begin; update c set n = n + 1; insert into lines values ({written}), ({written}); commit")
            return process.poll() is not None

        eventually(write, f"the mirror dies when it is {instant}")
        assert process.wait() == -signal.SIGKILL
        for _ in range(5):
            write()
        assert b.value("select count(*) from lines") < 2 * written
        process = a.start_mirrors()
        pair18.settle()
        history = "select count(*), count(distinct position), max(n), min(n) from past.c"
        eventually(lambda: b.value("select to_regclass('past.c') is not null"), "the history")
        eventually(lambda: b.rows(history)[0][2] == written, "the history is complete")
        assert b.rows(history) == [(written, written, written, 1)]
        assert pair18.table(b, "c") == [(1, written)]
        assert Counter(pair18.table(b, "lines")) == {(number,): 2 for number in range(1, written + 1)}
        process.terminate()
        assert process.wait(30) == 0
    assert pair18.conflicts(b) == []


def test_a_large_transaction_is_whole_or_missing(pair18: Pair) -> None:
    """A transaction that is larger than what the mirror reads at once is committed at its end only."""
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with a.bridge():
        process = a.start_mirrors(crash=("mirror committed", 1))
        a.execute("insert into t select generate_series(1, 25000)")
        assert process.wait(30) == -signal.SIGKILL
        assert b.value("select count(*) from t") == 25000


def test_a_second_process_waits_for_the_first(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with a.bridge():
        first = a.start_mirrors()
        eventually(lambda: "mirror.started" in a.log("mirrors.log"), "the first one applies")
        second = a.start_mirrors()
        eventually(lambda: "another process applies the mirror 'to_b'" in a.log("mirrors.log"), "the second one waits")
        first.kill()
        first.wait()
        a.execute("insert into t values (1)")
        eventually(lambda: b.value("select count(*) from t") == 1, "the second one applies")
        second.terminate()
        assert second.wait(30) == 0
