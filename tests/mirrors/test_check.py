"""`cdcbridge check` about mirrors: each problem with its fix, and a plain role that gets exactly the printed grants."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import World, eventually, fresh_database
from tests.mirrors.pair import Pair

RIGHTS = {"mirror_origin_rights", "mirror_trigger_rights"}


def problems(world: World) -> dict[str, dict[str, str]]:
    """The problems that `check` finds, by their code."""
    found = json.loads(world.run_program("check", "--json").stdout)["problems"]
    return {one["code"]: one for one in found}


def mirror_problems(world: World) -> dict[str, dict[str, str]]:
    return {code: one for code, one in problems(world).items() if code.startswith("mirror_")}


def test_tables_that_do_not_fit(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute(
        "create table keyed (id int primary key)",
        "create table wide (id int primary key, extra numeric(9, 2))",
        'create table absent (id int primary key, "from" text not null)',
    )
    b.execute("create table keyed (id int)", "create table wide (id int primary key)")
    pair18.mirror(create_tables=False)
    found = mirror_problems(a)
    assert set(found) == {"mirror_no_unique_index", "mirror_column_missing", "mirror_table_missing"}
    assert found["mirror_column_missing"]["object"] == "public.wide"
    for one in found.values():
        b.execute(one["fix"])
    assert mirror_problems(a) == {}
    with pair18.running():
        a.execute("insert into absent values (1, 'x')", "insert into wide values (1, 2.5)")
        pair18.settle("keyed", "wide", "absent")


def test_a_target_that_cannot_be_reached(pair18: Pair) -> None:
    pair18.mirror(target={"dsn": pair18.b.dsn.replace(pair18.b.database, "nowhere")})
    found = mirror_problems(pair18.a)
    assert found["mirror_unreachable"]["severity"] == "error" and "nowhere" in found["mirror_unreachable"]["message"]


@pytest.mark.settings(track_commit_timestamp="off", wal_level="replica", max_replication_slots="1")
def test_settings_of_the_target(pair18: Pair, own15: EmbeddedServer) -> None:
    a = pair18.a
    a.execute("create table t (id int primary key)")
    with fresh_database(own15) as database:
        target = {"dsn": own15.dsn(database)}
        with psycopg.connect(own15.dsn(database), autocommit=True) as session:
            session.execute("select pg_replication_origin_create('taken')")
            pair18.mirror(target=target)
            assert set(mirror_problems(a)) == {"mirror_origins_exhausted"}
            pair18.mirror(target=target, two_way={"peer": "to_a"})
            found = mirror_problems(a)
            assert set(found) == {
                "mirror_origins_exhausted", "mirror_commit_timestamps", "mirror_wal_level", "mirror_peer",
            }  # fmt: skip
            session.execute("set search_path = pg_catalog")
            for code in ("mirror_origins_exhausted", "mirror_commit_timestamps", "mirror_wal_level"):
                session.execute(found[code]["fix"].encode())  # alter system
            session.execute("select pg_replication_origin_drop('taken')")


def test_a_plain_role_one_way(pair18: Pair) -> None:
    """Without any right for origins, a mirror works with triggers: fire, and `check` only warns."""
    a, b = pair18.sides
    role = f"plain_{b.database}"
    a.execute("create table t (id int primary key)", "insert into t values (1)")
    b.execute(f"create role {role} login", "drop schema cdcbridge cascade", "drop schema cdcbridge_internal cascade")
    pair18.mirror(target={"dsn": b.server.dsn(b.database, role)}, triggers="fire")
    found = mirror_problems(a)
    assert {code: one["severity"] for code, one in found.items()} == {
        "mirror_origin_rights": "warning", "mirror_schema_rights": "error", "mirror_table_rights": "error",
    }  # fmt: skip
    b.execute(*(one["fix"] for code, one in found.items() if code != "mirror_origin_rights"))
    assert set(mirror_problems(a)) == {"mirror_origin_rights"}
    with pair18.running():
        eventually(lambda: b.value("select to_regclass('public.t') is not null"), "the table")
        a.execute("insert into t values (2)", "update t set id = 3 where id = 1")
        pair18.settle("t")
    b.execute(f"drop owned by {role} cascade", f"drop role {role}")


@contextlib.contextmanager
def plain_sides(servers: tuple[EmbeddedServer, EmbeddedServer], folder: Path) -> Iterator[tuple[Pair, str]]:
    """A pair whose databases, stores and tables belong to a role that is no superuser."""
    with fresh_database(servers[0]) as first, fresh_database(servers[1]) as second:
        role = f"plain_{first}"
        worlds = []
        for number, (server, database) in enumerate(zip(servers, (first, second), strict=True)):
            with psycopg.connect(server.dsn(database), autocommit=True) as session:
                with contextlib.suppress(psycopg.errors.DuplicateObject):
                    session.execute(f"create role {role} login replication".encode())
                session.execute(f"alter database {database} owner to {role}".encode())
                session.execute(f"alter schema public owner to {role}".encode())
            home = folder / f"plain{number}"
            home.mkdir()
            worlds.append(World(server, database, "pgoutput", home))
            worlds[-1].user = role
        made = Pair(*worlds)
        try:
            yield made, role
        finally:
            made.close()
            for server, database in zip(servers, (first, second), strict=True):
                with psycopg.connect(server.dsn(database), autocommit=True) as session:
                    for (name,) in session.execute("select roname from pg_replication_origin").fetchall():
                        session.execute("select pg_replication_origin_drop(%s)", (name,))
                    session.execute(f"alter database {database} owner to postgres".encode())
                    session.execute(f"drop owned by {role} cascade".encode())
                    with contextlib.suppress(psycopg.errors.DependentObjectsStillExist):
                        session.execute(f"drop role {role}".encode())


def grant(world: World, found: dict[str, Any]) -> None:
    """Run the fixes as a superuser."""
    with psycopg.connect(world.server.dsn(world.database), autocommit=True) as session:
        for one in found.values():
            session.execute(one["fix"].encode())


@pytest.mark.parametrize("versions", ["15", "18"])
def test_a_plain_role_with_the_printed_grants_mirrors_in_both_directions(
    versions: str, request: pytest.FixtureRequest, pg18: EmbeddedServer, tmp_path: Path
) -> None:
    """The grants are those that `check` prints before, and no others."""
    first = request.getfixturevalue(f"pg{versions}")
    with plain_sides((first, pg18), tmp_path) as (pair, _role):
        a, b = pair.sides
        pair.both("create table t (id int primary key, v text)")
        pair.two_way()
        for side, other in ((a, b), (b, a)):
            found = problems(side)
            grant(side, {code: one for code, one in found.items() if not code.startswith("mirror_")})
            rights = {code: one for code, one in found.items() if code in RIGHTS}
            if side is a:
                assert set(rights) == RIGHTS
                assert all(one["severity"] == "error" for one in rights.values())
            grant(other, rights)
            assert set(problems(side)) == {"mirror_peer"}  # the other bridge has not begun
        with pair.running():
            a.execute("insert into t select n, 'a' from generate_series(1, 5) n")
            b.execute("insert into t select n, 'b' from generate_series(6, 10) n")
            pair.settle("t")
            a.execute("update t set v = 'from a' where id > 5")
            pair.settle("t")
            b.execute("delete from t where id < 3")
            pair.settle("t")
            assert pair.conflicts(a) == pair.conflicts(b) == []
            eventually(lambda: mirror_problems(a) == {} == mirror_problems(b), "nothing is missing")
