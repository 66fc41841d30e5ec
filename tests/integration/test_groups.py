"""Stream consumers through the bridge, with both plugins."""

from __future__ import annotations

from typing import Any

from cdcbridge import Stream
from cdcbridge.changes.keys import partition_of
from tests.harness.world import PATIENCE, World, eventually
from tests.integration.test_published import emit


def drained(world: World, name: str = "audit") -> list[tuple[Any, ...]]:
    """(seq, partition, topic, key, op) of all that the group reads."""
    got: list[tuple[Any, ...]] = []
    query = "select seq, partition, topic, key, data ->> 'op', receipt from read_stream(%s, 7, '1 min')"
    while rows := world.rows(query, name):
        got += [row[:5] for row in rows]
        assert world.value("select commit_offset(%s, %s, %s, %s)", name, rows[-1][1], rows[-1][0], rows[-1][5])
    return got


def test_a_group_reads_changes_and_messages_of_the_wal(world: World) -> None:
    world.execute("create table t (id int primary key)", "create table other (id int primary key)")
    world.consumer("audit", ("public.t",), topics=["invoices"], mode="stream", operations=["insert", "delete"])
    world.consumer("everything", ("public.*",), mode="stream")
    with world.bridge():
        world.execute("insert into t select generate_series(1, 5)", "update t set id = 9 where id = 5")
        world.execute("delete from t where id = 1", "insert into other values (1)")
        emit(world, '{"key": "42", "data": 1}')
        emit(world, "not JSON")
        eventually(lambda: world.value("select count(*) from messages") == 10, "all is logged")
    got = drained(world)
    assert sorted((topic, key, op) for _, _, topic, key, op in got if key) == [
        ("invoices", "42", "message"),
        *(("public.t", str(n), op) for n, op in ((1, "delete"), *((n, "insert") for n in range(1, 6)))),
    ]
    assert all(partition == partition_of(key.encode() if key else None, 16) for _, partition, _, key, _ in got)
    assert [op for _, _, topic, _, op in drained(world, "everything") if topic == "public.other"] == ["insert"]
    assert world.value("select count(*) from waiting") == 0, "groups have no rows of their own"
    assert world.value("select sum(pending) from consumer_lag()") == 0


def test_a_large_append_keeps_order_and_lays_partitions_beside_each_other(world15: World) -> None:
    world15.execute("create table t (id int primary key, n int)")
    world15.consumer("audit", mode="stream")
    world15.consumer("queue")
    with world15.bridge():
        world15.execute("insert into t select g, 0 from generate_series(1, 1000) g", "update t set n = 1")
        eventually(lambda: world15.value("select count(*) from messages") == 2000, "all is logged")
    received = world15.rows("select seq, commit_lsn, ordinal from receive('queue', 1000)")
    assert received == sorted(received, key=lambda row: row[0])
    assert [row[2] for row in received] == list(range(1000))
    keys: dict[str, list[str]] = {}
    for _, _, _, key, op in sorted(drained(world15)):
        keys.setdefault(key, []).append(op)
    assert keys == {str(n): ["insert", "update"] for n in range(1, 1001)}
    changes = (
        "select count(*) from (select partition <> lag(partition) over (order by ctid) as c from messages) x where c"
    )
    assert world15.value(changes) <= 2 * 16 * 4, "a few runs, not one a message"


def test_partitions_changed_between_runs_keep_each_keys_order(world: World) -> None:
    world.execute("create table t (id int primary key, n int default 0)")
    world.consumer("audit", mode="stream")
    for partitions in (4, 16, 3):
        world.store_settings["partitions"] = partitions
        with world.bridge():
            before = world.value("select count(*) from messages")
            world.execute("insert into t select generate_series(1, 20) on conflict (id) do update set n = t.n + 1")
            eventually(lambda: world.value("select count(*) from messages") == before + 20, "all is logged")  # noqa: B023
    assert world.value("select count(distinct partition) from messages where seq > 40") == 3
    keys: dict[str, list[int]] = {}
    for seq, _, _, key, _ in drained(world):
        keys.setdefault(key, []).append(seq)
    assert len(keys) == 20
    assert all(len(seqs) == 3 and seqs == sorted(seqs) for seqs in keys.values())


def test_an_append_wakes_a_waiting_member(world15: World) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer("audit", mode="stream")
    with world15.bridge():
        eventually(lambda: world15.value("select count(*) from consumers") == 1, "the consumer is there")
        with Stream.connect(world15.dsn, "audit", schema=world15.schema) as stream:
            world15.execute("insert into t values (1)")
            batch = stream.read(wait=PATIENCE)
            assert batch is not None and batch.messages[0].data["record"] == {"id": 1}
            assert batch.commit() is True
