"""An annotation reaches each change after it in its transaction, and no other one."""

from __future__ import annotations

import json

import orjson
import pytest

from cdcbridge.changes.events import Begin, Change, Commit, LogicalMessage, Relation
from cdcbridge.changes.position import START, Position
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.copy_format import message_rows
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.routing.subscription import Subscription
from tests.harness.world import World, eventually
from tests.revert.conftest import caught_up

T = Relation("public", "t", "public.t", ("id",), frozenset({"id"}))
NOTE = LogicalMessage(True, "cdcbridge:annotate", b'{"reverts": {"seqs": [7]}}', 5)


def emit(annotation: object) -> str:
    """The statement of an annotation."""
    return f"select pg_logical_emit_message(true, 'cdcbridge:annotate', '{json.dumps(annotation)}')"


def changes(first: int, count: int) -> list[object]:
    return [Change("insert", T, {"id": n}) for n in range(first, first + count)]


def annotated(batch: object) -> list[bool]:
    """Whether each row of a batch is annotated."""
    return [b'"annotation":{"reverts": {"seqs": [7]}}}' in row for row in batch.rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize("cut", range(8))
def test_a_restart_inside_the_transaction_keeps_the_annotation(cut: int) -> None:
    """The store may have any part of the transaction, and the source sends all of it again."""
    events = [Begin(10, 7, 0), *changes(0, 2), NOTE, *changes(2, 3), Commit(11, 10), Begin(20, 8, 0), *changes(9, 1)]
    for subscription in (
        Subscription(1, "plain", ("public.t",), frozenset(OPERATIONS)),
        Subscription(1, "keyed", ("public.t",), frozenset(OPERATIONS), key=("id",)),
    ):
        router = Router([subscription])
        first = Collector(router, 16, START, 0)
        first.feed(events[:cut])  # type: ignore[arg-type]
        batch = first.take()
        second = Collector(router, 16, Position(10, batch.position.ordinal) if cut else START, 0)
        second.feed(events)  # type: ignore[arg-type]
        assert annotated(batch) + annotated(second.take()) == [False, False, True, True, True, False]


def test_a_malformed_one_is_refused_once_and_annotates_nothing() -> None:
    one = Collector(Router([Subscription(1, "c", ("public.t",), frozenset(OPERATIONS))]), 16, START, 0)
    bad = LogicalMessage(True, "cdcbridge:annotate", b"{no", 5)
    one.feed([Begin(10, 7, 0), bad, *changes(0, 1), Commit(11, 10)])  # type: ignore[list-item]
    batch = one.take()
    assert annotated(batch) == [False] and b"annotation" not in message_rows(batch.rows, 1)
    assert [(what, topic) for what, topic, _ in batch.refused] == [("published.malformed", "annotate")]


@pytest.mark.parametrize("size", [3, 9000])
def test_small_and_large_transactions(world: World, size: int) -> None:
    """A large one arrives in progress under pgoutput, and the log gets it in several appends."""
    world.execute("create table t (id int primary key, a text)")
    world.consumer()
    world.consumer("columns", columns={"include": ["id"]}, max_in_flight=100000)
    world.consumer("left", filter="record.a != 'gone'", on_leave="delete", max_in_flight=100000)
    try:
        world.execute("alter system set logical_decoding_work_mem = '64kB'", "select pg_reload_conf()")
        with world.bridge():
            world.execute(f"begin; insert into t values (0, 'x'); {emit({'by': 1})}; commit")
            rest = (
                f"insert into t select i, 'x' from generate_series(1, {size}) i; update t set a = 'gone' where id = 1"
            )
            world.execute(f"begin; {emit({'by': 2})}; {rest}; commit; insert into t values (-1)")
            caught_up(world)
            found = world.rows(
                "select data ->> 'annotation', count(*), min(key), data ->> 'op' from messages"
                " group by 1, 4 order by min(seq)"
            )
            assert found == [
                (None, 2, "-1", "insert"), ('{"by": 2}', size, "1", "insert"), ('{"by": 2}', 1, "1", "update"),
            ]  # fmt: skip
            for name in ("columns", "left"):
                got: list[dict[str, object]] = []
                while len(got) < 2:
                    page = world.rows(f"select key, data::text from receive('{name}', 1000)")
                    assert page, "the messages of key 1"
                    got += [orjson.loads(data) for key, data in page if key == "1"]
                assert [data.get("annotation") for data in got] == [{"by": 2}, {"by": 2}]
            assert got[1]["op"] == "delete"  # the row left the filter
    finally:
        world.execute("alter system reset logical_decoding_work_mem", "select pg_reload_conf()")


def test_a_bridge_that_is_killed_inside_the_transaction(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        pass
    world.execute(f"begin; {emit({'by': 2})}; insert into t select generate_series(1, 30000); commit")
    killed = world.start_process(crash=("committed", 2))
    assert killed.wait(60) != 0
    assert 0 < world.value("select count(*) from messages") < 30000
    with world.bridge():
        caught_up(world)
    assert world.rows("select data ->> 'annotation', count(*) from messages group by 1") == [('{"by": 2}', 30000)]


def test_the_sink_format_has_it(world18: World) -> None:
    path = world18.folder / "out.jsonl"
    world18.execute("create table t (id int primary key)")
    world18.consumer(mode="stream", sink={"type": "file", "path": str(path)})
    with world18.bridge():
        world18.execute(f"begin; {emit([1])}; insert into t values (1); commit")
        world18.start_sinks()
        eventually(lambda: path.exists() and path.read_text(), "the sink delivered")
    assert json.loads(path.read_text().splitlines()[0])["data"] == {
        "op": "insert", "record": {"id": 1}, "old": None, "unchanged": [], "annotation": [1],
    }  # fmt: skip


def test_the_topic_is_reserved(world18: World) -> None:
    world18.consumer(topics=["annotate"])
    refused = world18.run_program("config", "check")
    assert refused.returncode == 2 and "'annotate' is reserved" in refused.stderr
