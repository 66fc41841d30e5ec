"""Publications: what is there before the first run, what locks it, and what it publishes beside rows."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest

from cdcbridge.checks.server import check
from cdcbridge.errors import CheckFailed, SourceUnavailable
from cdcbridge.problem import Problem
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.source import publications
from tests.harness.world import World, eventually


@pytest.fixture(params=["pg18", "pg15"])
def published(request: pytest.FixtureRequest) -> World:
    """A database with pgoutput."""
    world: World = request.getfixturevalue("world18" if request.param == "pg18" else "world15")
    world.plugin = "pgoutput"
    return world


def found(world: World) -> dict[str, Problem]:
    return {problem.code: problem for problem in check(world.config())}


@pytest.mark.parametrize(
    "made",
    [
        "for table t where (id > 5)",
        "for table t (id)",
        "for table t (id), table u where (id > 5)",
        "for table t, u with (publish = 'insert')",
        "for all tables with (publish = 'insert, update')",
        "for tables in schema public with (publish = 'insert, delete, truncate')",
    ],
)
def test_one_that_was_made_by_hand_and_leaves_changes_out(published: World, made: str) -> None:
    published.execute("create table t (id int primary key, v text)", "create table u (id int primary key)",
                      f"create publication cdcbridge {made}")  # fmt: skip
    published.consumer(tables=("public.t", "public.u"))
    problem = found(published)["publication_leaves_out"]
    assert problem.severity == "error"
    assert any(word in problem.message for word in ("row filter", "column list", "does not publish")), problem.message
    error = published.bridge_error()
    assert isinstance(error, CheckFailed) and problem.message in str(error)
    published.execute(problem.fix)
    assert found(published) == {}
    with published.bridge():
        published.execute("insert into t values (1, 'a')", "update t set v = 'b'", "delete from t")
        assert [(data["op"], data["record"]) for data in published.data(3)] == [
            ("insert", {"id": 1, "v": "a"}), ("update", {"id": 1, "v": "b"}), ("delete", {"id": 1})
        ]  # fmt: skip


def test_a_filter_on_a_table_that_nobody_takes_is_no_matter(published: World) -> None:
    published.execute("create table t (id int primary key)", "create table u (id int primary key)",
                      "create publication cdcbridge for table t, table u where (id > 5)")  # fmt: skip
    published.consumer()
    assert found(published) == {}
    with published.bridge():
        assert publications.publication(published.sql, "cdcbridge").tables == {"public.t"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", ["set table t (id)", "drop table t", "set (publish = 'insert')", "rename to other", None]
)
def test_later_it_is_told_as_a_warning_and_a_restart_mends_it(published: World, change: str | None) -> None:
    published.execute("create table t (id int primary key, v text)", "create table u (id int primary key)")
    published.consumer()
    with published.bridge():
        pass
    published.execute(f"alter publication cdcbridge {change}" if change else "drop publication cdcbridge")
    problem = found(published)["publication_leaves_out"]
    assert (problem.severity == "warning" and "public.t" in problem.message) or change != "drop table t"
    if change is None or change.startswith("rename"):
        published.execute(problem.fix)
        assert found(published).keys() == {"capture_changed"}, "what was left out meanwhile stays missing"
        return
    with published.bridge():
        assert found(published) == {}


@pytest.mark.parametrize("begun", [True, False])
def test_one_finding_tells_of_a_publication_that_the_role_may_not_change(published: World, begun: bool) -> None:
    """No second finding says that a start brings it into step, and only one has the fix."""
    published.execute("create table t (id int primary key)", "create table u (id int primary key)")
    name = f"plain_{published.database}"
    published.execute(f"create role {name} login replication", f"grant create on database {published.database} to {name}",
                      "create publication cdcbridge for table t, u with (publish_via_partition_root)")  # fmt: skip
    published.consumer(tables=("public.t", "public.u"))
    published.schema = "theirs"
    if begun:
        published.user = name
        with published.bridge():
            pass
    published.user = "postgres"
    published.execute("alter publication cdcbridge " + ("drop table u" if begun else "set (publish = 'insert')"))
    published.user = name
    concerned = [p for p in check(published.config()) if p.code.startswith("publication")]
    assert [p.severity for p in concerned] == ["error"], concerned
    assert "corrects it when it starts" not in concerned[0].message
    assert "public.u" in concerned[0].message or not begun
    # The same where another error hides what the role may not do.
    published.consumer("other", ("public.absent",))
    concerned = [p for p in check(published.config()) if p.code.startswith("publication")]
    assert concerned and all("corrects it when it starts" not in p.message for p in concerned), concerned
    published.user = "postgres"


def test_a_file_that_has_changed_is_no_fault_of_the_publication(published: World) -> None:
    published.execute("create table t (id int primary key)", "create table u (id int primary key)")
    published.consumer(operations=["insert"])
    with published.bridge():
        pass
    published.consumer(tables=("public.t", "public.u"))
    assert found(published) == {}


def test_children_that_it_lists_are_taken_out(published: World) -> None:
    """An application's UPDATE of a child without a key must work, whoever made the publication."""
    published.execute("create table base (id int primary key, v text)", "create table kid () inherits (base)",
                      "create table grandkid () inherits (kid)", "insert into kid values (1, 'a')",
                      "insert into grandkid values (2, 'a')", "create publication cdcbridge for table base")  # fmt: skip
    published.consumer(tables=("public.base",))
    assert found(published).keys() == {"inheritance_children"}
    with published.bridge():
        published.execute("update kid set v = 'b'", "update base set v = 'c'", "delete from kid",
                          "insert into base values (3, 'x')", "update base set v = 'd'")  # fmt: skip
        assert [data["record"]["id"] for data in published.data(2)] == [3, 3]


def test_it_never_waits_long_for_a_lock_and_says_who_holds_it(published: World) -> None:
    published.execute("create table t (id int primary key)")
    published.consumer()
    wanted = publications.needed(published.config(), published.sql)
    with psycopg.connect(published.dsn) as holder:
        holder.execute("lock table t in share update exclusive mode")
        began = time.monotonic()
        with pytest.raises(
            SourceUnavailable, match=f"pid {holder.info.backend_pid} .* holds a ShareUpdateExclusiveLock on public.t"
        ):
            publications.ensure_publications(published.sql, wanted)
        assert time.monotonic() - began < 10
        warning = found(published)["publication_locked"]
        assert warning.severity == "warning" and f"pid {holder.info.backend_pid}" in warning.message
        assert warning.fix.startswith(f"select pg_terminate_backend({holder.info.backend_pid})")
        released = threading.Timer(3, holder.rollback)
        released.start()
        with published.bridge():  # it tries again until it may
            released.join()
            published.execute("insert into t values (1)")
            published.messages(1)


@pytest.mark.newest
def test_stored_generated_columns_that_an_update_needs(world18: World) -> None:
    """REPLICA IDENTITY FULL: PostgreSQL 18 wants them published. They are in no message, whatever else is."""
    world18.execute(
        "create table t (id int, v text, g text generated always as (v || v) stored, w int)",
        "alter table t replica identity full", "alter table t alter v set storage external, alter g set storage external",
        "create table k (id int, g int generated always as (id) stored, w int, primary key (id))",
    )  # fmt: skip
    world18.consumer(tables=("public.*",))
    world18.consumer("inserts", ("public.t", "public.k"), operations=["insert"])
    with world18.bridge():
        world18.execute("insert into t (id, v, w) values (1, repeat('x', 5000), 1)", "update t set w = 2", "update t set v = 'y'",
                        "delete from t", "insert into k (id, w) values (1, 1)", "update k set id = 2", "delete from k")  # fmt: skip
        data = world18.data(7)
        long = "x" * 5000
        assert [(d["op"], d["record"], d["old"], d["unchanged"]) for d in data] == [
            ("insert", {"id": 1, "v": long, "w": 1}, None, []),
            ("update", {"id": 1, "v": long, "w": 2}, {"id": 1, "v": long, "w": 1}, []),
            ("update", {"id": 1, "v": "y", "w": 2}, {"id": 1, "v": long, "w": 2}, []),
            ("delete", {"id": 1, "v": "y", "w": 2}, None, []),
            ("insert", {"id": 1, "w": 1}, None, []),
            ("update", {"id": 2, "w": 1}, {"id": 1}, []),
            ("delete", {"id": 2}, None, []),
        ]
        # A table that comes later under the wildcard has the same need.
        world18.execute("create table later (id int, g int generated always as (id) stored)",
                        "alter table later replica identity full", "insert into later values (1)",
                        "update later set id = 2")  # fmt: skip
    assert publications.publication(world18.sql, "cdcbridge").generated  # type: ignore[union-attr]


ODD = (
    'Upper"Case',
    "with space",
    "a.b.c",
    "größe",
    "100%s",
    "tab\tle",
    "x" * 63,
    "'quoted'",
    "\\back",
    "{brace}",
    "select",
)


def test_odd_names_of_tables_and_schemas(published: World) -> None:
    schemas = ("public", 'Od"d %s schêma')
    names = [(schema, table) for schema in schemas for table in ODD]
    published.sql.execute('create schema "Od""d %s schêma"')
    for schema, table in names:
        published.sql.execute(
            psycopg.sql.SQL("create table {} (id int primary key)").format(psycopg.sql.Identifier(schema, table))
        )
    published.consumer("named", tuple(f"{schema}.{table}" for schema, table in names))
    published.consumer("wild", tuple(f"{schema}.*" for schema in schemas), operations=["insert"])
    assert [p for p in check(published.config()) if p.severity == "error"] == []
    with published.bridge():
        for schema, table in names:
            published.sql.execute(
                psycopg.sql.SQL("insert into {} values (1)").format(psycopg.sql.Identifier(schema, table))
            )
        topics = [topic for topic, _, _ in published.messages(len(names))]
        assert topics == [f"{schema}.{table}" for schema, table in names]


def test_a_schema_whose_name_has_a_dot(published: World) -> None:
    published.execute(
        'create schema "a.b"',
        "create schema a",
        'create table "a.b".c (id int)',
        'create table a."b.c" (id int primary key)',
    )
    published.consumer(tables=("*.*",))
    problem = found(published)["schema_dot"]
    assert problem.severity == "error" and problem.object == "a.b"
    published.consumer(tables=("a.b.c",))
    assert found(published) == {}
    with published.bridge():
        published.execute(
            'insert into "a.b".c values (1)', 'update "a.b".c set id = 2', 'insert into a."b.c" values (3)'
        )
        assert [(topic, data["record"]) for topic, _, data in published.messages(1)] == [("a.b.c", {"id": 3})]
    published.consumer(tables=("*.*",))
    published.execute(problem.fix, "alter table a_b.c add primary key (id)")
    assert "schema_dot" not in found(published)


def test_the_router_never_confuses_them() -> None:
    for pattern in ("a.b.c", "a.*", "*.*"):
        router = Router([Subscription(1, "c", (pattern,), frozenset({"insert"}))])
        assert router.subscriptions("a.b", "c") == []
        assert len(router.subscriptions("a", "b.c")) == 1


def test_an_existing_one_lists_the_table_of_a_dotted_schema(published: World) -> None:
    published.execute('create schema "a.b"', "create schema a", 'create table "a.b".c (id int)', 'create table a."b.c" (id int primary key)',
                      'create publication cdcbridge for table "a.b".c')  # fmt: skip
    published.consumer(tables=("a.b.c",))
    with published.bridge():
        published.execute('insert into a."b.c" values (3)', 'update "a.b".c set id = 2')
        published.messages(1)


def test_a_bridge_that_cannot_get_the_lock_lets_others_pass(published: World) -> None:
    """What waits behind our ALTER PUBLICATION waits no longer than its lock timeout."""
    published.execute("create table t (id int primary key)")
    published.consumer()
    wanted = publications.needed(published.config(), published.sql)
    with psycopg.connect(published.dsn) as holder, psycopg.connect(published.dsn, autocommit=True) as other:
        holder.execute("lock table t in share update exclusive mode")
        failed: list[BaseException] = []

        def ensure() -> None:
            try:
                publications.ensure_publications(published.sql, wanted)
            except SourceUnavailable as error:
                failed.append(error)

        thread = threading.Thread(target=ensure)
        thread.start()
        waits = "select from pg_locks where relation = 't'::regclass and not granted"
        eventually(lambda: other.execute(waits).fetchone() is not None, "it waits for the lock")
        began = time.monotonic()
        other.execute("insert into t values (1)")  # conflicts with neither
        assert time.monotonic() - began < 1
        thread.join()
        assert failed
