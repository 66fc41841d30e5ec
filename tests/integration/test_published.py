"""Messages that applications write into the WAL, and order by key, through the bridge."""

from __future__ import annotations

import random
import re
import socket
import urllib.request
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from tests.harness.world import World, eventually


def emit(world: World, content: str, *, topic: str = "invoices", transactional: bool = True) -> None:
    world.sql.execute("select pg_logical_emit_message(%s, %s, %s)", (transactional, f"cdcbridge:{topic}", content))


def received(world: World, count: int) -> list[dict[str, Any]]:
    """So many messages, received and acked."""
    got: list[dict[str, Any]] = []

    def more() -> bool:
        for (line,) in world.rows("select to_json(r)::text from receive('c', 100) r"):
            got.append(orjson.loads(line))
        world.rows("select ack('c', %s)", [row["receipt"] for row in got])
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


def assert_logged(world: World, words: tuple[str, ...]) -> None:
    """A line of the bridge's log has all of the words."""
    eventually(lambda: [one for one in world.log().splitlines() if all(word in one for word in words)], words[0])


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_message_in_the_wal_waits_for_its_time(world15: World, mode: str) -> None:
    """In fifo its key waits with it, also for messages that the same transaction wrote behind it."""
    world15.consumer(tables=(), topics=["invoices"], mode=mode, visibility_timeout="10m")
    late = datetime.now(UTC) + timedelta(hours=1)
    with world15.bridge():
        with world15.sql.transaction():
            emit(world15, '{"key": 1, "data": "first"}')
            emit(world15, f'{{"key": 2, "data": "late", "deliver_at": "{late.isoformat()}"}}')
            for number in range(200):
                emit(world15, f'{{"key": {number % 3}, "data": {number}}}')
            emit(world15, '{"key": 4, "data": "past", "deliver_at": "2020-01-01T00:00:00Z"}')
            emit(world15, '{"key": 5, "data": "null", "deliver_at": null}')
            emit(world15, '{"key": 6, "data": "never", "deliver_at": "9999-01-01T00:00:00+00:00"}')
            emit(world15, '{"key": 7, "data": "here", "deliver_at": "2030-01-01 10:00"}')
        got = received(world15, 203 if mode == "queue" else 203 - 66)
        assert {row["key"] for row in got} == {"0", "1", "4", "5", *(["2"] if mode == "queue" else [])}
        assert "late" not in [row["data"]["record"] for row in got]
        table, column = ("waiting", "not_before") if mode == "fifo" else ("delayed", "visible_at")
        assert world15.value(f"select max({column}) from {table}") == late
        world15.execute(
            f"update cdcbridge_internal.{table} set {column} = now() - interval '1 s' where {column} is not null"
        )
        rest = received(world15, 1 if mode == "queue" else 67)
        assert rest[0]["data"]["record"] == "late"
        assert [row["seq"] for row in rest] == sorted(row["seq"] for row in rest)
        reasons = sorted(reason for (reason,) in world15.rows("select reason from dead_messages"))
        assert [reason.split(",")[0] for reason in reasons] == [
            "undecodable: deliver_at is 9999-01-01T00:00:00+00:00",
            "undecodable: deliver_at is not a time with its zone",
        ]


def test_what_is_not_delivered_of_the_wal_is_logged_and_counted(world: World) -> None:
    """A stream has no dead letters: it reads what is malformed, marked as such."""
    world.consumer(tables=(), topics=["invoices"])
    world.consumer("audit", (), topics=["invoices"], mode="stream", start="earliest")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    world.top_settings["http"] = {"listen": address}
    world.start_process()
    eventually(world.active, "the bridge streams")
    for _ in range(2):
        emit(world, '{"data": 1, "more": 2}')
    emit(world, '{"data": 1}', topic="invoicse")
    emit(world, '{"data": 1}', transactional=False)
    emit(world, '{"data": "good"}')
    world.messages(3)
    (bad, _, good) = [row[0] for row in world.rows("select data from peek_stream('audit') order by seq")]
    assert bad == {
        "op": "message", "record": '{"data": 1, "more": 2}', "old": None, "unchanged": [],
        "malformed": 'expected {"key": ..., "data": ..., "deliver_at": ...}',
    }  # fmt: skip
    assert good == {"op": "message", "record": "good", "old": None, "unchanged": []}
    for words in (
        ("published.malformed", "topic=invoices", "expected {"),
        ("published.unlisted", "topic=invoicse", "no consumer lists the topic"),
        ("published.outside", "topic=invoices", "not transactional"),
    ):
        assert_logged(world, words)

    def counted() -> dict[str, str]:
        text = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
        return dict(re.findall(r'cdcbridge_wal_messages_not_delivered_total\{.*?kind="(\w+)".*?\} ([0-9.]+)', text))

    eventually(
        lambda: counted() == {"malformed": "2.0", "unlisted": "1.0", "outside": "1.0"}, "all of them are counted"
    )


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
