"""`check` names each thing that is missing with its mend, and `run` refuses in the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.checks.server import check
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import CheckFailed, OperatorNeeded
from cdcbridge.source import plugins
from cdcbridge.source.slots import create_slot
from tests.harness.world import World, eventually, fresh_database


def problems(world: World) -> dict[str, dict[str, Any]]:
    """By code; the exit code agrees with `ok`, and errors are what `run` says too."""
    result = world.run_program("check", "--json")
    found = json.loads(result.stdout)
    errors = [p for p in found["problems"] if p["severity"] == "error"]
    assert found["ok"] == (not errors)
    assert result.returncode == (2 if errors else 0)
    for problem in found["problems"]:
        assert set(problem) == {"code", "severity", "object", "message", "fix"} and all(problem.values())
    if errors:
        run = world.run_program("run", "--no-wait")
        assert run.returncode == 2, run.stderr
        assert all(p["message"] in run.stderr for p in errors), run.stderr
    return {p["code"]: p for p in found["problems"]}


def test_all_is_well(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    assert problems(world) == {}


def test_tables(world: World) -> None:
    world.execute(
        "create table bare (v int)",
        "create table part (a int primary key, b int not null)",
        "create view v as select 1 as x",
        "create table gen (id int primary key, g int generated always as (id) stored)",
    )
    world.consumer("a", ("public.absent",))
    world.consumer("b", ("public.bare",))
    world.consumer("c", ("public.part",), key=["b"])
    world.consumer("d", ("public.v",))
    world.consumer("e", ("public.gen",))
    world.consumer("f", ("nowhere.*",))
    world.consumer("g", ("cdcbridge.messages",))
    found = problems(world)
    assert found.keys() >= {"table_missing", "replica_identity", "key_not_covered", "not_a_table", "generated_columns",
                            "schema_missing", "own_schema"}  # fmt: skip
    assert found["replica_identity"]["object"] == "public.bare"
    assert found["replica_identity"]["fix"].startswith('alter table "public"."bare" replica identity full;')
    assert "b" in found["key_not_covered"]["message"]
    assert found["generated_columns"]["severity"] == "warning" and "g" in found["generated_columns"]["message"]
    world.execute(found["replica_identity"]["fix"], found["key_not_covered"]["fix"])
    found = problems(world)
    assert "replica_identity" not in found and "key_not_covered" not in found


@pytest.mark.settings(wal_level="replica")
def test_wal_level(own15: EmbeddedServer, tmp_path: object) -> None:
    with fresh_database(own15) as database:
        world = World(own15, database, "pgoutput", tmp_path)  # type: ignore[arg-type]
        world.execute("create table t (id int primary key)")
        world.consumer()
        assert "wal_level = 'logical'" in problems(world)["wal_level"]["fix"]
        world.close()


@pytest.mark.settings(max_replication_slots="1")
def test_no_free_slot(own15: EmbeddedServer, tmp_path: object) -> None:
    with fresh_database(own15) as database:
        world = World(own15, database, "pgoutput", tmp_path)  # type: ignore[arg-type]
        world.execute(
            "create table t (id int primary key)", "select pg_create_logical_replication_slot('x', 'pgoutput')"
        )
        world.consumer()
        assert "max_replication_slots" in problems(world)["no_free_slot"]["fix"]
        world.close()


def test_a_missing_plugin(world18: World) -> None:
    world18.plugin = "wal2json"
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    package = f"postgresql-{world18.sql.info.server_version // 10000}-wal2json"
    assert f"apt-get install {package}" in problems(world18)["plugin_missing"]["fix"]


@pytest.mark.settings(output_plugin_libraries="pgoutput, test_decoding")
def test_a_plugin_that_the_server_does_not_list(own15: EmbeddedServer, tmp_path: Path) -> None:
    """As after an update to 15.19, for a role that may not read the setting; without a slot, and with one."""
    with fresh_database(own15) as database:
        world = World(own15, database, "wal2json", tmp_path)
        world.execute("create table t (id int primary key)", "create role reader login replication")
        world.consumer()
        with psycopg.connect(own15.dsn(database, "reader")) as reader:
            assert plugins.listed(reader) == []
        with pytest.raises(OperatorNeeded, match="may not be used") as raised:
            create_slot(world.dsn, "x", "wal2json", failover=False, waiting=print)
        assert raised.value.hint and "output_plugin_libraries" in raised.value.hint  # no grant would help
        fix = problems(world)["plugin_refused"]["fix"].partition(" -- ")[0]
        world.execute(*fix.split(";")[:-1])
        eventually(lambda: problems(world) == {}, "the setting is read")
        with world.bridge():
            pass  # there is a slot now
        world.execute("alter system set output_plugin_libraries = pgoutput", "select pg_reload_conf()")
        eventually(lambda: "plugin_refused" in problems(world), "the setting is read again")
        assert isinstance(world.bridge_error(), CheckFailed)
        world.close()


@pytest.mark.parametrize("plugin", ["wal2json", "auto"])
def test_a_list_of_plugins_that_the_server_reads_as_one_name(
    own15: EmbeddedServer, tmp_path: Path, plugin: str
) -> None:
    """Quotes around the whole list, quotes in quotes, spaces, large letters: without a slot, and with one."""
    one_name = {"'pgoutput, wal2json'": "'pgoutput', 'wal2json';", "'\"pgoutput\", \"wal2json\"'": "'pgoutput', 'wal2json';",
                "' wal2json ', ' pgoutput '": "'wal2json', 'pgoutput';", "'WAL2JSON'": "'WAL2JSON', ", "''": "'"}  # fmt: skip
    with fresh_database(own15) as database:
        world = World(own15, database, plugin, tmp_path)
        world.execute("create table t (id int primary key)")
        world.consumer()

        def load(statements: str) -> None:
            before = world.sql.execute("select pg_conf_load_time()").fetchone()
            world.execute(*statements.split(";")[:-1])
            eventually(lambda: world.sql.execute("select pg_conf_load_time()").fetchone() != before, "it is read")

        for given, mended in one_name.items():
            load(f"alter system set output_plugin_libraries = {given}; select pg_reload_conf();")
            (found,) = (p for p in check(world.config()) if p.severity == "error")
            assert found.code == "plugin_refused" and f"output_plugin_libraries = {mended}" in found.fix, found
            load(found.fix.partition(" -- ")[0])
            assert not any(p.severity == "error" for p in check(world.config()))
        assert world.run_program("slot", "create").returncode == 0
        load("alter system set output_plugin_libraries = 'pgoutput, wal2json'; select pg_reload_conf();")
        refused = problems(world)["plugin_refused"]
        assert "reads as one name" in refused["message"]
        load(refused["fix"].partition(" -- ")[0])
        with world.bridge():
            pass
        world.close()


@pytest.mark.settings(max_replication_slots="1", output_plugin_libraries="pgoutput")
def test_a_plugin_that_is_not_listed_where_all_slots_are_taken(own15: EmbeddedServer, tmp_path: Path) -> None:
    with fresh_database(own15) as database:
        world = World(own15, database, "wal2json", tmp_path)
        world.execute(
            "create table t (id int primary key)", "select pg_create_logical_replication_slot('x', 'pgoutput')"
        )
        world.consumer()
        assert problems(world).keys() == {"no_free_slot", "plugin_refused"}
        world.close()


def test_auto_takes_the_slots_plugin_or_one_that_works(world15: World, world18: World) -> None:
    for world, existing in ((world15, "wal2json"), (world15, None), (world18, None)):
        world.plugin = "auto"
        world.slot = f"{world.database}_{existing or 'none'}"
        world.execute("create table if not exists t (id int primary key)")
        world.consumer()
        if existing:
            world.execute(f"select pg_create_logical_replication_slot('{world.slot}', '{existing}')")
        world.execute("drop schema if exists cdcbridge, cdcbridge_internal cascade")
        with world.bridge():
            # Debian's wal2json 2.5 does not know numeric-data-types-as-string.
            assert world.value("select plugin from source") == (existing or "pgoutput")


def test_the_encoding_of_a_database_for_wal2json(pg15: EmbeddedServer, tmp_path: object) -> None:
    with fresh_database(pg15, "encoding 'LATIN1' template template0 locale 'C'") as database:
        world = World(pg15, database, "wal2json", tmp_path)  # type: ignore[arg-type]
        world.execute("create table t (id int primary key)")
        world.consumer()
        assert "LATIN1" in problems(world)["encoding"]["message"]
        world.close()


def test_a_slot_of_another_plugin_or_database(world15: World) -> None:
    world15.execute(
        "create table t (id int primary key)",
        f"select pg_create_logical_replication_slot('{world15.slot}', 'test_decoding')",
    )
    world15.consumer()
    assert "test_decoding" in problems(world15)["slot_plugin"]["message"]
    with fresh_database(world15.server) as other:
        elsewhere = World(world15.server, other, "wal2json", world15.folder)
        elsewhere.slot = world15.slot
        elsewhere.execute("create table t (id int primary key)")
        elsewhere.consumer()
        assert world15.database in problems(elsewhere)["slot_database"]["message"]
        elsewhere.close()


def test_a_role_without_rights_gets_the_sql_for_the_owner_and_run_works_with_it(world: World) -> None:
    role = f"r_{world.database}"
    with psycopg.connect(world.dsn, autocommit=True) as owner:
        owner.execute(f"create role {role} login".encode())
        try:
            owner.execute(b"create table t (id int primary key)")
            world.user = role
            world.consumer()
            found = problems(world)
            assert found["privilege_replication"]["fix"] == f"alter role {role} replication;"
            assert found["privilege_store"]["fix"] == f"grant create on database {world.database} to {role};"
            for code in ("privilege_replication", "privilege_store"):
                owner.execute(found[code]["fix"].encode())
            if world.plugin == "pgoutput":
                fix = found["publication"]["fix"] if "publication" in found else problems(world)["publication"]["fix"]
                assert fix.startswith('create publication "cdcbridge" for table only "public"."t"')
                owner.execute(fix.encode())
            assert problems(world) == {}
            with world.bridge():
                owner.execute(b"insert into t values (1)")
                assert world.messages(1)[0][1] == "1"
        finally:
            world.user = "postgres"
            if world._sql is not None:
                world.leave()
            owner.execute(b"drop publication if exists cdcbridge")
            owner.execute(f"drop owned by {role} cascade".encode())
            owner.execute(f"drop role {role}".encode())


def test_a_publication_missing_a_table_is_brought_into_step(world18: World) -> None:
    world18.execute("create table t (id int primary key)", "create table u (id int primary key)")
    world18.execute("create publication cdcbridge for table t")
    world18.consumer(tables=("public.t", "public.u"))
    with world18.bridge():
        world18.execute("insert into u values (1)")
        assert world18.messages(1)[0][0] == "public.u"
    world18.consumer(tables=("public.u",))
    with world18.bridge():
        rows = world18.sql.execute("select tablename from pg_publication_tables where pubname = 'cdcbridge'").fetchall()
        assert rows == [("u",)]


def test_a_slot_that_is_gone_is_told_by_check_lag_and_create_as_by_run(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    with world18.bridge():
        pass
    assert world18.run_program("slot", "drop", "--yes").returncode == 0
    checked = world18.run_program("check", "--json")
    assert [p["code"] for p in json.loads(checked.stdout)["problems"]] == ["slot_gone"]
    for command in (("lag",), ("slot", "create"), ("run",)):
        result = world18.run_program(*command)
        assert (result.returncode, "slot recreate" in result.stderr) == (3, True), (command, result.stderr)
    assert world18.run_program("slot", "recreate", "--yes").returncode == 0
    (gap,) = world18.rows(
        "select commit_time > now() - interval '1 minute' from messages where topic = 'cdcbridge.gap'"
    )
    assert gap == (True,)
    assert world18.run_program("check").returncode == 0
    world18.slot = "another"
    assert "source.slot back to" in world18.run_program("check").stdout


def test_roles_and_rights_that_consumers_need(world18: World) -> None:
    role = f"r_{world18.database}"
    world18.execute("create table t (id int primary key)", f"create role {role} login replication")
    try:
        world18.execute(f"grant create on database {world18.database} to {role}")
        world18.execute("create publication cdcbridge for table t with (publish_via_partition_root = true)")
        world18.consumer(start="snapshot", role="nobody_here")
        world18.user = role
        found = problems(world18)
        assert found["privilege_select"]["fix"] == f'grant select on "public"."t" to {role};'
        assert found["role_missing"]["fix"] == "create role nobody_here login;"
        assert set(found) == {"privilege_select", "role_missing"}
    finally:
        world18.user = "postgres"
        world18.execute(f"drop owned by {role} cascade", f"drop role {role}")


def test_a_stand_by_that_means_another_slot_says_so_before_it_is_needed(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    with world18.bridge():
        right, world18.slot = world18.slot, "another"
        for command in (("run",), ("lag",)):
            result = world18.run_program(*command)
            assert result.returncode == (3 if command == ("run",) else 0)
            assert right in result.stderr and "source.slot back" in result.stderr, result.stderr
            assert "`cdcbridge run` creates it" not in result.stderr
        world18.slot = right
        world18.write_config()


def test_a_role_without_rights_on_the_store_is_told_so(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    with world18.bridge():
        pass
    world18.execute("drop role if exists stranger", "create role stranger login replication")
    world18.user = "stranger"
    for command in (("lag",), ("receive", "c"), ("check",), ("migrate",)):
        result = world18.run_program(*command)
        said = result.stderr + result.stdout
        assert result.returncode != 0 and "may not use the store's schema" in said and "grant usage" in said, said
    world18.execute("drop role stranger")
