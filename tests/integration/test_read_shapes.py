"""Tables of every shape are read as the stream tells them: names, types, keys, orders, inheritance, rewrites, row security."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from cdcbridge.backfill.table_reader import Wanted, read_chunk
from cdcbridge.backfill.verify import verify
from cdcbridge.bridge.supervisor import Bridge
from cdcbridge.database import connect_source
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import OperatorNeeded
from cdcbridge.routing.copy_format import read_fields
from cdcbridge.source import shapes
from cdcbridge.source.sessions import refuse_row_security
from tests.harness import crash
from tests.harness.world import World, eventually, fresh_database


def finished(world: World) -> bool:
    return bool(world.value("select count(*) > 0 and bool_and(state = 'done') from backfills"))


def read_all(connection: Any, name: str, size: int, schema: str = "public") -> list[tuple[str | None, str]]:
    """(key, data) of all rows, read in chunks of so many rows."""
    shape = shapes.describe(connection, schema, name)
    found: list[tuple[str | None, str]] = []
    place: list[Any] = []
    last = False
    while not last:
        with connection.transaction():
            part = read_chunk(connection, shape, Wanted(), place, size)
        place, last = part.end, part.last
        for row in part.rows:
            _, key, data, *_ = read_fields(row, keyed=False, sized=False)
            assert b"\n" not in data and b"\r" not in data
            found.append((None if key is None else key.decode(), data.decode()))
    return found


@pytest.fixture(params=["pg18", "pg15"])
def session(request: pytest.FixtureRequest) -> Iterator[Any]:
    server: EmbeddedServer = request.getfixturevalue(request.param)
    with fresh_database(server) as database:
        connection = connect_source(server.dsn(database))
        connection.execute("set enable_seqscan = off")
        yield connection
        connection.close()


SYSTEM = {"tableoid", "cmax", "xmax", "cmin", "xmin", "ctid"}
names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=63
).filter(lambda name: len(name.encode()) <= 63 and name not in SYSTEM)


@pytest.mark.parametrize("keyed", [True, False])
def test_every_legal_name_of_a_column_and_a_table_can_be_read(session: Any, keyed: bool) -> None:
    @settings(max_examples=25)
    @given(st.lists(names, min_size=2, max_size=6, unique=True), names)
    @example(["r", "t", "d", "s", "k", "key"], "r")
    @example(["record", "op", "n", "c0", "bytes", "at_least"], "t")
    @example(["%s", "{}", "{0}", "$1", "%(x)s", "%"], "a%s{}b")
    @example(['a"b', "a.b", "a'b", "a\\b", " ", "\n"], 'x"."y')
    @example(["start", "rest", "total", "large", "only", "oid"], "only")
    @example(["é" * 31 + "x", "x" * 63, "漢字", "🐘", "ctid ", "row"], "漢" * 21)
    def read(columns: list[str], table: str) -> None:
        session.execute("drop schema if exists names cascade")
        session.execute("create schema names")
        name = sql.Identifier("names", table)
        key = sql.SQL(", primary key ({})").format(sql.SQL(", ").join(map(sql.Identifier, columns[:2])))
        session.execute(
            sql.SQL("create table {} ({}{})").format(
                name,
                sql.SQL(", ").join(sql.SQL("{} text").format(sql.Identifier(column)) for column in columns),
                key if keyed else sql.SQL(""),
            )
        )
        for n in range(5):
            values = [sql.Literal(f"{n}.{i}") for i in range(len(columns))]
            session.execute(sql.SQL("insert into {} values ({})").format(name, sql.SQL(", ").join(values)))
        found = read_all(session, table, 2, "names")
        records = session.execute(sql.SQL("select to_jsonb(x.*) from {} x").format(name)).fetchall()
        read_records = session.execute(
            "select d -> 'record' from unnest(%s::jsonb[]) d", ([data for _, data in found],)
        ).fetchall()
        assert sorted(map(str, read_records)) == sorted(map(str, records))
        assert all((key is not None) == keyed for key, _ in found)

    read()


KEYS = {
    "float8": ("'NaN'", "'Infinity'", "'-Infinity'", "-0.0", "0.1", "1e300", "5e-324"),
    "float4": ("'NaN'", "0.1", "-0.0", "3.4e38"),
    "numeric": ("'NaN'", "'Infinity'", "1.500", "1.50001", "0.00", "-3"),
    "bool": ("true", "false"),
    "bytea": (r"'\x'", r"'\x00'", r"'\x00ff'", r"'\xff'"),
    "timestamptz": ("'2024-01-01 00:00:00.000001+02'", "'infinity'", "'-infinity'", "'0044-03-15 BC'"),
    "interval": ("'1 mon'", "'-1 day'", "'1 year 2 days 00:00:00.5'"),
    "char(5)": ("'a'", "'b  '", "'c'", "' d'"),
    '"char"': ("'a'", "'b'"),
    "name": ("'x'", "'y'"),
    "bit(3)": ("B'101'", "B'001'"),
    "money": ("'1.50'", "'-2'"),
    "text": ("''", "'a'", "'%s {} \"x\"'", r"E'back\\slash'", r"E'new\nline'", "'ünï'"),
    "int4range": ("'empty'", "'[1,2)'", "'(,5)'"),
    "int4[]": ("'{}'", "'{1,null}'", "'{{1,2},{3,4}}'"),
    "jsonb": ("'1'", "'\"x\"'", "'{\"a\": [1, 2]}'", "'null'"),
    "uuid": ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", "'00000000-0000-0000-0000-000000000000'"),
    "ext.mood": ("'low'", "'high'"),
    "ext.cents": ("1.50", "2.00"),
    "ext.citext": ("'a'", "'B'", "'c'", "'D'"),
    "ext.pair": ("'(1,b)'", "'(1,)'", "'(0,z)'"),
}


def _types(session: Any) -> None:
    session.execute(
        "create schema ext; create extension citext schema ext; create type ext.mood as enum ('low', 'high');"
        "create domain ext.cents as numeric(10, 2); create type ext.pair as (a int, b text)"
    )


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_of_every_type_is_read_once_and_in_order(session: Any, kind: str) -> None:
    _types(session)
    values = ", ".join(f"({value}::{kind}, {n})" for n, value in enumerate(KEYS[kind]))
    session.execute(f"create table one (k {kind} primary key, n int)")
    session.execute(
        f"create table two (m int default 7, k {kind}, n int, primary key (m, k desc_k))".replace(" desc_k", "")
    )
    session.execute(f"create table down (k {kind} not null, n int)")
    session.execute("create unique index down_k on down (k desc)")
    session.execute("alter table down replica identity using index down_k")
    session.execute(f"insert into one values {values}")
    session.execute("insert into two (k, n) select k, n from one; insert into down select * from one")
    for table in ("one", "two", "down"):
        keys = [key for key, _ in read_all(session, table, 1)]
        wanted = session.execute(
            f"select (to_json(k) #>> '{{}}') from {table} order by k {'desc' if table == 'down' else ''}"
            if kind != "ext.pair"
            else f"select k::text as x from {table} order by k {'desc' if table == 'down' else ''}"
        ).fetchall()
        assert len(keys) == len(set(keys)) == len(KEYS[kind])
        if table == "two":
            assert all(str(key).startswith('["7",') for key in keys)
        else:
            assert keys == [key for (key,) in wanted]


@pytest.mark.parametrize(
    "index",
    [
        "(a desc, b)", "(a, b desc)", "(a desc nulls last, b nulls first)", "(a text_pattern_ops, b)",
        '(a collate "C", b desc)', "(b, a collate ext.ci)", "(a collate ext.ci desc, b)", "(c, b)", "(c desc, b desc)",
    ],
)  # fmt: skip
def test_an_index_with_an_order_of_its_own_is_followed(session: Any, index: str) -> None:
    _types(session)
    icu = session.info.server_version < 180000  # the wheel's server is built without it
    made = "(provider = icu, locale = 'und-u-ks-level2', deterministic = false)" if icu else "(locale = 'C.UTF-8')"
    session.execute(f"create collation ext.ci {made}")
    session.execute("create table t (a text not null, b int not null, c ext.citext not null)")
    session.execute(f"create unique index t_i on t {index}")
    session.execute("alter table t replica identity using index t_i")
    session.execute(
        "insert into t select x, n, x from unnest(array['a', 'B', 'c', 'Äz', 'äa', 'Z', 'b1', 'B2', '']) x, generate_series(1, 4) n"
    )
    found = read_all(session, "t", 5)
    assert len(found) == len({key for key, _ in found}) == 36
    shape = shapes.describe(session, "public", "t")
    order = sql.SQL(", ").join(column.order for column in shape.order)
    plan = session.execute(sql.SQL("explain select from t order by {}").format(order)).fetchall()
    assert "Sort" not in str(plan), "the index gives the order"


def test_the_key_is_what_the_replica_identity_covers(session: Any) -> None:
    cases = {
        "primary key (a)": ["a"],
        "primary key (a) deferrable": ["a"],
        "primary key (a) deferrable; alter table t replica identity full": ["a"],
        "primary key (a); alter table t replica identity full": ["a"],
        "unique (b); alter table t replica identity using index t_b_key": ["b"],
        "primary key (a), unique (b); alter table t replica identity using index t_b_key": ["b"],
        "primary key (a), unique (b, a); alter table t replica identity using index t_b_a_key": ["a"],
        "primary key (c, a), unique (a, b, c); alter table t replica identity using index t_a_b_c_key": ["c", "a"],
        "unique (c) include (a), primary key (a); alter table t replica identity using index t_c_a_key": ["c"],
        "unique (b)": [],
        "primary key (a); alter table t replica identity nothing": ["a"],
    }
    for clause, key in cases.items():
        definition, _, more = clause.partition(";")
        session.execute(f"drop table if exists t; create table t (a int, b int not null, c int not null, {definition})")
        session.execute(more or "select 1")
        assert [column.name for column in shapes.describe(session, "public", "t").key] == key, clause


def test_children_that_inherit_and_foreign_partitions_are_left_out(session: Any) -> None:
    session.execute(
        "create table base (id int primary key, v text); create table kid (primary key (id)) inherits (base);"
        "insert into base values (1, 'base'); insert into kid values (1, 'kid'), (2, 'kid');"
        "create table bare (v text); create table bare_kid () inherits (bare);"
        "insert into bare values ('base'); insert into bare_kid values ('kid');"
        "create table p (v int) partition by range (v); create table p1 partition of p for values from (0) to (10);"
        "create extension file_fdw; create server files foreign data wrapper file_fdw;"
        "create foreign table p2 partition of p for values from (10) to (20) server files options (filename '/absent');"
        "insert into p values (1), (2)"
    )
    assert [key for key, _ in read_all(session, "base", 10)] == ["1"]
    assert [key for key, _ in read_all(session, "kid", 1)] == ["1", "2"]
    assert len(read_all(session, "bare", 10)) == 1
    assert len(read_all(session, "p", 10)) == 2


def test_pages_are_read_to_the_last_row_and_no_row_twice(session: Any) -> None:
    session.execute("create table t (n int, big text)")
    session.execute("alter table t alter big set storage external")
    session.execute(
        "insert into t select n, case when n % 9 = 0 then repeat('x', 3000000) else '' end from generate_series(1, 400) n"
    )
    session.execute("delete from t where n % 7 = 0")
    found = [int(data.split('"n":')[1].split(",")[0]) for _, data in read_all(session, "t", 5000)]
    assert found == [n for n in range(1, 401) if n % 7]


@pytest.mark.parametrize("server", ["pg18", "pg15"])
def test_a_process_with_more_than_1024_open_files_reads_a_table(request: pytest.FixtureRequest, server: str) -> None:
    owner: EmbeddedServer = request.getfixturevalue(server)
    with contextlib.ExitStack() as files, fresh_database(owner) as database:
        for _ in range(1100):
            files.enter_context(Path("/dev/null").open())
        with connect_source(owner.dsn(database)) as connection:
            assert connection.fileno() > 1024
            connection.execute("create table t as select n, repeat('x', 1000) as big from generate_series(1, 2000) n")
            assert len(read_all(connection, "t", 1000)) == 2000


def test_row_security_that_would_hide_rows_is_refused_with_its_fix(world15: World) -> None:
    world = world15
    role = f"reader_{world.database}"
    world.execute(
        "create table t (id int primary key, owner text)",
        "insert into t values (1, 'x'), (2, 'y')",
        f"create role {role} login replication in role pg_read_all_data",
        "alter table t enable row level security",
        "create policy half on t using (owner = 'x')",
    )
    try:
        world.user = role
        with connect_source(world.dsn) as reader:
            with pytest.raises(OperatorNeeded, match="hides rows") as refused:
                refuse_row_security(reader, "public", "t")
            assert str(refused.value.hint).startswith(f"alter role {role} bypassrls;")
            world.user = "postgres"
            world.execute(str(refused.value.hint))
            refuse_row_security(reader, "public", "t")
    finally:
        world.user = "postgres"
        world.execute(f"drop role {role}")


REWRITES = {
    "alter type": "alter table t alter v type bigint",
    "volatile default": "alter table t add w float8 default random()",
    "unlogged": "alter table t set unlogged",
    "vacuum full": "vacuum full t",
    "cluster": "cluster t using t_pkey",
}


@pytest.mark.parametrize("statement", REWRITES.values(), ids=list(REWRITES))
@pytest.mark.parametrize("paused", [False, True], ids=["while it runs", "while it is paused"])
def test_a_table_that_is_written_anew_loses_no_row(world15: World, statement: str, paused: bool) -> None:
    if "unlogged" in statement:
        statement = "alter table t set unlogged; alter table t set logged"
    world = world15
    world.execute(
        "create table t (id int primary key, v int)", "insert into t select i, i from generate_series(1, 900) i"
    )
    world.consumer()
    with world.bridge():
        world.value("select start_backfill('c', 'public.t', rate => 300)")
        eventually(lambda: world.value("select coalesce(sum(done), 0) from backfill_progress") > 0)
        if paused:
            world.value("select change_backfills('c', null, '{running}', 'paused')")
        for one in statement.split(";"):
            world.execute(one)
        if paused:
            world.value("select change_backfills('c', null, '{paused}', 'waiting')")
        eventually(lambda: finished(world), patience=60)
        found = verify(world.config(), "public.t")
    assert found.ok, found
    assert world.value("select count(distinct key) from messages") == 900


def test_a_truncated_table_is_read_on_without_repeats(world15: World) -> None:
    world = world15
    world.execute(
        "create table t (id int primary key, v int)", "insert into t select i, i from generate_series(1, 900) i"
    )
    world.consumer()
    with world.bridge():
        world.value("select start_backfill('c', 'public.t', rate => 300)")
        eventually(lambda: world.value("select coalesce(sum(done), 0) from backfill_progress") > 0)
        with psycopg.connect(world.dsn) as session:
            session.execute("truncate t")
            session.execute("insert into t select i, i from generate_series(1, 1000) i")
        eventually(lambda: finished(world), patience=60)
        assert verify(world.config(), "public.t").ok
    seq = world.value("select seq from messages where op_of(data) = 'truncate'")
    assert world.value("select count(*) from messages where seq > %s", seq) == 1000


@pytest.mark.parametrize(
    "statement",
    [
        "alter table t alter v type bigint",
        "alter table t drop v",
        "drop table t; create table t (id int primary key, v int); insert into t values (1, 1)",
    ],
)
def test_a_table_that_was_altered_since_the_slots_snapshot_is_read_beside_the_stream(
    world15: World, statement: str
) -> None:
    """The exported snapshot shows none of its rows."""
    world = world15
    world.execute(
        "create table t (id int primary key, v int)", "insert into t select i, i from generate_series(1, 100) i"
    )
    world.consumer(start="snapshot")
    with crash.at("table described", lambda: world.execute(*statement.split(";"))):
        bridge = Bridge(world.config(), consistent=True)
        thread = threading.Thread(target=bridge.run, daemon=True)
        thread.start()
        eventually(world.active)
        eventually(lambda: finished(world), patience=60)
        found = verify(world.config(), "public.t")
        bridge.stop()
        thread.join(30)
    assert found.ok and found.rows in (1, 100), found
