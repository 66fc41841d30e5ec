"""Rows that appear on the target while a mirror decides about them: nothing holds a row that is not there yet."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.harness.world import World, eventually
from tests.mirrors.pair import Pair


def begin(pair: Pair) -> None:
    """One row on both sides, mirrored in both directions by processes."""
    pair.both("create table t (id int primary key, v text)")
    pair.two_way(create_tables=False)


def in_between(pair: Pair, stopped: World, act: Callable[[], None]) -> None:
    """Act while the mirror to `stopped` waits for the log of that side, inside a transaction."""
    waits = (
        "select exists (select from pg_stat_activity where application_name = 'cdcbridge mirror'"
        " and state = 'idle in transaction' and datname = current_database()"
        " and query like '%pg_logical_emit_message(false%')"
    )
    eventually(lambda: stopped.value(waits), "the mirror waits for the log")
    act()
    time.sleep(0.1)


@pytest.mark.parametrize("case", ["update against delete", "delete against delete"])
def test_a_row_that_appears_is_not_overwritten(pair18: Pair, case: str) -> None:
    a, b = pair18.sides
    begin(pair18)
    processes = [side.start_process() for side in pair18.sides]
    eventually(lambda: a.active() and b.active(), "both bridges stream")
    mirrors = [side.start_mirrors() for side in pair18.sides]
    a.execute("insert into t values (1, 'both know it')")
    pair18.settle("t")
    processes[1].send_signal(signal.SIGSTOP)
    b.execute("delete from t where id = 1")
    a.execute(
        "update t set v = 'a changed' where id = 1" if case.startswith("update") else "delete from t where id = 1"
    )
    in_between(pair18, b, lambda: b.execute("insert into t values (1, 'b again')"))
    processes[1].send_signal(signal.SIGCONT)
    pair18.settle("t")
    assert [v for _, v in pair18.table(a, "t")] == ["b again"]
    for process in (*mirrors, *processes):
        process.terminate()
        process.wait(timeout=30)
