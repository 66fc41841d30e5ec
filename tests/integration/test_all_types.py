"""G6 for all of pg_type, and for types that are gone when the bridge comes to their values."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.changes.pgtypes import ARRAYS
from tests.harness.world import World, eventually
from tests.integration.test_types import CASES, SESSION, XML

# Types that CASES has no values for. None: a value cannot be written, only null.
MORE: dict[str, str | None] = {
    "regproc": "'now'", "regprocedure": "'lower(text)'", "regoper": "'pg_catalog.||/'", "regoperator": "'+(int4,int4)'",
    "regclass": "'pg_class'", "regtype": "'int4'", "regconfig": "'english'", "regdictionary": "'english_stem'",
    "regnamespace": "'pg_catalog'", "regrole": "'postgres'", "regcollation": "'\"C\"'", "aclitem": "'postgres=r/postgres'",
    "refcursor": "'a cursor'", "pg_snapshot": "'10:20:10,14'", "int8range": "'[1,10)'", "nummultirange": "'{[1.5,2)}'",
    "tsmultirange": "'{[2024-01-01,2024-01-02)}'", "tstzmultirange": "'{[2024-01-01 00:00+00,)}'",
    "datemultirange": "'{[2024-01-01,2024-01-03)}'", "int8multirange": "'{[1,3)}'", "time without time zone": "'12:00'",
    "timestamp without time zone": "'2024-02-29 12:00'", "information_schema.cardinal_number": "7",
    "timestamp with time zone": "'2024-02-29 12:00+00'", "time with time zone": "'12:00+05:45'", "boolean": "true",
    "information_schema.character_data": "'x'", "information_schema.sql_identifier": "'x y'", "bit": "B'1'",
    "information_schema.time_stamp": "'2024-02-29 12:00+00'", "information_schema.yes_or_no": "'YES'",
    "character varying": "'a,b'", "character": "'a'", "bit varying": "B'101'", "smallint": "1", "integer": "1",
    "bigint": "1", "real": "1.5", "double precision": "1.5", "gtsvector": None, "pg_ndistinct": None,
    "pg_node_tree": "(select ev_action from pg_rewrite limit 1)", "pg_dependencies": None, "pg_mcv_list": None,
    "pg_brin_bloom_summary": None, "pg_brin_minmax_multi_summary": None,
}  # fmt: skip
DIFFERENCES = """
    select e.key, e.value, r.value from public.t
    join cdcbridge.messages m on m.key = t.id::text and m.data ->> 'op' = %s
    cross join lateral jsonb_each(to_jsonb(t)) e
    left join lateral jsonb_each((m.data -> 'record')::jsonb) r on r.key = e.key
    where r.value is distinct from e.value
"""


def differences(world: World, op: str = "insert") -> list[tuple[Any, ...]]:
    """Columns of public.t whose values in messages are not those of to_jsonb."""
    world.leave()
    world.execute(*SESSION)
    return world.sql.execute(DIFFERENCES, (op,)).fetchall()


def all_types(world: World) -> list[tuple[str, str | None]]:
    """(type, a value as SQL) of each type that a column can have, and of each array of one."""
    samples = dict(MORE)
    samples.update({name: values[0] for name, values in CASES + XML})
    names = world.sql.execute(
        "select t.oid::regtype::text, a.oid::regtype::text from pg_type t left join pg_type a on a.oid = t.typarray"
        " where t.typtype in ('b', 'd', 'e', 'r', 'm') and t.typisdefined"
        " and (t.typcategory <> 'A' or t.oid in (22, 30)) and t.oid < 16384 order by t.oid"
    ).fetchall()
    if world.sql.info.server_version >= 180000:
        samples["xml"] = None  # the wheel is built without libxml
    found: list[tuple[str, str | None]] = []
    for name, array in names:
        value = samples[name]
        found.append((name, value))
        if array is not None:
            one = "null" if value is None else f"({value})::{name}"
            found += [(array, f"array[{one}, null, {one}]"), (array, f"array[[{one}], [null]]"), (array, "'{}'")]
    return found


@pytest.mark.parametrize("op", ["insert", "read"])
def test_every_type_of_the_server_is_as_in_to_jsonb(world: World, op: str) -> None:
    types = all_types(world)
    assert len(types) > 250
    columns = ", ".join(f"c{n} {name}" for n, (name, _) in enumerate(types))
    world.execute(f"create table t (id int primary key, {columns})")
    world.consumer(start="snapshot" if op == "read" else "now")
    values = ", ".join("null" if value is None else f"({value})::{name}" for name, value in types)
    insert = f"insert into t values (1, {values})"
    if op == "read":
        world.execute(insert)
    with world.bridge():
        if op == "insert":
            world.execute(insert)
        world.messages(1)
    assert [(types[int(key[1:])], *rest) for key, *rest in differences(world, op)] == []


def test_the_table_of_arrays_covers_the_server(world: World) -> None:
    """For `decode`, which has no catalogue."""
    rows = world.sql.execute(
        "select oid::int8, typelem::int8 from pg_type where oid < 10000 and oid not in (22, 30)"
        " and typsubscript = 'array_subscript_handler'::regproc"
    ).fetchall()
    assert {oid: element for oid, element in rows if ARRAYS.get(oid) != element} == {}


DELIMITERS = r""": ; ] [ ^ - \ | . / * + ? ( ) $ & ~ # @ ! % = < > _ ' ` a N L 0 s d n"""

UNREADABLE = ('"', "{", "}")  # PostgreSQL itself cannot read arrays with these


def test_arrays_with_any_delimiter(world: World) -> None:
    world.execute("create schema d", "set search_path = d, public")
    marks = [*DELIMITERS.split(" "), " ", *UNREADABLE]
    for n, mark in enumerate(marks):
        world.execute(
            f"create type d{n}",
            f"create function i(cstring) returns d{n} language internal immutable strict as 'textin'",
            f"create function o(d{n}) returns cstring language internal immutable strict as 'textout'",
            f"create type d{n} (input = i, output = o, like = text, delimiter = '{mark.replace(chr(39), chr(39) * 2)}')",
            f"drop function if exists i{n}(cstring)",
            f"alter function i(cstring) rename to i{n}",
            f"alter function o(d{n}) rename to o{n}",
        )
    columns = ", ".join(f"c{n} d.d{n}[]" for n in range(len(marks)))
    world.execute(f"create table public.t (id int primary key, {columns})")
    world.consumer()
    with world.bridge():
        for at, elements in enumerate(
            ("['x', null, 'NULL', 'b']", "[['{', '}'], ['', ' y ']]", "['\"q\\', 'NUL', '1,2;3:4']")
        ):
            values = ", ".join(
                "array" + elements.replace("b", mark.replace("'", "''")) + f"::d.d{n}[]" for n, mark in enumerate(marks)
            )
            world.execute(f"insert into public.t values ({at}, {values})")
        world.execute("insert into public.t (id, c0) values (3, '[2:3]={1:2}')")
        world.messages(4)
    different = [(marks[int(key[1:])], *rest) for key, *rest in differences(world)]
    assert [row for row in different if row[0] not in UNREADABLE] == []
    assert all(isinstance(value, str) for _, _, value in different), "the text of an array that cannot be read"


def test_values_of_a_type_that_was_dropped_meanwhile(world: World) -> None:
    """The bridge is behind, and neither the column nor its type is in the catalogue any more."""
    types = {
        "d_bool": ("domain {} as bool", "true", True),
        "d_int": ("domain {} as int", "7", 7),
        "d_bools": ("domain {} as bool[]", "'{t,f,NULL}'", [True, False, None]),
        "d_d": ("domain {} as d_int", "8", 8),
        "d_json": ("domain {} as jsonb", "'{\"a\": 1}'", {"a": 1}),
        "e": ("type {} as enum ('a', 'b')", "'b'", "b"),
        "r": ("type {} as range (subtype = float8)", "'[1.5,2)'", "[1.5,2)"),
        "comp": ("type {} as (a int, b text)", "row(1, 'x')", "(1,x)"),
    }
    for name, (definition, _, _) in types.items():
        world.execute("create " + definition.format(name))
    columns = ", ".join(f"c_{name} {name}, a_{name} {name}[]" for name in types)
    world.execute(f"create table t (id int primary key, {columns})")
    arrays = {"d_bools": "'{\"{t,f,NULL}\",NULL}'"}  # PostgreSQL makes none of a domain over an array by itself
    values = ", ".join(
        f"({value})::{name}, {arrays.get(name, f'array[({value})::{name}, null]')}"
        for name, (_, value, _) in types.items()
    )
    world.consumer(tables=("public.*",))
    with world.bridge():
        # No row came, so only the look at the start can have seen the types.
        eventually(lambda: world.value("select catalog ? '/types' from source"), "the types are kept")
    world.execute(f"insert into t values (1, {values})")
    for name in reversed(types):
        world.execute(f"alter table t drop column c_{name}, drop column a_{name}")
    for name in ("d_d", *(name for name in types if name != "d_d")):
        world.execute(f"drop {types[name][0].split()[0]} {name}")
    with world.bridge():
        record = world.data(1)[0]["record"]
    for name, (_, _, value) in types.items():
        assert record[f"c_{name}"] == value and record[f"a_{name}"] == [value, None], name


def test_composites_are_text_and_arrays_of_them_arrays_of_texts(world: World) -> None:
    world.execute(
        "create type pair as (a int, b text)", "create domain d_pair as pair",
        "create table t (id int primary key, p pair, ps pair[], d d_pair, ds d_pair[], c pg_class)",
    )  # fmt: skip
    insert = """insert into t values (%s, row(1, 'x y'), array[row(1, 'a"b')::pair, null], row(2, null), array[row(3, ',')::d_pair])"""
    world.execute(insert % 1)
    world.consumer(start="snapshot")
    with world.bridge():
        world.messages(1)
        world.execute(insert % 2)
        read, change = (data["record"] for data in world.data(2))
    assert {**read, "id": 2} == change
    assert change == {"id": 2, "p": '(1,"x y")', "ps": ['(1,"a""b")', None], "d": "(2,)", "ds": ['(3,",")'], "c": None}


EXTENSIONS = {
    "citext": "'Ab'", "hstore": "'a=>1, \"b c\"=>NULL'", "ltree": "'a.b'", "lquery": "'a.*'", "cube": "'(1,2)'",
    "seg": "'1..2'", "isbn": "'978-0-393-04002-9'", "lo": "'1'",
}  # fmt: skip


def test_types_of_extensions_are_text_in_rows_and_changes(world: World) -> None:
    for name in ("citext", "hstore", "ltree", "cube", "seg", "isn", "lo"):
        world.execute(f"create extension {name}")
    columns = ", ".join(f"c_{name} {name}, a_{name} {name}[]" for name in EXTENSIONS)
    world.execute(f"create table t (id int primary key, {columns})")
    values = ", ".join(f"{value}::{name}, array[{value}::{name}, null]" for name, value in EXTENSIONS.items())
    world.execute(f"insert into t values (1, {values})")
    world.consumer(start="snapshot")
    with world.bridge():
        world.messages(1)
        world.execute(f"insert into t values (2, {values})")
        read, change = (data["record"] for data in world.data(2))
    assert {**read, "id": 2} == change
    for name, value in EXTENSIONS.items():
        text = world.sql.execute(f"select {value}::{name}::text".encode()).fetchone()
        assert (change[f"c_{name}"],) == text and change[f"a_{name}"] == [change[f"c_{name}"], None], name


@pytest.mark.parametrize("storage", ["plain", "main", "external", "extended"])
def test_a_toasted_value_whose_storage_was_changed_later_is_unchanged(world: World, storage: str) -> None:
    big = "(select string_agg(md5(i::text), '') from generate_series(1, 2000) i)"
    world.execute(
        "create table t (id int primary key, v int, big text, j jsonb, plain text)",
        "alter table t alter plain set storage plain, alter big set storage external, alter j set storage external",
        f"insert into t values (1, 1, {big}, jsonb_build_object('a', {big}), 'p')",
        f"alter table t alter big set storage {storage}, alter j set storage {storage}",
    )
    world.consumer()
    with world.bridge():
        world.execute("update t set v = 2", "update t set v = 3, big = 'small'")
        first, second = world.data(2)
    assert first["record"] == {"id": 1, "v": 2, "plain": "p"} and sorted(first["unchanged"]) == ["big", "j"]
    assert second["record"] == {"id": 1, "v": 3, "big": "small", "plain": "p"} and second["unchanged"] == ["j"]
