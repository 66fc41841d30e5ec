"""`check` and `run` refuse a filter that kills or drops everything, by the catalogue of a real server."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.source.tables import find_tables
from tests.harness.world import World, fresh_database

KINDS = {"string": "text", "object": "any", "array": "list"}
VALUES = {
    "a": "1::int2", "b": "1::int8", "c": "1.5::numeric", "d": "1.5::float4", "e": "true", "f": "'x'::text", "g": "'x'::char(3)",
    "h": "now()", "i": "now()::date", "j": "'1 day'::interval", "k": "'1.5'::money", "l": "'{1}'::int[]", "m": "'10.0.0.1'::inet",
    "n": "gen_random_uuid()", "o": "'\\x01'::bytea", "p": "'(1,2)'::point", "q": "'[1,2)'::int4range", "r": "'paid'::state",
    "s": "'{\"a\": 1}'::jsonb", "t": "'[1]'::json", "u": "1::oid", "v": "'x'::name", "w": "'1'::bit", "x": "'{paid}'::state[]",
    "y": "5::positive", "z": "5::more_positive", "b2": "'a'::tsvector", "c2": "'\"x\"'::jsonb",
}  # fmt: skip


@pytest.mark.parametrize("server", ["pg15", "pg18"])
def test_the_kind_of_a_column_is_that_of_its_json(server: str, request: pytest.FixtureRequest) -> None:
    running: EmbeddedServer = request.getfixturevalue(server)
    with fresh_database(running) as database, psycopg.connect(running.dsn(database), autocommit=True) as session:
        session.execute("create type state as enum ('open', 'paid')")
        session.execute("create domain positive as int check (value > 0); create domain more_positive as positive")
        session.execute(
            f"create table t as select {', '.join(f'{value} as {name}' for name, value in VALUES.items())}".encode()
        )
        row = session.execute("select to_jsonb(whole) from t whole").fetchone()
        types: dict[str, str] = dict(
            session.execute("select key, jsonb_typeof(value) from t whole, jsonb_each(to_jsonb(whole))").fetchall()
        )
        (table,) = find_tables(session, "public.t", "cdcbridge")
        assert row is not None
        for column in table.columns:
            kind = types[column.name]
            expected = "any" if column.type in ("json", "jsonb") else KINDS.get(kind, kind)
            assert column.kind == expected, (column, row[0][column.name])
        by_name = {column.name: column for column in table.columns}
        assert by_name["r"].labels == ("open", "paid") and by_name["g"].type == "character(3)"
        assert by_name["z"].type == "integer"


def problems(world: World) -> dict[str, dict[str, Any]]:
    found = json.loads(world.run_program("check", "--json").stdout)["problems"]
    errors = [problem["message"] for problem in found if problem["severity"] == "error"]
    run = world.run_program("run", "--no-wait") if errors else None
    assert run is None or (run.returncode == 2 and all(message in run.stderr for message in errors)), run
    return {problem["code"]: problem for problem in found}


def test_check_and_run_refuse_in_the_same_words(world18: World) -> None:
    world18.execute(
        "create type state as enum ('open', 'paid')",
        "create table orders (id int primary key, status state, amount numeric not null, customer text)",
    )
    for name, source in {
        "a": "record.staus == 'paid'", "b": "record.amount > '5'", "c": "op == 'INSERT'", "d": "record.status",
        "e": "record.status == 'payed'", "f": "record.amount.startsWith('5')",
    }.items():  # fmt: skip
        world18.consumer(name, ("public.orders",), filter=source)
    world18.consumer("g", ("public.orders",), key=["custmer"])
    sink = {"type": "file", "path": str(world18.folder / "out.jsonl"), "mask": {"id": "hash"}}
    world18.consumer("h", ("public.orders",), mode="stream", sink=sink)
    found = problems(world18)
    assert set(found) == {"filter_column", "filter_type", "filter_op", "filter_no_boolean", "filter_label", "filter_fails",
                          "unknown_column", "masked_key"}  # fmt: skip
    assert all(problem["severity"] == "error" for problem in found.values())
    assert found["filter_column"]["fix"] == "Write status instead of staus."
    assert found["filter_type"]["fix"] == "Write 5 instead of '5'."
    assert found["filter_op"]["fix"] == "Write 'insert' instead of 'INSERT'."
    assert found["filter_label"]["fix"] == "Write 'paid' instead of 'payed'."
    assert found["unknown_column"]["fix"] == "Write customer instead of custmer.", "and nothing of the replica identity"


def test_a_table_that_a_wildcard_covers_does_not_stop_the_others(world18: World) -> None:
    world18.execute("create table a (id int primary key, status text not null)", "create table b (id int primary key)")
    world18.consumer("c", ("public.*",), filter="record.status == 'paid'")
    found = {code: problem for code, problem in problems(world18).items() if code.startswith("filter")}
    assert found["filter_fails"]["severity"] == "warning" and found["filter_fails"]["object"] == "public.b"
    world18.consumer("c", ("public.a",), filter="record.status == 'paid'", on_leave="delete")
    warned = problems(world18)["on_leave_identity"]
    assert warned["severity"] == "warning" and warned["fix"] == 'alter table "public"."a" replica identity full;'
