"""JSON that PostgreSQL stores and parsers refuse: a document concerns its own message, whoever reads the log and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from cdcbridge.backfill.verify import verify
from tests.harness.forked import command
from tests.harness.world import PATIENCE, World, eventually
from tests.integration.test_monitor import free_port, get, samples
from tests.integration.test_published import emit

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
NOT_JSONB = ("NUL", "NUL in a name", "half a pair", "the other half")  # a jsonb column refuses these itself
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
    world.execute("select setval('cdcbridge.messages_seq', 1000000)", "select cdcbridge_internal.create_segments()")
    (retention,) = world.rows("select dropped, lost, expired > 0 from drop_segments('0', '0')")
    assert retention == (1, 0, True), "what the first consumer has not finished is dead; the rest was compacted"
    kept = {key for (key,) in world.rows("select key from messages where topic = 'invoices'")}
    assert kept == {*map(str, range(len(DOCUMENTS)))}


OPTIONS = {
    "format 2": {"format-version": "2", "include-pk": "1"},
    "format 1": {"include-pk": "1"},
    "without types": {"format-version": "2", "include-pk": "1", "include-types": "0"},
    "pretty": {"pretty-print": "1", "include-pk": "1", "include-type-oids": "1"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_decode_bears_them_all(world15: World, options: dict[str, str]) -> None:
    """The plugin writes such a document into a string, where `decode` leaves it as it stands."""
    slot = f"{world15.slot}_decode"
    world15.execute("create table t (id int primary key, j json)", "alter table t replica identity full")
    world15.value("select lsn from pg_create_logical_replication_slot(%s, 'wal2json')", slot)
    for number, document in enumerate(DOCUMENTS.values()):
        world15.sql.execute("insert into t values (%s, %s)", (number, document))
    world15.execute("update t set id = id + 100", "delete from t")
    flat = [part for option in options.items() for part in option]
    query = f"select data from pg_logical_slot_get_changes(%s, null, null{', %s' * len(flat)})"
    text = "\n".join(data for (data,) in world15.rows(query, slot, *flat))
    decoded = world15.run_program("decode", "--plugin", "wal2json", stdin=text)
    assert decoded.returncode == 0, decoded.stderr
    lines = decoded.stdout.splitlines()
    assert len(lines) == 3 * len(DOCUMENTS)
    for number, document in enumerate(DOCUMENTS.values()):
        value = document if options.get("include-types") != "0" else orjson.dumps(document).decode()
        for line, key in zip(lines[number :: len(DOCUMENTS)], (number, number + 100, number + 100), strict=True):
            assert f'"record":{{"id":{key},"j":{value}}}' in line, (number, line[:200])


def settled_in(found: dict[str, float]) -> set[float]:
    """How many messages /metrics knows of, waiting or dead, for each consumer that takes all of them."""
    return {
        found.get(f"cdcbridge_consumer_pending_messages{{{labels}}}", 0)
        + found.get(f"cdcbridge_consumer_dead_messages{{{labels}}}", 0)
        for name in ("plain", "ordered", "keyed", "included", "excluded", "limited", "group")
        for labels in [f"consumer={name},mode={CONSUMERS[name].get('mode', 'queue')}"]
    }


def test_metrics_and_verify_bear_them_all(world: World) -> None:
    """`/metrics` counts what waits, and `verify` compares the tables row by row."""
    port = free_port()
    world.top_settings["http"] = {"listen": f"127.0.0.1:{port}"}
    world.execute("create table t (id int primary key, j json)", "alter table t replica identity full")
    world.execute("create table b (id int primary key, j jsonb)")
    world.consumers = [{"name": name, **settings(**given)} for name, given in CONSUMERS.items()]
    world.consumer("all", tables=("public.t", "public.b"), start="snapshot")
    process = world.start_process()
    eventually(world.active, "it streams")
    put(world)
    held = [document for name, document in DOCUMENTS.items() if name not in NOT_JSONB]
    for number, document in enumerate(held):
        world.sql.execute("insert into b values (%s, %s)", (number, document))
    eventually(lambda: world.value("select count(*) from messages") == TOTAL + len(held), "all is logged")
    eventually(lambda: settled_in(samples(get(port, "/metrics")[1])) == {TOTAL}, "the metrics tell what waits")
    for table, rows in (("public.t", len(DOCUMENTS)), ("public.b", len(held))):
        found = verify(world.config(), table)
        assert found.ok and found.rows == rows and not found.notes, found
    world.execute("update cdcbridge.messages set data = replace(data::text, '\"x', '\"y')::json where key = '3'")
    assert verify(world.config(), "public.t").different == ("3",)
    process.terminate()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (r'"\u0000abc"', r"\u0000abc"), (r'"\u0000\u00001e400"', r"\u0000\u00001e400"), (r'"a\u0000"', r"a\u0000"),
        (r'"\ud800"', "not JSON"), ("[1e400]", "an array or an object"), ('{"a": 1}', "an array or an object"),
        ("[" * 1500 + "]" * 1500, "not JSON"),
    ],
    ids=["NUL first", "twice", "NUL", "half a pair", "array", "object", "1,500 arrays"],
)  # fmt: skip
def test_decode_bears_what_no_plugin_writes(tmp_path: Path, value: str, expected: str) -> None:
    """The output has the value as it was, or an error names the place."""
    file = tmp_path / "changes"
    line = '{"action": "I", "schema": "s", "table": "t", "columns": [{"name": "a", "type": "text", "value": %s}]}'
    file.write_text(line % value)
    result = command(["decode", "--plugin", "wal2json", str(file)])
    if result.code == 0:
        assert orjson.loads(result.out)["data"]["record"] == {"a": orjson.loads(f'"{expected}"')}
    else:
        assert result.code == 2 and f"{file}: wal2json:".encode() in result.err and expected.encode() in result.err
