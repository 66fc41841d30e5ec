"""JSON that PostgreSQL stores and parsers refuse: a document concerns its own message, whoever reads the log and how."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.test_published import emit
from tests.world import World, eventually

DOCUMENTS = {
    "NUL": r'{"a": ["\u0000"]}',
    "NUL in a name": r'{"\u0000": 1}',
    "half a pair": r'"\ud800"',
    "the other half": r'{"a": "x\udc00"}',
    "huge exponent": '{"a": 1e400}',
    "1,500 arrays": "[" * 1500 + "]" * 1500,
    "6,000 arrays": '{"a": ' + "[" * 6000 + "]" * 6000 + "}",
    "long integer": '{"a": ' + "7" * 200 + "}",
    "same names": '{"a": 1, "a": 2}',
    "escapes": r'{"a": "\\u0000 \\\\ud800"}',
    "ordinary": '{"a": 1}',
}
TOTAL = 3 * len(DOCUMENTS)  # in rows, published, and emitted
CONSUMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ordered": {"mode": "fifo"},
    "keyed": {"mode": "fifo", "key": ["j"]},
    "keyed_by_two": {"key": ["j", "id"]},
    "filtered": {"filter": "record.id >= 0"},
    "filtered_by_value": {"filter": "record.j.a == 1"},
    "included": {"columns": {"include": ["id", "j"]}},
    "excluded": {"columns": {"exclude": ["j"]}},
    "limited": {"max_message_bytes": "200B"},
    "group": {"mode": "stream"},
    "compacting": {"mode": "stream", "compact": True},
}
REASONS = ("undecodable: ", "filter_error: ", "oversized: ")


def settings(**more: Any) -> dict[str, Any]:
    return {"tables": ["public.t"], "topics": ["invoices"], "start": "earliest", **more}


def put(world: World) -> None:
    for number, document in enumerate(DOCUMENTS.values()):
        world.sql.execute("insert into t values (%s, %s)", (number, document))
        data = f'{{"id": {number}, "j": {document}}}'
        world.sql.execute("select cdcbridge.publish('invoices', %s, %s::json)", (str(number), data))
        emit(world, f'{{"key": {number}, "data": {data}}}')


def drain(world: World, name: str) -> tuple[int, list[str]]:
    """How many messages a consumer is delivered, and the reasons of those that died."""
    delivered = 0
    if CONSUMERS[name].get("mode") == "stream":
        read = "select partition, seq, receipt from read_stream(%s, 100, '1 min')"
        while rows := world.rows(read, name):
            world.rows("select commit_offset(%s, %s, %s, %s)", name, *rows[-1])
            delivered += len(rows)
        return delivered, []
    receive = "select receipt, octet_length(data::text) from receive(%s, 1000)"
    while rows := world.rows(receive, name):
        assert world.value("select nack(%s, %s, '0')", name, [rows[-1][0]]) == 1
        assert world.value("select ack(%s, %s)", name, [receipt for receipt, _ in rows[:-1]]) == len(rows) - 1
        delivered += len(rows) - 1
        for receipt, _ in world.rows("select receipt, octet_length(data::text) from receive(%s, 1000)", name):
            delivered += world.value("select ack(%s, %s)", name, [receipt])
    dead = "select reason from dead_messages d join consumers c on c.id = d.consumer_id where c.name = %s"
    return delivered, [reason for (reason,) in world.rows(dead, name)]


def check(world: World, total: int) -> None:
    """Each consumer gets each message or has it as a dead letter with a reason."""
    for name, given in CONSUMERS.items():
        delivered, reasons = drain(world, name)
        assert all(reason.startswith(REASONS) for reason in reasons), (name, reasons)
        if not str(given.get("filter", "")).endswith("== 1"):
            assert delivered + len(reasons) == total, (name, delivered, reasons)
        assert delivered, name


@pytest.mark.timeout(300)
def test_a_document_concerns_its_own_message(world: World) -> None:
    world.execute("create table t (id int primary key, j json)", "alter table t replica identity full")
    world.consumer("first", **settings())
    with world.bridge():
        put(world)
        eventually(lambda: world.value("select count(*) from messages") == TOTAL, "all is logged")
    world.consumers = [{"name": name, **settings(**given)} for name, given in CONSUMERS.items()]
    with world.bridge():  # the new ones are filled from the log
        check(world, TOTAL)
        world.execute("delete from cdcbridge.dead_messages")
        world.execute("delete from t")
        eventually(lambda: world.value("select count(*) from messages") == TOTAL + len(DOCUMENTS), "the rows are gone")
        put(world)
        eventually(
            lambda: world.value("select count(*) from messages") == 2 * TOTAL + len(DOCUMENTS), "all is logged again"
        )
        check(world, TOTAL + len(DOCUMENTS))
        lag = world.json("lag", "--json")
        assert {c["name"]: c["pending"] for c in lag["consumers"] if c["name"] != "first"} == dict.fromkeys(
            CONSUMERS, 0
        )
        for name in ("keyed", "filtered"):
            dead = world.json("dead", "list", name, "--json")
            assert world.value("select redrive(%s)", name) == len(dead) > 0
            replayed = world.json("consumers", "replay", name, "--from", "earliest")
            assert replayed["replayed"] > 0
            assert len(world.rows("select seq from peek(%s, 500)", name)) == len(dead) + replayed["replayed"]
            drain(world, name)
    world.execute("select setval('cdcbridge.messages_seq', 1000000)", "select cdcbridge.create_segments()")
    (retention,) = world.rows("select dropped, lost, expired > 0 from drop_segments('0', '0')")
    assert retention == (1, 0, True), "what the first consumer has not finished is dead; the rest was compacted"
    kept = {key for (key,) in world.rows("select key from messages where topic = 'invoices'")}
    assert kept == {*map(str, range(len(DOCUMENTS)))}
