"""Server encodings: each one gives the same rows and changes, or is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import CheckFailed
from tests.harness.world import NewDatabase, World, eventually, fresh_database

# An encoding, and a word in its own script.
WORDS = {
    "LATIN1": "Café", "LATIN2": "Łódź", "LATIN3": "Ħaż", "LATIN4": "Ķēniņš", "LATIN5": "Şişli", "LATIN6": "Þingŋ",
    "LATIN7": "Ūģis", "LATIN8": "ŴŷḂ", "LATIN9": "Œuvre", "LATIN10": "Știință", "WIN1250": "Łódź", "WIN1251": "Москва",
    "WIN1252": "Œuvre", "WIN1253": "Αθήνα", "WIN1254": "Şişli", "WIN1255": "שלום", "WIN1256": "عربي", "WIN1257": "Ūģis",
    "WIN1258": "Đưa", "WIN866": "Москва", "WIN874": "ไทย", "KOI8R": "Москва", "KOI8U": "Київ", "ISO_8859_5": "Москва",
    "ISO_8859_6": "عربي", "ISO_8859_7": "Αθήνα", "ISO_8859_8": "שלום", "EUC_JP": "日本語テ", "EUC_CN": "中文", "EUC_KR": "한국",
    "EUC_TW": "中文", "EUC_JIS_2004": "日本語", "UTF8": "日本é🐘",
}  # fmt: skip
OPTIONS = "encoding '{}' locale 'C' template template0"


@pytest.fixture
def new_database() -> NewDatabase:
    """Empty ones: a refusal must leave nothing behind."""
    return fresh_database


def encoded(server: EmbeddedServer, encoding: str) -> Any:
    return fresh_database(server, OPTIONS.format(encoding))


def schema(word: str) -> list[str]:
    return [
        f'create schema "{word}"',
        f"""create type "{word}"."t {word}" as enum ('{word}', 'x')""",
        f'create table "{word}"."{word}" (id text primary key, "c {word}" text, e "{word}"."t {word}", a text[], j json)',
    ]


def row(word: str, key: str) -> str:
    return (
        f"""insert into "{word}"."{word}" values ('{word}{key}', '{word}', '{word}', array['{word}', '"{word}'],"""
        f""" '{{"{word}": ["{word}"]}}')"""
    )


def try_all(world: World, word: str, encoding: str) -> None:
    """Rows, changes, keys, filters and published messages with this word everywhere."""
    topic = f"{word}.{word}"
    world.execute(*schema(word), row(word, "0"))
    world.consumer("c", (topic,), topics=[word], start="snapshot", filter=f"record['c {word}'] == '{word}'")
    world.consumer("k", (topic,), key=[f"c {word}"], operations=["insert"])
    world.execute(f'alter table "{word}"."{word}" replica identity full')
    with world.bridge():
        world.messages(1)
        world.execute(
            row(word, "1"),
            f"""insert into "{word}"."{word}" values ('other', 'other')""",
            f"""update "{word}"."{word}" set e = 'x' where id = '{word}1'""",
            f"""delete from "{word}"."{word}" where id = '{word}1'""",
        )
        content = json.dumps({"key": word, "data": {word: word}}, ensure_ascii=False)
        world.sql.execute("select pg_logical_emit_message(true, %s, %s)", (f"cdcbridge:{word}", content))
        rows = world.messages(6, "select topic, key, data::text, partition from messages order by seq")
    found = [(t, key, json.loads(data)) for t, key, data, _ in rows]
    read, insert, other, update, delete, message = found
    whole = {"id": f"{word}0", f"c {word}": word, "e": word, "a": [word, f'"{word}'], "j": {word: [word]}}
    assert read[:2] == (topic, f"{word}0") and read[2]["record"] == whole, encoding
    assert insert[:2] == (topic, f"{word}1") and insert[2]["record"] == {**whole, "id": f"{word}1"}
    assert update[2]["record"] == {**whole, "id": f"{word}1", "e": "x"} and update[2]["old"] == insert[2]["record"]
    assert delete[1] == f"{word}1" and delete[2]["record"] == update[2]["record"]
    assert other[1] == "other"
    assert message[:2] == (word, word) and message[2]["record"] == {word: word}
    # The SQL function and the bridge put a key into the same partition.
    assert all(world.value("select partition_of(%s, 16)", key) == p for _, key, _, p in rows)
    got = world.run_program("receive", "c", "-n", "10", "--ack").stdout.splitlines()
    assert [json.loads(line)["key"] for line in got] == [f"{word}0", *[f"{word}1"] * 3, word]
    assert {json.loads(line)["key"] for line in world.run_program("receive", "k").stdout.splitlines()} == {
        word,
        "other",
    }
    assert world.rows("select reason from dead_messages") == []


@pytest.mark.parametrize("encoding", WORDS)
def test_an_encoding_gives_the_same_rows_and_changes(pg15: EmbeddedServer, tmp_path: Path, encoding: str) -> None:
    with encoded(pg15, encoding) as database:
        world = World(pg15, database, "auto", tmp_path)
        try_all(world, WORDS[encoding], encoding)
        world.close()


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1251", "EUC_JP", "EUC_TW", "ISO_8859_8"])
def test_an_encoding_on_18_with_a_store_of_utf8(
    pg15: EmbeddedServer, pg18: EmbeddedServer, tmp_path: Path, encoding: str
) -> None:
    with encoded(pg18, encoding) as database, fresh_database(pg15) as store:
        world = World(pg18, database, "pgoutput", tmp_path)
        world.store_dsn = pg15.dsn(store)
        world.execute(f"alter database {database} set client_encoding = '{encoding}'")
        with psycopg.connect(pg15.dsn(store), autocommit=True) as admin:
            admin.execute(f"alter database {store} set client_encoding = 'LATIN1'".encode())
        try_all(world, WORDS[encoding], encoding)
        world.close()


def refused(world: World, *parts: str) -> None:
    """`check` and `run` say it in the same words, and nothing was written."""
    check = world.run_program("check", "--json")
    assert check.returncode == 2, check.stderr
    problems = json.loads(check.stdout)["problems"]
    assert len(problems) == 1, problems
    assert all(part in problems[0]["message"] + problems[0]["fix"] for part in parts), problems
    run = world.run_program("run", "--no-wait")
    assert run.returncode == 2 and problems[0]["message"] in run.stderr and problems[0]["fix"] in run.stderr, run.stderr
    assert isinstance(world.bridge_error(), CheckFailed)


def absent(dsn: str) -> bool:
    with psycopg.connect(f"{dsn} client_encoding=SQL_ASCII") as connection:
        return connection.execute(b"select to_regnamespace('cdcbridge')").fetchone() == (None,)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "MULE_INTERNAL"])
def test_an_encoding_without_conversion_is_refused(world: World, tmp_path: Path, encoding: str) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with encoded(world.server, encoding) as database:
        other = World(world.server, database, world.plugin, tmp_path)
        with psycopg.connect(f"{other.dsn} client_encoding=SQL_ASCII", autocommit=True) as admin:
            admin.execute(b"create table t\xe9 (id int primary key)")
        other.consumer(tables=("public.*",))
        other.store_dsn = world.dsn
        refused(other, "source", encoding, "encoding 'UTF8'")
        world.store_dsn = other.dsn
        refused(world, "store", encoding, "encoding 'UTF8'")
        assert world.run_program("migrate").returncode == 2
        assert absent(world.dsn) and absent(other.dsn)
        other.close()


def test_a_store_that_lacks_characters_of_the_source_is_refused(world: World, tmp_path: Path) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with encoded(world.server, "LATIN1") as narrow, encoded(world.server, "LATIN2") as other:
        world.store_dsn = world.server.dsn(narrow)
        refused(world, "LATIN1", "UTF8", "create database")
        latin2 = World(world.server, other, "pgoutput", tmp_path)
        latin2.execute("create table t (id int primary key)")
        latin2.consumer()
        latin2.store_dsn = world.store_dsn
        refused(latin2, "LATIN1", "LATIN2")
        assert absent(world.store_dsn)
        latin2.close()


def test_wal2json_takes_utf8_alone_and_auto_knows_it(pg15: EmbeddedServer, tmp_path: Path) -> None:
    with encoded(pg15, "EUC_JP") as database, fresh_database(pg15) as store:
        world = World(pg15, database, "wal2json", tmp_path)
        world.store_dsn = pg15.dsn(store)
        world.execute("create table t (id int primary key)")
        world.consumer()
        refused(world, "EUC_JP", "source.plugin to pgoutput")
        assert absent(world.store_dsn)
        world.plugin = "auto"
        assert world.json("check", "--json")["ok"]
        world.close()


def test_texts_of_the_file_that_an_encoding_lacks(pg15: EmbeddedServer, tmp_path: Path) -> None:
    with encoded(pg15, "LATIN1") as database:
        world = World(pg15, database, "pgoutput", tmp_path)
        world.execute("create table t (id int primary key)")
        world.consumer(tables=("public.日本",))
        refused(world, "'public.日本'", "LATIN1")
        world.consumer(topics=["日本"])
        refused(world, "'日本'", "LATIN1")
        world.consumer(filter="record.id == '日本'")
        refused(world, "日本", "LATIN1")
        world.consumer()
        world.execute("set client_min_messages = warning")
        assert world.json("check", "--json")["ok"]
        world.close()


def test_malformed_messages_stop_nothing_in_any_encoding(pg15: EmbeddedServer, tmp_path: Path) -> None:
    with encoded(pg15, "LATIN1") as database:
        world = World(pg15, database, "pgoutput", tmp_path)
        world.execute("create table t (id int primary key)")
        world.consumer(tables=("public.t",), topics=["x"])
        bad = [b"\xe9 is no JSON", b"[]", b'{"data": 1, "more": "\xe9"}', b"\x80\x81", b'{"data": "\xf0\x9f\x90\x98"}']
        with world.bridge():
            for content in bad:
                world.sql.execute("select pg_logical_emit_message(true, 'cdcbridge:x', %s::bytea)", (content,))
            world.execute("insert into t values (1)")
            eventually(lambda: world.value("select count(*) from messages") == 6, "all arrive")
        assert world.value("select count(*) from dead_messages where starts_with(reason, 'undecodable: ')") == 4
        world.close()
