"""One message is one line, whatever JSON and whatever locale; and what PostgreSQL stores can be received and acked."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from cdcbridge import Queue
from cdcbridge.cli.receipts import read_receipts
from cdcbridge.errors import UnreadableData, UsageError
from tests.harness.programs import complete
from tests.harness.world import World, clean_environment, eventually

# JSON that PostgreSQL stores, and that parsers refuse, spoil or spread over lines.
DOCUMENTS = {
    "half a pair": r'"\ud800"',
    "the other half": r'{"a": "\udc00", "receipt": "no"}',
    "NUL": r'["\u0000"]',
    "huge exponent": "[1e400, -1e400, 1E+999999]",
    "huge integer": "[" + "9" * 5000 + "]",
    "deep": "[" * 5000 + "]" * 5000,
    "deep objects": '{"receipt":' * 3000 + "1" + "}" * 3000,
    "lines": '{\n  "a":\r\n [1,\n 2]\r}',
    "line ends": '"a\u2028b\u2029c\u0085d"',
    "same names": '{"a": 1, "a": 2}',
    "escapes": r'"\\\"}{][ \\u0000 \/"',
    "unicode": '"é日🐘"',
    "empty": '""',
}
LOCALES = (
    {"LANG": "C", "LC_ALL": "C"},
    {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "latin1"},
    {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"},
)


def program(world: World, *arguments: str, stdin: bytes = b"", environment: dict[str, str] | None = None) -> bytes:
    arguments = ("-c", str(world.write_config()), *arguments)
    if environment is None:
        result = complete(arguments, clean_environment(), stdin=stdin, timeout=120)
    else:  # Python looks at it when it starts
        result = subprocess.run(
            [sys.executable, "-m", "cdcbridge", *arguments],
            input=stdin, capture_output=True, timeout=120, check=False, env={**clean_environment(), **environment},
        )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


def arrived(world: World, count: int) -> None:
    """Psycopg's own parser cannot read these, so nothing but their number is looked at."""
    eventually(lambda: world.value("select count(*) from messages") >= count, f"{count} messages in the log")
    assert world.value("select count(*) from messages") == count


def insert(world: World) -> None:
    for number, document in enumerate(DOCUMENTS.values()):
        world.sql.execute("insert into t values (%s, %s)", (number, document))


def receipts(output: bytes) -> list[str]:
    """Of lines that Python's parser may not be able to read."""
    return list(read_receipts(output.splitlines()))


def test_every_document_is_one_line_and_can_be_acked(world: World) -> None:
    world.execute("create table t (id int primary key, j json)")
    world.consumer(start="snapshot", topics=["x"], visibility_timeout="10m")
    insert(world)
    with world.bridge():
        arrived(world, len(DOCUMENTS))
        world.execute("update t set id = id + 100")
        arrived(world, 2 * len(DOCUMENTS))  # what is published goes straight into the log, and would overtake them
        for document in DOCUMENTS.values():
            world.rows("select publish('x', 'é', %s)", document)
        arrived(world, 3 * len(DOCUMENTS))
    expected = 3 * len(DOCUMENTS)
    for environment in LOCALES:
        output = program(world, "peek", "c", "-n", "100", environment=environment)
        assert output.count(b"\n") == expected == len(output.decode().splitlines())
        assert '"é日🐘"'.encode() in output
    output = program(world, "receive", "c", "-n", "100", environment=LOCALES[1])
    assert output.count(b"\n") == expected == len(output.decode().splitlines())
    (plain, reformatted, sorted_) = output.splitlines()[:3]
    assert "unicode" not in plain.decode() and json.loads(output.splitlines()[-1])["data"]["record"] == ""
    jq = json.dumps(json.loads(reformatted.replace(rb"\udc00", b"")), indent=2).encode()
    moved = json.dumps(json.loads(sorted_), sort_keys=True).encode()
    lines = b"\n".join([plain, jq, moved, *output.splitlines()[3:]])
    assert json.loads(program(world, "ack", "c", "-", stdin=lines, environment=LOCALES[3])) == {"acked": expected}


def test_columns_that_are_left_out_are_left_out_beside_any_document(world: World) -> None:
    world.execute("create table t (id int primary key, j json, secret text)")
    world.consumer(columns={"exclude": ["secret"]})
    with world.bridge():
        insert(world)
        world.execute("update t set secret = 'hush', id = id + 100")
        arrived(world, 2 * len(DOCUMENTS))
    output = program(world, "receive", "c", "-n", "100")
    assert output.count(b"\n") == 2 * len(DOCUMENTS) and b"hush" not in output
    for document in DOCUMENTS.values():
        if "\n" not in document and "\u2028" not in document and r"\\" not in document:
            assert output.count(document.encode()) >= 2, document
    assert json.loads(program(world, "ack", "c", "-", stdin=output)) == {"acked": 2 * len(DOCUMENTS)}
    assert world.value("select count(*) from dead_messages where consumer_id = (consumer_named('c')).id") == 0


def test_a_stream_reads_on_and_compaction_goes_on(world15: World) -> None:
    world15.execute("create table t (id int primary key, j json)")
    world15.consumer("s", mode="stream", operations=["insert", "update"])
    world15.consumer("all", mode="stream", compact=True)
    with world15.bridge():
        insert(world15)
        world15.execute("delete from t", "insert into t values (1, '1')")
        arrived(world15, 2 * len(DOCUMENTS) + 1)
    read: list[Any] = []
    while rows := world15.rows("select seq, partition, receipt from read_stream('s', 100, '1 min')"):
        read += rows
        world15.rows("select commit_offset('s', %s, %s, %s)", rows[-1][1], rows[-1][0], rows[-1][2])
    assert len(read) == len(DOCUMENTS) + 1
    assert world15.value("select count(*) from compaction_candidates(1 << 30)") == len(DOCUMENTS)


def test_filters_make_dead_letters_and_replays_and_new_consumers_go_on(world: World) -> None:
    world.execute("create table t (id int primary key, j json)")
    world.execute("alter table t replica identity full")
    reading = "record.id >= 0 && has(record.j)"
    world.consumer(filter=reading)
    world.consumer("plain")
    world.consumer("id_only", filter="record.id >= 0")
    with world.bridge():
        world.execute("insert into t values (-1, '1')")
        insert(world)
        arrived(world, 1 + len(DOCUMENTS))
        before = world.value("select count(*) from dead_messages where reason like 'filter_error: %%'")
        assert 0 < before < len(DOCUMENTS)
        assert world.value(
            "select count(*) from consumer_messages where consumer_id = (consumer_named('id_only')).id"
        ) == len(DOCUMENTS), "a filter that does not read the document does not fail on it"
        world.consumer("late", start="earliest", filter=reading)
        world.consumer("late_id_only", start="earliest", filter="record.id >= 0")
        world.consumer("keyed", start="earliest", key=["j"], mode="fifo")
        world.run_program("consumers", "apply")
        eventually(lambda: world.value("select count(*) from consumers") == 6, "they are there")
        for name in ("late", "keyed", "late_id_only"):
            ids = world.value(
                "select count(*) from consumer_messages where consumer_id = (consumer_named(%s)).id", name
            )
            dead = world.value("select count(*) from dead_messages where consumer_id = (consumer_named(%s)).id", name)
            if name != "keyed":  # its key may lie in the document
                assert dead == (before if name == "late" else 0)
            assert ids + dead == len(DOCUMENTS) + (name == "keyed"), (name, ids, dead)
        assert program(world, "receive", "keyed", "--ack", "-n", "100").count(b"\n") > 0
        replayed = json.loads(program(world, "consumers", "replay", "keyed", "--from", "earliest"))
        assert replayed["replayed"] > 0
        redriven = json.loads(program(world, "dead", "redrive", "late"))
        assert redriven == {"redriven": 0, "not_wanted": 0, "undecidable": before}
        ids = [
            str(i)
            for (i,) in world.rows("select id from dead_messages where consumer_id = (consumer_named('late')).id")
        ]
        assert json.loads(program(world, "dead", "redrive", "late", *ids)) == {"redriven": before}
    ids = [str(i) for (i,) in world.rows("select id from dead_messages where consumer_id = (consumer_named('c')).id")]
    shown = program(world, "dead", "show", "c", *ids)
    assert shown.count(b"\n") == before


def test_the_client_receives_what_python_cannot_parse(world: World) -> None:
    world.execute("create table t (id int primary key, j json)")
    world.consumer()
    with world.bridge():
        insert(world)
        arrived(world, len(DOCUMENTS))
    with Queue.connect(world.dsn, consumer="c") as queue:
        messages = queue.receive(100)
        assert len(messages) == len(DOCUMENTS)
        by_name = dict(zip(DOCUMENTS, messages, strict=True))
        assert by_name["half a pair"].data["record"]["j"] == "\ud800"
        assert by_name["NUL"].data["record"]["j"] == ["\0"]
        assert by_name["unicode"].data["record"]["j"] == "é日🐘"
        with pytest.raises(UnreadableData, match=r"message \d+ of public\.t") as raised:
            _ = by_name["deep"].data
        assert "raw" in str(raised.value.hint)
        assert by_name["deep"].raw.count("[") >= 5000
        assert queue.ack(messages) == len(messages)


def test_published_messages_with_odd_keys_stop_nothing(world: World) -> None:
    world.consumer(tables=(), topics=["x"], key=["a"])
    contents = [
        r'{"key": "a\u0000b", "data": 1}', r'{"data": {"a": "\u0000"}}', r'{"data": "\ud800"}',
        '{"data": ' + "[" * 1010 + "]" * 1010 + "}", '{"data":' + "[" * 5000 + "]" * 5000 + "}",
        '{"data":\n{"a":\r\n"line"}\n}', '{"data": {"a": 1e400}}', '{"data": {"a": [1, 2]}}', '{"data": {"a": null}}',
    ]  # fmt: skip
    with world.bridge():
        for content in contents:
            world.sql.execute("select pg_logical_emit_message(true, 'cdcbridge:x', %s)", (content,))
        arrived(world, len(contents))
    dead = world.value("select count(*) from dead_messages where reason like 'undecodable: %%'")
    keys = [key for (key,) in world.rows("select key from receive('c', 100)")]
    assert len(keys) + dead == len(contents)
    assert {"line", "1e400", "[1, 2]", r'"\u0000"', None} <= set(keys)


def test_receipts_are_found_in_what_tools_make_of_lines() -> None:
    lines = [
        b'{"receipt":"1.2","data":{"receipt":"no"}}', b"", b"  3.4\r", b'"5.6"', b"{", b'  "data": {"receipt": "no",',
        b'    "x": ["receipt"]},', b'  "receipt" : "7.\\u0038"', b"}", b'{"data":{"a":"\\ud800\xff"},"receipt":"9.0"}',
    ]  # fmt: skip
    assert list(read_receipts(lines)) == ["1.2", "3.4", "5.6", "7.8", "9.0"]
    for bad in (
        b"{}",
        b'{"receipt":null}',
        b'{"receipt":1}',
        b'{"receipt":"x"',
        b'{"data":{"receipt":"x"}}',
        b"null",
        b'"x',
    ):
        with pytest.raises(UsageError, match="line 1: not a"):
            list(read_receipts([bad]))
