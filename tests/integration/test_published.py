"""Messages that applications write into the WAL, and order by key, through the bridge."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import orjson

from tests.world import World, eventually


def emit(world: World, content: str, *, topic: str = "invoices", transactional: bool = True) -> None:
    world.sql.execute("select pg_logical_emit_message(%s, %s, %s)", (transactional, f"cdcbridge:{topic}", content))


def received(world: World, count: int) -> list[dict[str, Any]]:
    """So many messages, received and acked."""
    got: list[dict[str, Any]] = []

    def more() -> bool:
        for (line,) in world.rows("select to_json(r)::text from receive('c', 100) r"):
            got.append(orjson.loads(line))
        return len(got) >= count

    eventually(more, f"{count} messages")
    assert len(got) == count
    return got


def test_a_message_in_the_wal_is_published_with_its_transaction(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer(tables=(), topics=["invoices"], mode="fifo")
    with world.bridge():
        with world.sql.transaction():
            emit(world, '{"key": "42", "data": {"total": 1.10, "huge": 12345678901234567890123, "when": null}}')
            world.execute("insert into t values (1)")
        emit(world, '{"data": 7, "key": 5.0}')
        emit(world, '{"key": null, "data": []}', topic="nobody")
        emit(world, '{"key": "x", "data": "outside"}', transactional=False)
        emit(world, '{"key": "y", "data": "last"}')
        got = received(world, 3)
    assert [row["key"] for row in got] == ["42", "5.0", "y"]
    assert [(row["topic"], row["commit_lsn"], row["ordinal"]) for row in got] == [("invoices", None, None)] * 3
    (text,) = world.rows("select data::text from messages order by seq limit 1")[0]
    assert text == (
        '{"op":"message","record":{"total": 1.10, "huge": 12345678901234567890123, "when": null},'
        '"old":null,"unchanged":[]}'
    )
    assert world.value("select count(*) from messages") == 3


def test_malformed_messages_are_dead_letters_and_stop_nothing(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer(tables=(), topics=["invoices"])
    bad = ["", "{", "[]", '{"key": "1"}', '{"data": 1, "key": {}}', '{"data": 1, "more": 2}', '{"data": NaN}', "\x01"]
    with world.bridge():
        for content in bad:
            emit(world, content)
        emit(world, '{"data": "good"}')
        assert [row["data"]["record"] for row in received(world, 1)] == ["good"]
    reasons = [reason for (reason,) in world.rows("select reason from dead_messages order by seq")]
    assert len(reasons) == len(bad)
    assert all(reason.startswith("undecodable: ") for reason in reasons)


def test_a_fifo_consumer_gets_tables_and_topics_in_order_of_the_log(world: World) -> None:
    """Changes, published messages of both kinds and a truncate; a start at the earliest gets the same."""
    world.execute("create table t (id int primary key, v int)")
    world.consumer(mode="fifo", topics=["invoices"])
    chance = random.Random(7)
    with world.bridge():
        for _ in range(30):
            key = chance.randrange(4)
            world.execute(f"insert into t values ({key}, 1) on conflict (id) do update set v = t.v + 1")
            emit(world, f'{{"key": "{key}", "data": {key}}}')
        world.rows("select publish('invoices', '1', '1')")
        world.execute("truncate t", "insert into t values (1, 1)")
        got: list[dict[str, Any]] = []

        def more() -> bool:
            for (line,) in world.rows("select to_json(r)::text from receive('c', 7) r"):
                got.append(orjson.loads(line))
            receipts = [row["receipt"] for row in got]
            world.rows("select ack('c', %s)", receipts)
            return len(got) >= 63

        eventually(more, "all of them")
        world.consumer("late", mode="fifo", topics=["invoices"], start="earliest")
        world.run_program("consumers", "apply")
        late = "select m.seq from waiting w, unnest(w.seqs) as m (seq) where consumer_id = 2 order by w.ord, m.seq"
        eventually(lambda: len(world.rows(late)) == 63, "the late one is filled")
    by_key: dict[str | None, list[int]] = defaultdict(list)
    for row in got:
        by_key[row["key"]].append(row["seq"])
    assert all(found == sorted(found) for found in by_key.values())
    truncated = next(n for n, row in enumerate(got) if row["data"]["op"] == "truncate")
    assert all(row["seq"] < got[truncated]["seq"] for row in got[:truncated])
    assert all(row["seq"] > got[truncated]["seq"] for row in got[truncated + 1 :])
    assert world.value("select count(*) from waiting where consumer_id = 2 and barrier") == 1
