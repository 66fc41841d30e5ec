"""Every shape of table: what worked before the bridge works beside it, or `check` and `run` refused first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from cdcbridge.checks.identity import identity_trouble
from cdcbridge.checks.server import check
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.problem import Problem
from cdcbridge.source.tables import Table, find_tables
from tests.harness.world import World, eventually, fresh_database


@dataclass(frozen=True)
class Shape:
    """The relations of a shape: the first is the one that a consumer names."""

    create: tuple[str, ...]
    names: tuple[str, ...]
    more: tuple[str, ...] = ()
    since: int = 15
    named: bool = True


PARTS = (
    "create table {0}_1 partition of {0} for values from (0) to (100)",
    "create table {0}_2 partition of {0} default",
)

SHAPES: dict[str, Shape] = {
    "plain": Shape(("create table plain (id int primary key, v text)",), ("plain",)),
    "no_key": Shape(("create table no_key (id int, v text)",), ("no_key",)),
    "deferrable": Shape(("create table deferrable_ (id int primary key deferrable, v text)",), ("deferrable_",)),
    "deferred": Shape(("create table deferred_ (id int primary key deferrable initially deferred, v text)",), ("deferred_",)),
    "included": Shape(("create table included (id int, v text, primary key (id) include (v))",), ("included",)),
    "unique": Shape(("create table uniq (id int not null unique, v text)",), ("uniq",)),
    "identity_index": Shape(
        ("create table by_index (id int not null unique, v text)",
         "alter table by_index replica identity using index by_index_id_key"), ("by_index",)),
    "identity_index_gone": Shape(
        ("create table gone (id int not null unique, v text)",
         "alter table gone replica identity using index gone_id_key", "alter table gone drop constraint gone_id_key"),
        ("gone",)),
    "identity_nothing": Shape(
        ("create table nothing_ (id int primary key, v text)", "alter table nothing_ replica identity nothing"), ("nothing_",)),
    "full": Shape(("create table full_ (id int, v text)", "alter table full_ replica identity full"), ("full_",)),
    "full_stored": Shape(
        ("create table full_stored (id int, v text, g int generated always as (id * 2) stored)",
         "alter table full_stored replica identity full"), ("full_stored",)),
    "full_virtual": Shape(
        ("create table full_virtual (id int, v text, g int generated always as (id * 2) virtual)",
         "alter table full_virtual replica identity full"), ("full_virtual",), since=18),
    "full_virtual_keyed": Shape(
        ("create table full_virtual_keyed (id int primary key, v text, g int generated always as (id * 2) virtual)",
         "alter table full_virtual_keyed replica identity full"), ("full_virtual_keyed",), since=18),
    "full_virtual_deferrable": Shape(
        ("create table full_virtual_def (id int primary key deferrable, v text, g int generated always as (id * 2) virtual)",
         "alter table full_virtual_def replica identity full"), ("full_virtual_def",), since=18),
    "keyed_virtual": Shape(
        ("create table keyed_virtual (id int primary key, v text, g int generated always as (id * 2) virtual)",),
        ("keyed_virtual",), since=18),
    "keyed_stored": Shape(
        ("create table keyed_stored (id int primary key, v text, g int generated always as (id * 2) stored)",), ("keyed_stored",)),
    "generated_key": Shape(
        ("create table gen_key (id int, v text, g int generated always as (id * 2) stored primary key)",), ("gen_key",)),
    "inheritance": Shape(
        ("create table base (id int primary key, v text)", "create table kid () inherits (base)",
         "create table keyed_kid (primary key (id)) inherits (base)", "create table grandkid (x int) inherits (kid)"),
        ("base", "kid", "keyed_kid", "grandkid")),
    "inheritance_no_key": Shape(
        ("create table bare_base (id int, v text)", "create table bare_kid (primary key (id)) inherits (bare_base)"),
        ("bare_base", "bare_kid")),
    "partitioned": Shape(
        ("create table part (id int primary key, v text) partition by range (id)", *(p.format("part") for p in PARTS)),
        ("part", "part_1")),
    "partitioned_full": Shape(
        ("create table part_full (id int, v text) partition by range (id)", *(p.format("part_full") for p in PARTS),
         "alter table part_full replica identity full", "alter table part_full_1 replica identity full",
         "alter table part_full_2 replica identity full"), ("part_full", "part_full_1")),
    "partitioned_root_full": Shape(
        ("create table part_root (id int, v text) partition by range (id)", *(p.format("part_root") for p in PARTS),
         "alter table part_root replica identity full"), ("part_root", "part_root_1")),
    "partitioned_mixed": Shape(
        ("create table part_mixed (id int primary key, v text) partition by range (id)",
         *(p.format("part_mixed") for p in PARTS), "alter table part_mixed_1 replica identity full",
         "alter table part_mixed_2 replica identity nothing"), ("part_mixed", "part_mixed_1")),
    "sub_partitioned": Shape(
        ("create table sub (id int, v text) partition by range (id)",
         "create table sub_1 partition of sub for values from (0) to (100) partition by range (id)",
         "create table sub_1_1 partition of sub_1 default", "create table sub_2 partition of sub default"),
        ("sub", "sub_1", "sub_1_1")),
    "foreign_partition": Shape(
        ("create foreign data wrapper nobody", "create server nowhere foreign data wrapper nobody",
         "create table fpart (id int not null, v text) partition by range (id)",
         "create table fpart_1 partition of fpart (primary key (id)) for values from (0) to (100)",
         "create foreign table fpart_2 partition of fpart default server nowhere"), ("fpart_1",), named=False),
    "unlogged": Shape(("create unlogged table unlogged_ (id int, v text)",), ("unlogged_",)),
    "unlogged_partition": Shape(
        ("create table upart (id int primary key, v text) partition by range (id)",
         "create unlogged table upart_1 partition of upart for values from (0) to (100)",
         "create table upart_2 partition of upart default"), ("upart", "upart_1")),
    "partial_unique": Shape(
        ("create table partial (id int not null, v text)", "create unique index on partial (id) where id > 5"), ("partial",)),
    "expression_unique": Shape(
        ("create table expr (id int not null, v text)", "create unique index on expr ((id + 1))"), ("expr",)),
    "mixed_expression": Shape(
        ("create table mixed_expr (id int not null, v text)", "create unique index on mixed_expr (id, (id + 1))"), ("mixed_expr",)),
    "typed": Shape(
        ("create type row_type as (id int, v text)", "create table typed of row_type (primary key (id))"), ("typed",)),
    "composite": Shape(("create table composite (id int primary key, v text, r row_type)",), ("composite",)),
    "rules": Shape(
        ("create table ruled (id int primary key, v text)", "create table rule_log (id int)",
         "create rule r as on update to ruled do also insert into rule_log values (old.id)"), ("ruled",)),
    "triggers": Shape(
        ("create table triggered (id int primary key, v text)", "create table trigger_log (id int, v text)",
         "create function note() returns trigger language plpgsql as $$ begin delete from trigger_log; return old; end $$",
         "create trigger t after update or delete on triggered for each row execute function note()"), ("triggered",)),
    "domains": Shape(
        ("create domain posint as int check (value > 0)", "create table domains (id posint primary key, v text)"), ("domains",)),
    "dropped": Shape(
        ("create table dropped (x int, id int primary key, y text, v text)", "alter table dropped drop column x, drop column y"),
        ("dropped",)),
    "odd": Shape(('create table "Odd "" %s.ünï" (id int, v text)',), ('"Odd "" %s.ünï"',)),
    "no_columns": Shape(("create table no_columns ()",), (), named=False),
    "matview": Shape(
        ("create materialized view mv as select id, v from plain", "create unique index on mv (id)"), (),
        ("refresh materialized view concurrently mv", "refresh materialized view mv"), named=False),
    "view": Shape(("create view seen as select * from plain",), ("seen",), named=False),
}  # fmt: skip
STATEMENTS = (
    "insert into {t} (id, v) values (7, 'x')",
    "update {t} set v = 'y'",
    "update {t} set id = 8 where id = 1",
    "delete from {t}",
    "truncate {t}",
    "insert into {t} (id, v) values (1, 'x') on conflict do nothing",
    "insert into {t} (id, v) values (1, 'x') on conflict (id) do update set v = 'z'",
    """merge into {t} using (values (1), (2)) s (i) on s.i = id when matched then update set v = 'm'
       when not matched then insert (id, v) values (s.i, 'n')""",
    "merge into {t} using (values (1)) s (i) on s.i = id when matched then delete",
    "select * from {t} for update",
)


def shapes(server: EmbeddedServer) -> dict[str, Shape]:
    with psycopg.connect(server.dsn()) as session:
        version = session.info.server_version // 10000
    return {name: shape for name, shape in SHAPES.items() if shape.since <= version}


def create_all(world: World) -> None:
    for shape in shapes(world.server).values():
        world.execute(*shape.create)
        for name in shape.names[:1] if shape.named else ():
            world.execute(f"insert into {name} (id, v) values (1, 'a'), (200, 'b')")


def working(world: World) -> set[str]:
    """The statements that the server accepts now; each is rolled back."""
    found = set()
    with psycopg.connect(world.dsn) as session:
        session.execute("create temporary table temporary_ (id int, v text)")
        session.commit()
        names = [name for shape in shapes(world.server).values() for name in shape.names]
        statements = [s.format(t=name) for name in (*names, "temporary_") for s in STATEMENTS]
        statements += [s for shape in shapes(world.server).values() for s in shape.more]
        for statement in statements:
            try:
                session.execute(statement.encode())
                found.add(statement)
            except psycopg.Error as error:
                assert error.sqlstate != "57014"
            session.rollback()
        for name in names:
            try:
                with session.cursor() as cursor, cursor.copy(f"copy {name} (id, v) from stdin".encode()) as copy:
                    copy.write("9\tc\n")
                found.add(f"copy {name}")
            except psycopg.Error:
                pass
            session.rollback()
    return found


def errors(world: World) -> list[Problem]:
    return [p for p in check(world.config()) if p.severity == "error"]


def mend(world: World) -> set[str]:
    """Execute each fix that is SQL until `check` has no error; the tables that were refused."""
    refused: set[str] = set()
    for _ in range(4):
        found = errors(world)
        if not found:
            return refused
        refused |= {p.object for p in found}
        for problem in found:
            if re.match(r"(alter|create|drop|grant) ", problem.fix):
                world.execute(problem.fix)
            else:
                world.consumers[0]["tables"] = [t for t in world.consumers[0]["tables"] if t != problem.object]
    raise AssertionError(f"the fixes do not help: {errors(world)}")


@pytest.mark.parametrize("by", ["name", "schema", "everything"])
def test_what_worked_before_the_bridge_works_beside_it(world: World, by: str) -> None:
    create_all(world)
    before = working(world)
    named = tuple(
        f"public.{s.names[0]}" for s in shapes(world.server).values() if s.named and not s.names[0].startswith('"')
    )
    tables = {"name": (*named, 'public.Odd " %s.ünï'), "schema": ("public.*",), "everything": ("*.*",)}[by]
    world.consumer(tables=tables)
    refused = mend(world)
    assert refused >= {"public.no_key", "public.deferrable_", "public.gone", "public.nothing_", "public.part_root",
                       "public.sub", 'public.Odd " %s.ünï', "public.gen_key"}  # fmt: skip
    assert not refused & {"public.plain", "public.by_index", "public.full_", "public.full_stored", "public.base",
                          "public.keyed_stored", "public.keyed_virtual", "public.part", "public.part_full", "public.dropped",
                          "public.included"}  # fmt: skip
    with world.bridge():
        assert before - working(world) == set()
        world.execute("refresh materialized view concurrently mv", "insert into plain values (500, 'x')",
                      "update plain set v = 'other' where id = 1", "delete from plain where id = 200",
                      "refresh materialized view concurrently mv", "insert into plain values (501, 'x')")  # fmt: skip
        eventually(lambda: world.value("select count(*) from messages where key = '501' and topic = 'public.plain'"))
        assert world.value("select count(*) from messages where topic = 'public.mv'") == 0


def test_the_identity_is_what_the_server_takes_for_one(
    pg15: EmbeddedServer, pg18: EmbeddedServer, tmp_path: Path
) -> None:
    """Differential: `check` finds trouble exactly where PostgreSQL refuses an UPDATE of a published table."""
    for server in (pg15, pg18):
        with fresh_database(server) as database:
            world = World(server, database, "pgoutput", tmp_path)
            create_all(world)
            newest = world.sql.info.server_version >= 180000
            compared = 0
            for table in leaves_and_tables(world):
                name = table.identifier.as_string()
                more = ", publish_generated_columns = stored" if newest else ""
                world.execute(
                    f"create publication p for table only {name} with (publish = 'insert, update, delete'{more})"
                )
                refused = False
                try:
                    world.execute(f"explain update {name} set v = v", f"update {name} set v = v where false")
                except psycopg.errors.ObjectNotInPrerequisiteState:
                    refused = True
                except psycopg.errors.InvalidColumnReference:  # 18: about generated columns
                    refused = True
                world.execute("drop publication p")
                trouble = identity_trouble(table, strict=newest)
                if trouble and "whose values do not arrive" in trouble:
                    assert not refused  # the server takes it; the plugins do not send its values
                else:
                    assert (trouble is not None) == refused, (table.topic, trouble, refused)
                compared += 1
            assert compared > 40
            world.close()


def leaves_and_tables(world: World) -> Iterator[Table]:
    for table in find_tables(world.sql, "public.*", "cdcbridge"):
        if table.kind == "r" and any(column.name == "v" for column in table.columns):
            yield table
        yield from (leaf for leaf in table.leaves if leaf.logged)


SQL_FIX = re.compile(r"(alter|create|drop|grant) ")


@pytest.mark.parametrize(
    ("create", "name", "works"),
    [
        ("create view v as select 1 as id", "v", False),
        ("create materialized view v as select 1 as id", "v", False),
        ("create foreign data wrapper w; create server s foreign data wrapper w; create foreign table v (id int) server s", "v", False),
        ("create unlogged table v (id int primary key)", "v", True),
        ("create table r (id int primary key) partition by range (id); create table v partition of r default", "v", False),
        ("create sequence v", "v", False),
        ("create type v as (id int)", "v", False),
    ],
)  # fmt: skip
def test_what_is_no_table_that_can_be_captured(world: World, create: str, name: str, works: bool) -> None:
    world.execute(*create.split("; "))
    world.consumer(tables=(f"public.{name}",))
    (problem,) = errors(world)
    assert problem.code in ("not_a_table", "table_missing")
    assert bool(SQL_FIX.match(problem.fix)) == works
    if works:
        world.execute(problem.fix)
        assert errors(world) == []


def test_rows_that_no_consumer_gets_are_named(world: World) -> None:
    world.execute(
        "create foreign data wrapper w", "create server s foreign data wrapper w",
        "create table root (id int, v text) partition by range (id)", "alter table root replica identity full",
        "create table leaf partition of root for values from (0) to (10)", "alter table leaf replica identity full",
        "create foreign table far partition of root for values from (10) to (20) server s",
        "create unlogged table fast partition of root for values from (20) to (30)",
        "create table base (id int primary key)", "create table kid () inherits (base)", "create table grandkid () inherits (kid)",
    )  # fmt: skip
    world.consumer(tables=("public.root", "public.base"))
    found = {p.code: p for p in check(world.config())}
    assert found.keys() == {"foreign_partition", "unlogged_partition", "inheritance_children"}
    assert "public.far" in found["foreign_partition"].message and "alter table" not in found["foreign_partition"].fix
    assert all(name in found["inheritance_children"].message for name in ("public.kid", "public.grandkid"))
    with world.bridge():
        world.execute("insert into fast values (21, 'no')", "insert into kid values (1)", "update kid set id = 2", "insert into leaf values (1, 'a')",
                      "update root set v = 'b' where id = 1", "insert into base values (1)")  # fmt: skip
        assert [(topic, data["op"]) for topic, _, data in world.messages(3)] == [
            ("public.root", "insert"), ("public.root", "update"), ("public.base", "insert")
        ]  # fmt: skip
    world.execute(
        *filter(str.strip, found["unlogged_partition"].fix.split(";")), "alter table fast replica identity full"
    )
    assert {p.code for p in check(world.config())} == {"foreign_partition", "inheritance_children"}
    world.consumer(tables=("public.root", "public.base", "public.kid", "public.grandkid"))
    assert "inheritance_children" not in {p.code for p in check(world.config())}


def test_a_partition_in_a_schema_that_is_taken_of_a_table_that_is_not(world: World) -> None:
    world.execute(
        "create schema s",
        "create table s.root (id int) partition by range (id)",
        "create table leaf partition of s.root default",
    )
    world.consumer(tables=("public.*",), operations=["insert"])
    (problem,) = errors(world)
    assert (problem.code, problem.object) == ("partition_elsewhere", "public.leaf")
    world.consumer("other", ("s.root",), operations=["insert"])
    assert errors(world) == []
    world.consumers.pop()
    world.execute(problem.fix, "create table t (id int)")
    assert errors(world) == []
    with world.bridge():
        world.execute("insert into s.root values (1)", "insert into t values (1)")
        assert [topic for topic, _, _ in world.messages(1)] == ["public.t"]
