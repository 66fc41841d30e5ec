"""`verify` raises no false alarm and no traceback, whatever the types, names and keys are, and whatever ALTER TABLE did."""

from __future__ import annotations

import pytest

from cdcbridge.backfill.verify import verify
from tests.harness.world import World, eventually
from tests.integration.test_types import CASES, SPECIAL, TYPES


def finished(world: World) -> bool:
    return bool(world.value("select count(*) > 0 and bool_and(state = 'done') from backfills"))


EXTENSION = (
    ("ext.citext", ("'A'",)),
    ("ext.citext[]", ("array['A', 'b,c']::ext.citext[]",)),
    ("pair", ("'(1,\"b c\")'",)),
    ("pair[]", ("array['(1,b)']::pair[]",)),
    ("d_pair[]", ("array['(1,b)']::d_pair[]",)),
)


def test_reads_and_changes_of_every_type_are_equal_and_verified(world: World) -> None:
    cases = CASES + EXTENSION + (SPECIAL if world.plugin != "wal2json" else ())
    world.execute(*TYPES, "create domain d_pair as pair", "create schema ext", "create extension citext schema ext")
    columns = ", ".join(f"c{n} {kind}" for n, (kind, _) in enumerate(cases))
    world.execute(f"create table t (id serial primary key, {columns})", "alter table t replica identity full")
    world.consumer()
    with world.bridge():
        for number, (kind, values) in enumerate(cases):
            for value in values:
                world.execute(f"insert into t (c{number}) values (({value})::{kind})")
        count = world.value("select count(*) from public.t")
        eventually(lambda: world.value("select count(*) from messages") == count)
        assert verify(world.config(), "public.t").ok
        world.value("select start_backfill('c', 'public.t')")
        eventually(lambda: finished(world))
        found = verify(world.config(), "public.t")
    assert found.ok and not found.notes, found
    texts = world.rows(
        "select i.key, i.data::text, r.data::text from messages i join messages r on r.key = i.key and r.reader is not null"
        " where i.reader is null and replace(i.data::text, '\"insert\"', '\"read\"') <> r.data::text"
    )
    assert texts == [] or world.plugin == "wal2json", "even byte by byte, but that wal2json sends 1e6 as 1000000.0"


JSONS = (
    r'{"a": "\u0000"}', r'"\ud800 \\u0000 \\\u0000"', "1e400000", "[1e-400000, -0e99999, 1.5E+123456]", "1" * 200_000,
    '{"a":\n [1,\r\n2]\n}', r'"\\"', "null", r'{"\u0000": 1}',
)  # fmt: skip


def test_json_that_jsonb_cannot_hold_is_read_on_one_line_and_verified(world: World) -> None:
    world.execute(
        "create domain d_json as json",
        "create table t (id int primary key, j json, a json[], d d_json)",
        "alter table t replica identity full",
    )
    for number, value in enumerate(JSONS):
        world.sql.execute("insert into t values (%s, %s, array[%s, null]::json[], %s)", (number, value, value, value))
    world.consumer(start="snapshot", key=["id"])
    with world.bridge():
        eventually(lambda: finished(world))
        found = verify(world.config(), "public.t")
        assert found.ok and found.rows == len(JSONS) and not found.notes, found
        world.execute("update t set id = id + 100")
        eventually(lambda: world.value("select count(*) from messages") == 2 * len(JSONS))
        assert verify(world.config(), "public.t").ok
        world.execute("update cdcbridge.messages set data = replace(data::text, ' 1}', ' 2}')::json")
        found = verify(world.config(), "public.t")
    assert found.different == ("108",)
    assert world.rows("select data::text from messages where data::text ~ E'[\\n\\r]'") == []


ALTERATIONS = {
    "added": ("alter table t add w int default 7", ["column 'w'"]),
    "dropped": ("alter table t drop v", []),
    "renamed": ("alter table t rename v to w", ["column 'w'"]),
    "of another type": ("alter table t alter v type numeric(12, 2)", []),  # 1 and 1.00 are one number
    "with other values": ("alter table t alter v type text using 'x' || v", ["column 'v'"]),
    "generated": ("alter table t add g int generated always as (v * 2) stored", []),
    "in another order": (
        "alter table t drop v, add v int default 5, add u int default 1",
        ["column 'u'", "column 'v'"],
    ),
    "inherited": ("create table kid () inherits (t); insert into kid values (1000, 1)", []),
}


@pytest.mark.parametrize(("statement", "notes"), ALTERATIONS.values(), ids=list(ALTERATIONS))
@pytest.mark.parametrize("read", [True, False], ids=["read", "changed"])
def test_an_altered_table_raises_no_false_alarm(world15: World, statement: str, notes: list[str], read: bool) -> None:
    world = world15
    world.execute("create table t (id int primary key, v int)")
    world.consumer(start="snapshot")
    if read:
        world.execute("insert into t select i, i from generate_series(1, 50) i")
    with world.bridge():
        eventually(lambda: finished(world))
        if not read:
            world.execute("insert into t select i, i from generate_series(1, 50) i")
        eventually(lambda: world.value("select count(*) from messages") == 50)
        for one in statement.split(";"):
            world.execute(one)
        found = verify(world.config(), "public.t")
        assert found.ok and found.rows == 50, found
        assert [note.split(":")[0] for note in found.notes] == notes, found.notes
        world.execute("update t set id = id where id <= 3", "delete from t where id = 50", "insert into t values (60)")
        world.execute("update cdcbridge.messages set data = replace(data::text, '\"id\":7,', '\"id\":77,')::json")
        found = verify(world.config(), "public.t")
    assert found.different == ("7",) and not found.missing and not found.extra


def test_keys_that_came_after_their_rows_and_keys_that_are_no_numbers(world: World) -> None:
    world.execute(
        "create table t (a float8 not null, b text not null)",
        "alter table t replica identity full",
        "create table n (k float8 primary key)",
    )
    world.consumer(tables=("public.t", "public.n"))
    with world.bridge():
        world.execute(
            "insert into t values (0.1, 'x'), (1, 'y'), (1e300, 'z')", "update t set b = 'q' where a = 1",
            "delete from t where b = 'z'",
        )  # fmt: skip
        world.execute("insert into n values ('Infinity'), (0.1), (-0.0)")
        if world.plugin != "wal2json":
            world.execute("insert into n values ('NaN')", "insert into t values ('NaN', 'n')")
        eventually(lambda: world.value("select count(*) from messages where topic = 'public.t'") >= 5)
        world.execute("alter table t add primary key (a, b)", "alter table t replica identity default")
        world.execute("update t set b = 'r' where a = 0.1")
        assert verify(world.config(), "public.t").ok
        found = verify(world.config(), "public.n")
    if world.plugin != "wal2json":  # a wal2json without numeric-data-types-as-string sends Infinity as null
        assert found.ok and found.rows == 4, found


def test_a_table_without_its_schema_is_found(world18: World) -> None:
    world18.execute("create table orders (id int primary key)", "create schema old", "create table old.orders ()")
    world18.consumer(tables=("public.orders",))
    with world18.bridge():
        pass
    refused = world18.run_program("verify", "orders")
    assert refused.returncode == 2
    assert "has no table orders; did you mean public.orders or old.orders?" in refused.stderr
    assert "with its schema" in refused.stderr
