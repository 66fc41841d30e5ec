"""A slot has one store: a second store neither takes its changes nor removes it, and what no longer meets is found."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.schemas import both
from tests.harness.forked import program
from tests.harness.world import PATIENCE, World, eventually, fresh_database


def run(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    world.write_config()
    return program(world.folder, *arguments)


def problems(world: World) -> dict[str, dict[str, str]]:
    """The errors of `check`, by code."""
    result = run(world, "check", "--json")
    found = json.loads(result.stdout)["problems"]
    errors = {problem["code"]: problem for problem in found if problem["severity"] == "error"}
    assert result.returncode == (2 if errors else 0), result
    return errors


def slot(world: World) -> tuple[Any, ...]:
    query = "select confirmed_flush_lsn::text, restart_lsn::text from pg_replication_slots where slot_name = %s"
    found = world.sql.execute(query, (world.slot,)).fetchone()
    assert found is not None, "the slot is gone"
    return tuple(found)


def schemas(world: World) -> list[str]:
    return [name for (name,) in world.sql.execute("select nspname from pg_namespace where nspname ~ '^cdc'")]


@pytest.fixture
def stopped(world: World) -> World:
    """A bridge has run and stopped, and a row has been written since."""
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1)")
        world.messages(1)
    world.execute("insert into t values (2)")
    return world


def continues(world: World, messages: int = 2) -> None:
    """The first store has lost nothing."""
    world.schema = "cdcbridge"
    assert problems(world) == {}
    with world.bridge():
        world.messages(messages)


@pytest.mark.parametrize("migrated", [False, True])
def test_a_second_store_refuses_the_slot_of_the_first(stopped: World, migrated: bool) -> None:
    before = slot(stopped)
    stopped.schema = "cdc3"
    if migrated:
        assert run(stopped, "migrate").returncode == 0
    found = problems(stopped)["slot_of_other_store"]
    assert found["object"] == stopped.slot
    assert found["message"].startswith(f"the slot {stopped.slot} belongs to the store in the schema cdcbridge"), found
    assert "source.slot" in found["fix"] and "store.schema back to cdcbridge" in found["fix"]
    refused = run(stopped, "run")
    assert refused.returncode == 2 and found["message"] in " ".join(refused.stderr.split()), refused
    assert slot(stopped) == before
    stores = ["cdcbridge", "cdc3"] if migrated else ["cdcbridge"]
    assert set(schemas(stopped)) == {name for store in stores for name in both(store)}, "nothing is written"
    dropped = run(stopped, "slot", "drop", "--yes")
    assert dropped.returncode == 2 and "belongs to the store in the schema cdcbridge" in dropped.stderr, dropped
    assert slot(stopped) == before
    continues(stopped)


def test_a_second_store_on_another_server_refuses_it_too(stopped: World, pg15: EmbeddedServer) -> None:
    with fresh_database(pg15) as elsewhere:
        stopped.store_dsn = pg15.dsn(elsewhere)
        assert "(database " in problems(stopped)["slot_of_other_store"]["message"]
        assert run(stopped, "run").returncode == 2
        with psycopg.connect(stopped.store_dsn) as store:
            assert store.execute("select to_regnamespace('cdcbridge')").fetchone() == (None,)
        stopped.store_dsn = None
    continues(stopped)


def test_two_stores_on_another_server_see_each_other(world18: World, pg15: EmbeddedServer) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    with fresh_database(pg15) as elsewhere:
        world18.store_dsn = pg15.dsn(elsewhere)
        with world18.bridge():
            pass
        world18.schema = "cdc3"
        assert "slot_of_other_store" in problems(world18)
        world18.schema = "cdcbridge"
        assert problems(world18) == {}


def test_a_store_that_this_role_may_not_read_may_be_the_owner(stopped: World) -> None:
    role = f"weak_{stopped.database}"
    stopped.execute(f"create role {role} login superuser", f"alter role {role} nosuperuser replication",
                    f"grant create on database {stopped.database} to {role}")  # fmt: skip
    stopped.schema, stopped.user = "cdc3", role
    try:
        found = problems(stopped)
        stopped.user = "postgres"
        assert "this role may not read it" in found["slot_owner_unknown"]["message"]
        granted = found["slot_owner_unknown"]["fix"]
        assert granted.startswith("grant usage on schema cdcbridge_internal to "), granted
        stopped.execute(granted.partition(" -- ")[0])
        stopped.user = role
        assert "belongs to the store in the schema cdcbridge" in problems(stopped)["slot_of_other_store"]["message"]
    finally:
        stopped.user = "postgres"
        stopped.execute(f"drop owned by {role}", f"drop role {role}")
    continues(stopped)


def test_a_store_that_has_ended_does_not_hinder(stopped: World) -> None:
    stopped.sql.execute("select pg_drop_replication_slot(%s)", (stopped.slot,))
    stopped.schema = "cdc3"
    assert problems(stopped) == {}
    assert run(stopped, "slot", "create").returncode == 0
    assert problems(stopped) == {}, "the slot is newer than the first store's end"
    with stopped.bridge():
        stopped.execute("insert into t values (3)")
        stopped.messages(1)
    assert problems(stopped) == {}
    stopped.schema = "cdcbridge"
    assert "slot_beyond_store" in problems(stopped)
    now = slot(stopped)
    for command in (("drop", "--yes"), ("recreate", "--yes"), ("skip", "--yes", "--to", now[0])):
        refused = run(stopped, "slot", *command)
        assert refused.returncode == 2, (command, refused)
        assert "belongs to the store in the schema cdc3" in " ".join(refused.stderr.split()), (command, refused)
    assert slot(stopped) == now
    stopped.schema = "cdc3"
    with stopped.bridge():
        stopped.execute("insert into t values (4)")
        stopped.messages(2)


def test_the_store_of_another_source_does_not_hinder(stopped: World) -> None:
    stopped.execute("update cdcbridge_internal.source set system_identifier = '1'")
    stopped.schema = "cdc3"
    assert problems(stopped) == {}
    stopped.execute("update cdcbridge_internal.source set system_identifier = (select system_identifier from pg_control_system()),"
                    " database_oid = 1")  # fmt: skip
    assert problems(stopped) == {}
    stopped.execute("update cdcbridge_internal.source set database_oid = null")
    assert "slot_of_other_store" in problems(stopped), "a store from before the OID was kept"


def test_two_stores_of_one_slot_are_a_warning_to_both(stopped: World) -> None:
    stopped.execute("create schema cdc3_internal")
    for name in ("source", "positions", "leaders"):
        stopped.execute(f"create table cdc3_internal.{name} as table cdcbridge_internal.{name}")
    result = run(stopped, "check")
    assert result.returncode == 0, result
    assert f"warning: {stopped.slot}: the store in the schema cdc3" in " ".join(result.stdout.split())


def refused_alike(world: World, code: str, *, extra: str = "") -> str:
    """`check` and `run` say the same, and `check` changes nothing."""
    found = problems(world)[code]
    process = world.start_process()
    assert process.wait(PATIENCE) == 3
    said, logged = (re.sub(r"WAL at [0-9A-F/]+", "WAL at LSN", text) for text in (found["message"], world.log()))
    assert said in logged, (said, logged)
    assert extra in found["message"], found
    return found["fix"]


def test_check_finds_that_the_slot_is_ahead_of_the_store(stopped: World) -> None:
    end = stopped.sql.execute("select pg_current_wal_lsn()::text").fetchone()
    assert end is not None
    stopped.sql.execute("select pg_replication_slot_advance(%s, %s)", (stopped.slot, end[0]))
    fix = refused_alike(stopped, "slot_beyond_store", extra="the changes between them are lost")
    assert "cdcbridge slot skip --to " in fix


def test_check_finds_that_the_source_was_set_back(stopped: World) -> None:
    stopped.execute("update cdcbridge_internal.positions set end_lsn = 'FFFF/0'")
    refused_alike(stopped, "source_set_back", extra="the source was restored to an earlier state")


def test_check_finds_another_history(stopped: World) -> None:
    stopped.execute("update cdcbridge_internal.source set system_identifier = '1'")
    refused_alike(stopped, "other_source", extra="its system identifier is '1'")
    stopped.execute("update cdcbridge_internal.source set system_identifier = (select system_identifier from pg_control_system()),"
                    " slot = 'elsewhere'")  # fmt: skip
    refused_alike(stopped, "other_source", extra="its slot is 'elsewhere'")


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
@pytest.mark.settings(max_slot_wal_keep_size="1MB", wal_keep_size="0", min_wal_size="32MB", max_wal_size="32MB")
def test_check_says_a_lost_slot_as_run_does(own15: EmbeddedServer, tmp_path: Any, plugin: str) -> None:
    with fresh_database(own15) as database:
        world = World(own15, database, plugin, tmp_path)
        world.execute("create table t (id int primary key)")
        world.consumer()
        with world.bridge():
            pass
        eventually(lambda: lose(world), "the slot is lost")
        refused_alike(world, "slot_lost", extra="are lost")
        world.close()


def lose(world: World) -> bool:
    world.execute("insert into t select coalesce(max(id), 0) + 1 from t", "select pg_switch_wal()", "checkpoint")
    found = world.sql.execute("select wal_status from pg_replication_slots where slot_name = %s", (world.slot,))
    return found.fetchone() == ("lost",)


def test_check_is_quiet_while_a_bridge_streams(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    world.start_process()
    eventually(world.active, "the bridge streams")
    for number in range(20):
        world.execute(f"insert into t values ({number})")
        assert problems(world) == {}
