"""What a mirror does with types, columns, keys and definitions of tables."""

from __future__ import annotations

import pytest

from tests.harness.world import eventually
from tests.mirrors.pair import Pair

TYPES = {
    "smallint": "-32768",
    "bigint": "9223372036854775807",
    "numeric": "123456789012345678901234567890.123456789",
    "numeric(6,2)": "'NaN'",
    "real": "1.1",
    "double precision": "'-Infinity'",
    "money": "12.34",
    "boolean": "true",
    "text": "E'tab\\tquote\"back\\\\slash ünïcode 😀'",
    "varchar(10)": "'abc'",
    "char(5)": "'ab'",
    "name": "'a name'",
    '"char"': "'x'",
    "bytea": "'\\x00ff10'",
    "date": "'infinity'",
    "time": "'12:34:56.789012'",
    "timetz": "'12:34:56+02'",
    "timestamp": "'2026-02-28 12:34:56.789012'",
    "timestamptz": "'-infinity'",
    "interval": "'1 year 2 mons -3 days 04:05:06.789'",
    "uuid": "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
    "json": '\'{"a":  1.10, "a": 2}\'',
    "jsonb": '\'{"a": [1e3, null, "},\\"old\\":"]}\'',
    "inet": "'::1/64'",
    "cidr": "'10.0.0.0/8'",
    "macaddr": "'08:00:2b:01:02:03'",
    "macaddr8": "'08:00:2b:01:02:03:04:05'",
    "bit(4)": "B'1010'",
    "varbit": "B'10101'",
    "point": "'(1.5,2)'",
    "line": "'{1,2,3}'",
    "box": "'((1,2),(3,4))'",
    "path": "'[(1,2),(3,4)]'",
    "polygon": "'((1,2),(3,4),(5,6))'",
    "circle": "'<(1,2),3>'",
    "tsvector": "'a fat cat'",
    "tsquery": "'fat & cat'",
    "int4range": "'[1,10)'",
    "tstzrange": "'[2026-01-01,)'",
    "int4multirange": "'{[1,3),[5,7)}'",
    "int[]": "'{1,NULL,3}'",
    "int[][]": "'{{1,2},{3,4}}'",
    "text[]": '\'{a,"b,c",NULL,""}\'',
    "numeric[]": "'{1.10,NaN}'",
    "timestamptz[]": "'{2026-01-01,infinity}'",
    "jsonb[]": "ARRAY['{\"a\": 1}'::jsonb, '[1]']",
    "bytea[]": "ARRAY['\\x00ff'::bytea]",
    "pg_lsn": "'16/B374D848'",
    "oid": "4294967295",
    "xid8": "'18446744073709551615'",
    "regclass": "'pg_class'",
    "mood": "'happy'",
    "mood[]": "'{happy,sad}'",
    "positive": "7",
    "pair": "'(1,\"a, b\")'",
    "pair[]": "ARRAY['(1,a)'::pair, '(2,\"x\"\"y\")']",
    "hidden": "'(3,c)'",
}
NOT_IN_WAL2JSON = {"numeric(6,2)", "double precision"}  # version 2.5 writes NaN and Infinity as null (docs/MIRRORS.md)
OWN = (
    "create type mood as enum ('sad', 'happy')",
    "create domain positive as int check (value > 0)",
    "create type pair as (a int, b text)",
    "create domain hidden as pair",
)


@pytest.fixture(params=["pair18", "pair15"])
def both(request: pytest.FixtureRequest) -> Pair:
    """Each of the two pairs."""
    found: Pair = request.getfixturevalue(request.param)
    return found


def test_every_type(both: Pair) -> None:
    a, b = both.sides
    columns = ", ".join(f"c{n} {kind}" for n, kind in enumerate(TYPES))
    values = ", ".join(TYPES.values())
    both.both(*OWN)
    a.execute(
        f"create table t (id int primary key, {columns})",
        f"insert into t values (1, {values})",
        "insert into t (id) values (2)",
    )
    both.mirror()
    with both.running():
        eventually(lambda: b.value("select to_regclass('public.t') is not null"), "the table")
        a.execute(f"insert into t values (3, {values})", "update t set id = 4 where id = 1", "update t set c0 = 5")
        both.settle()
    for n, kind in enumerate(TYPES):
        if kind in NOT_IN_WAL2JSON and a.plugin == "wal2json":
            continue
        query = f"select id, c{n}::text from t order by id".encode()
        assert a.sql.execute(query).fetchall() == b.sql.execute(query).fetchall(), kind
    assert both.conflicts(b) == []


def test_a_value_that_did_not_change(both: Pair) -> None:
    """An update sends no large value that it left alone. A row that is new in the target needs it nevertheless."""
    a, b = both.sides
    big = "(select string_agg(md5(x::text || id), '') from generate_series(1, 500) x)"
    both.both("create table t (id int primary key, n int, big text)", "alter table t alter big set storage external")
    a.execute("insert into t (id, n) values (1, 0), (2, 0), (3, 0)", f"update t set big = {big}")
    b.execute("insert into t values (1, -1, 'here')")
    both.mirror(start="now")
    with both.running():
        a.execute("update t set n = n + 1", "update t set n = n + 1", "update t set id = 30 where id = 3")
        both.settle()
        found = b.sql.execute("select id, n, left(big, 4) from t order by id").fetchall()
    wanted = a.sql.execute("select id, n, case when id = 1 then 'here' else left(big, 4) end from t order by id")
    assert found == wanted.fetchall()


def test_other_names_and_columns(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute(
        "create table orders (id int primary key, total int, card text, double int generated always as (total * 2) stored)"
    )
    pair18.mirror(tables={"public.orders": {"to": "reporting.sales", "columns": {"exclude": ["card"]}}})
    with pair18.running():
        a.execute("insert into orders values (1, 10, 'secret')", "update orders set card = 'other', total = 11")
        pair18.settle()
    assert b.rows("select * from reporting.sales") == [(1, 11, 22)]
    columns = b.rows("select attname from pg_attribute where attrelid = 'reporting.sales'::regclass and attnum > 0")
    assert columns == [("id",), ("total",), ("double",)]


def test_partitions_and_identity(pair18: Pair) -> None:
    a, b = pair18.sides
    parts = (
        "create table p (id int generated always as identity, day int, v text, primary key (id, day)) partition by range (day)",
        "create table p1 partition of p for values from (0) to (10)",
        "create table p2 partition of p for values from (10) to (20)",
    )
    a.execute(*parts)
    b.execute("create table q (id int generated always as identity, v text, day int, more text, primary key (id, day))"
              " partition by list (day)", "create table q1 partition of q default")  # fmt: skip
    pair18.mirror(tables={"public.p": "public.q"}, start="now")
    with pair18.running():
        a.execute(
            "insert into p (day, v) select n, 'v' from generate_series(0, 19) n", "update p set v = 'w', day = 19 - day"
        )
        pair18.settle()
    query = b"select id, day, v from %s order by id, day"
    assert a.sql.execute(query % b"p").fetchall() == b.sql.execute(query % b"q").fetchall()


def test_a_history(pair15: Pair) -> None:
    a, b = pair15.sides
    a.execute("create table t (id int primary key, v text)")
    pair15.mirror(apply="append", start="now", tables={"public.t": "public.t_history"})
    with pair15.running():
        a.execute(
            "insert into t values (1, 'a')",
            "update t set v = 'b'",
            "update t set id = 2",
            "delete from t",
            "truncate t",
        )
        pair15.settle()
    found = b.rows('select op, id, v, commit_time is not null from t_history order by position::text collate "C"')
    assert sorted(found, key=repr) == sorted(
        [("insert", 1, "a", True), ("update", 1, "b", True), ("update", 2, "b", True), ("delete", 2, None, True),
         ("truncate", None, None, True)], key=repr)  # fmt: skip


def test_a_new_column_stops_the_mirror(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t values (1)", "alter table t add column note text", "insert into t values (2, 'lost?')")
        a.execute("insert into t values (3, 'no')")
        stopped = eventually(lambda: a.rows("select stopped, hint from mirrors where stopped is not null"), "it stops")
        assert "public.t lacks the column note" in stopped[0][0]
        assert 'alter table "public"."t" add column "note" text;' in stopped[0][1]
        assert b.rows("select * from t") == [(1,)]
        b.execute("alter table t add column extra int default 7, add column note text")
        a.rows("update mirrors set stopped = null returning 1")
        pair18.settle()
        assert b.rows("select id, extra, note from t order by id") == [(1, 7, None), (2, 7, "lost?"), (3, 7, "no")]
        a.execute("alter table t drop column note", "update t set id = 10 where id = 1", "insert into t values (4)")
        pair18.settle()
        assert b.rows("select id, extra, note from t order by id") == [
            (2, 7, "lost?"), (3, 7, "no"), (4, 7, None), (10, 7, None)]  # fmt: skip


def test_a_column_that_the_target_gets_first_stops_nothing(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t values (1)")
        pair18.settle("t")
        pair18.both("alter table t add column note text")
        a.execute("insert into t values (2, 'kept')")
        pair18.settle("t")
    assert pair18.conflicts(b) == []


def test_a_table_that_was_created_in_vain_is_created_again(pair18: Pair) -> None:
    """The commit that creates the table is undone, because a later transaction in it cannot be applied."""
    a, b = pair18.sides
    a.execute("create table t (id int primary key, note text)", "create table u (id int primary key)")
    b.execute("create table t (id int primary key)")
    pair18.mirror(start="now")
    with a.bridge():
        a.execute("insert into u values (1)", "insert into t values (1, 'a')")
        eventually(lambda: a.value("select count(*) from messages") == 2, "the log")
        process = a.start_mirrors()
        stopped = eventually(lambda: a.rows("select stopped from mirrors where stopped is not null"), "it stops")
        assert "lacks the column note" in stopped[0][0]
        assert b.rows("select * from u") == [(1,)]
        process.terminate()
        process.wait(30)


def test_names_with_signs(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute('create table "T %s" ("id%" int primary key, "tax%s" int, "a{}b" text, "#" int, "n" int)')
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into \"T %s\" values (1, 2, 'x', 3, 4), (2, 2, 'x', 3, 4)")
        a.execute('update "T %s" set "tax%s" = 9 where "id%" = 1', 'delete from "T %s" where "id%" = 2')
        a.execute('update "T %s" set "id%" = 7')
        pair18.settle('"T %s"')
    assert pair18.conflicts(b) == []


def test_truncate_of_a_partitioned_target(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute("create table t (id int primary key)")
    b.execute("create table t (id int primary key) partition by range (id)", "create table t1 partition of t default")
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t values (1)", "truncate t", "insert into t values (2)")
        pair18.settle("t")
