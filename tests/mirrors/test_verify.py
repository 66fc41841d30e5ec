"""`cdcbridge mirror verify`: the keys that differ, and their repair."""

from __future__ import annotations

import json
import threading
from typing import Any

import psycopg
import pytest

from cdcbridge.lsn import parse_lsn
from cdcbridge.routing.mirror_marks import MARKER_PREFIX, Marker
from tests.mirrors.pair import Pair

QUICK = ("--pause", "100ms", "--json")


def verified(pair: Pair, *options: str, code: int) -> dict[str, Any]:
    """The result of `mirror verify to_b --json`, which must exit with `code`."""
    done = pair.a.run_program("mirror", "verify", "to_b", *QUICK, *options)
    assert done.returncode == code, (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_differences_are_named_and_repaired_from_the_source(pair15: Pair) -> None:
    """The servers have other versions, plugins and collations. Keys of text, several columns, and a renamed table."""
    a, b = pair15.sides
    a.execute(
        "create table t (k text, n int, v text, j json, d numeric(10, 2), secret text, primary key (k, n))",
        "alter table t replica identity full",
        "insert into t select chr(65 + i % 60) || 'ä', i, 'v' || i, '{\"a\": 1.0}', i / 3.0, 's' from generate_series(1, 12000) i",
    )
    pair15.mirror(tables={"public.t": {"to": "copy.t", "columns": {"exclude": ["secret"]}}})
    with pair15.running():
        pair15.settle()
        found = verified(pair15, code=0)
        (table,) = found["tables"]
        assert found["ok"] and found["notes"] == [] and table["rows"] == 12000
        assert (table["table"], table["target"]) == ("public.t", "copy.t")
        b.execute(
            "update copy.t set v = 'wrong', d = 0 where n = 100",
            "delete from copy.t where n in (200, 11999)",
            "insert into copy.t (k, n, v) values ('z\"', 20000, 'extra')",
        )
        (table,) = verified(pair15, code=2)["tables"]
        assert len(table["missing"]) == 2 and table["extra"] == ['["z\\"","20000"]'] and len(table["different"]) == 1
        (one,) = [d for d in table["differences"] if d["kind"] == "different"]
        assert one["columns"] == ["v", "d"] and one["source"]["v"] == "v100" and one["target"]["v"] == "wrong"
        text = a.run_program("mirror", "verify", "to_b", "--pause", "0").stdout
        assert "not in the target: 2" in text and "(v, d)" in text and "not in the source: 1" in text
        (table,) = verified(pair15, "--repair", "source", code=0)["tables"]
        assert table["repaired"] == 4
        assert verified(pair15, code=0)["tables"][0]["rows"] == 12000
        a.execute("update t set v = 'after' where n = 100")
        pair15.settle()
        assert b.value("select v from copy.t where n = 100") == "after"


def test_two_way_repair_from_either_side(pair18: Pair) -> None:
    """A repair is a new change, so both sides are equal afterwards, with values that the log leaves out."""
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text, long text)")
    pair18.two_way()
    with pair18.running():
        a.execute("insert into t select n, 'x', repeat(md5(n::text), 300) from generate_series(1, 6) n")
        pair18.settle("t")
        pair18.pause()
        seen = b.rows("select source, lsn::text from transaction_marks where source is not null order by lsn desc")[0]
        mark = Marker(seen[0], parse_lsn(seen[1]), "to_b").dump()
        with b.sql.transaction():  # as the mirror writes, so that it is not mirrored back
            b.sql.execute("select pg_logical_emit_message(true, %s, %s)", (MARKER_PREFIX, mark))
            b.execute("update t set long = 'spoilt' where id in (1, 2)", "delete from t where id in (3, 4)")
        paused = verified(pair18, "--wait", "0", code=2)
        assert any("is paused" in note for note in paused["notes"])
        assert paused["tables"][0]["different"] == ["1", "2"] and paused["tables"][0]["missing"] == ["3", "4"]
        refused = a.run_program("mirror", "verify", "to_b", "--wait", "0", "--pause", "0", "--repair", "target")
        assert refused.returncode == 1 and "nothing was repaired" in refused.stderr
        pair18.resume()
        pair18.settle()
        before = pair18.table(a, "t")
        (table,) = verified(pair18, "--repair", "source", code=0)["tables"]
        assert table["repaired"] == 4
        pair18.settle("t")
        assert pair18.table(a, "t") == before
        assert pair18.conflicts(b) == []
        # The repaired rows were mirrored back, and both sides had them.
        assert {one[0] for one in pair18.conflicts(a)} <= {"insert_exists"}
        assert verified(pair18, code=0)["tables"][0]["rows"] == 6


def test_repair_from_the_target(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text, twice int generated always as (id * 2) stored)")
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t (id, v) values (1, 'x'), (2, 'x')")
        pair18.settle("t")
        b.execute("update t set v = 'right' where id = 1", "insert into t (id, v) values (3, 'right')")
        assert verified(pair18, "--repair", "target", code=0)["tables"][0]["repaired"] == 2
        pair18.settle("t")
        assert a.value("select v from t where id = 3") == "right"


def test_rows_that_are_written_are_not_reported(pair18: Pair) -> None:
    """Both sides live: nothing is reported while every row of the table changes all the time."""
    a = pair18.a
    pair18.both("create table t (id int primary key, v int)")
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t select n, 0 from generate_series(1, 200) n")
        pair18.settle("t")
        ended = threading.Event()

        def write() -> None:
            with psycopg.connect(a.dsn, autocommit=True) as session:
                while not ended.is_set():
                    session.execute("update t set v = v + 1")

        writer = threading.Thread(target=write)
        writer.start()
        try:
            found = [verified(pair18, "--wait", "0", code=0) for _ in range(3)]
        finally:
            ended.set()
            writer.join()
        assert all(one["tables"][0]["rows"] == 200 for one in found)
        pair18.settle("t")


def test_tables_that_cannot_be_compared(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute(
        "create table keyless (v text)",
        "alter table keyless replica identity full",
        "create table gone (id int primary key)",
        "create table wide (id int primary key, extra int)",
    )
    b.execute("create table keyless (v text)", "create table wide (id int primary key)")
    pair18.mirror(start="now")
    with pair18.running():
        pair18.settle()
        found = {one["table"]: one for one in verified(pair18, code=2)["tables"]}
        assert "no key" in found["public.keyless"]["notes"][0] and found["public.keyless"]["ok"]
        assert found["public.gone"]["fault"] == "the target has no such table"
        assert "extra" in found["public.wide"]["notes"][0]
        only = verified(pair18, "--table", "public.wide", code=0)
        assert [one["table"] for one in only["tables"]] == ["public.wide"]
        refused = a.run_program("mirror", "verify", "to_b", "--table", "public.other")
        assert refused.returncode == 2 and "takes no table 'public.other'" in refused.stderr


def test_a_history_cannot_be_verified(pair18: Pair) -> None:
    pair18.a.execute("create table t (id int primary key)")
    pair18.mirror(apply="append")
    refused = pair18.a.run_program("mirror", "verify", "to_b")
    assert refused.returncode == 2 and "history" in refused.stderr


@pytest.mark.parametrize("name", ["n", "h", "r", "s", "t", "order"])
def test_columns_with_the_names_of_the_queries(pair18: Pair, name: str) -> None:
    a, b = pair18.sides
    pair18.both(f'create table t ("{name}" int primary key, "{name}2" text)')
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t values (1, 'x'), (2, 'y')")
        pair18.settle("t")
        b.execute("delete from t", "insert into t values (2, 'z')")
        table = verified(pair18, "--repair", "source", code=0)["tables"][0]
        assert (table["missing"], table["different"], table["repaired"]) == (["1"], ["2"], 2)
        pair18.settle("t")
