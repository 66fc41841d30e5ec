"""What `status` and `lag` cannot know is said to be unknown, with the reason; the other half is shown nevertheless."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.forked import program
from tests.harness.world import World, eventually, fresh_database


def run(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    world.write_config()
    result = program(world.folder, *arguments)
    return subprocess.CompletedProcess(result.args, result.returncode, " ".join(result.stdout.split()), result.stderr)


@pytest.fixture(params=["pg15-wal2json", "pg15-pgoutput", "pg18-pgoutput"])
def streaming(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A bridge streams and has one message for the consumer of a role; the store has a DSN of its own."""
    server_name, plugin = request.param.split("-")
    server: EmbeddedServer = request.getfixturevalue(server_name)
    with fresh_database(server) as database:
        world = World(server, database, plugin, tmp_path)
        role = f"app_{database}"
        world.execute("create table t (id int primary key)", f"create role {role} login")
        world.store_dsn = world.dsn
        world.consumer("billing", role=role)
        world.consumer("hidden")
        world.start_process()
        eventually(world.active, "the bridge streams")
        world.execute("insert into t values (1)")
        world.messages(1)
        yield world
        world.user, world.store_dsn = "postgres", None
        world.execute(f"drop owned by {role}", f"drop role {role}")
        world.close()


def refused(world: World) -> str:
    """A DSN that the server refuses."""
    return world.dsn.replace("postgres", "nobody", 1) if "user=postgres" in world.dsn else world.dsn + " user=nobody"


def test_a_store_that_refuses_is_unknown(streaming: World) -> None:
    streaming.store_dsn = refused(streaming)
    result = run(streaming, "status")
    assert result.returncode == 1, result
    assert "store: no connection to " in result.stdout and 'role "nobody" does not exist' in result.stdout
    assert "bridge unknown: the store cannot be read" in result.stdout
    assert "store schema cdcbridge, unknown: it cannot be read" in result.stdout
    assert "not created yet" not in result.stdout and "no bridge is running" not in result.stdout
    assert "active, wal_status reserved" in result.stdout
    (process,) = streaming._processes
    process.kill()
    process.wait()
    eventually(lambda: not streaming.active(), "the slot is free")
    assert run(streaming, "lag").stdout.startswith(f"no bridge reads the slot {streaming.slot}: none is running, or it")
    assert json.loads(run(streaming, "status", "--json").stdout)["store_version"] is None


def test_a_source_that_refuses_leaves_the_half_of_the_store(streaming: World) -> None:
    streaming.settings["dsn"] = refused(streaming)
    result = run(streaming, "lag")
    assert result.returncode == 1, result
    assert "billing" in result.stdout and "hidden" in result.stdout and "there is no slot" not in result.stdout
    assert re.search(
        r'the state of the slot is unknown: source: no connection to .*role "nobody" does not exist', result.stderr
    )
    found = json.loads(run(streaming, "lag", "--json").stdout)
    assert [(c["name"], c["pending"]) for c in found["consumers"]] == [("billing", 1), ("hidden", 1)]
    assert "nobody" in found["source_error"] and found["slots"] == [] and found["store_error"] is None
    shown = run(streaming, "status")
    assert shown.returncode == 1 and "consumers 2: 2 pending" in shown.stdout, shown
    assert f"slot {streaming.slot}, unknown: the source cannot be read" in shown.stdout
    assert " leads since " in shown.stdout and "no bridge is running" not in shown.stdout


def test_a_bridge_that_tries_again_is_not_called_absent(streaming: World) -> None:
    (process,) = streaming._processes
    process.kill()
    process.wait()
    eventually(
        lambda: "no bridge is running: `cdcbridge run` starts one" in run(streaming, "status").stdout, "it is gone"
    )
    good, streaming.settings["dsn"] = streaming.dsn, refused(streaming)
    away = run(streaming, "status").stdout
    assert "no bridge is connected to the store: none runs, or it cannot reach the source either" in away
    process = streaming.start_process()
    eventually(lambda: f" pid {process.pid} had an error " in run(streaming, "status").stdout, "its error is noted")
    said = run(streaming, "status").stdout
    assert "It tries again by itself, unless its process has ended" in said and "starts one" not in said
    process.kill()
    process.wait()
    streaming.settings["dsn"] = good
    assert "no bridge is running: `cdcbridge run` starts one" in run(streaming, "status").stdout


def test_neither_answers(streaming: World) -> None:
    streaming.settings["dsn"] = streaming.store_dsn = refused(streaming)
    result = run(streaming, "lag")
    assert result.returncode == 1 and "error: source: " in result.stderr and "store: no connection" in result.stderr
    shown = run(streaming, "status").stdout
    assert "bridge unknown" in shown and "not created yet" not in shown and "no bridge is" not in shown


def test_a_consumers_role_sees_what_it_may(streaming: World) -> None:
    role = f"app_{streaming.database}"
    streaming.user, streaming.store_dsn = role, streaming.server.dsn(streaming.database, role)
    result = run(streaming, "status")
    assert result.returncode == 0 and result.stdout.startswith("healthy"), result
    assert f"store schema cdcbridge, of which the role {role} sees only its own consumers" in result.stdout
    assert "consumers 1: 1 pending" in result.stdout and re.search(r"bridge session pid \d+ leads", result.stdout)
    assert "not created yet" not in result.stdout and "none" not in result.stdout
    process, *_ = streaming._processes
    process.kill()
    process.wait()
    eventually(lambda: "no bridge is running" in run(streaming, "status").stdout, "the bridge is gone")


@pytest.mark.settings(max_slot_wal_keep_size="1MB", wal_keep_size="0", min_wal_size="32MB", max_wal_size="32MB")
@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
def test_a_lost_slot_on_15(own15: EmbeddedServer, tmp_path: Path, plugin: str) -> None:
    lost(own15, tmp_path, plugin, "the server removed WAL that it had not sent yet. No bridge has read it for")


def test_a_lost_slot_on_18(pg18: EmbeddedServer, tmp_path: Path) -> None:
    with psycopg.connect(pg18.dsn(), autocommit=True) as admin:
        admin.execute("alter system set max_slot_wal_keep_size = '1MB'")
        admin.execute("select pg_reload_conf()")
        try:
            lost(pg18, tmp_path, "pgoutput", "wal_removed. No bridge has read it for")
        finally:
            admin.execute("alter system reset max_slot_wal_keep_size")
            admin.execute("select pg_reload_conf()")


def lost(server: EmbeddedServer, folder: Path, plugin: str, why: str) -> None:
    with fresh_database(server) as database:
        world = World(server, database, plugin, folder)
        world.execute("create table t (id int primary key)")
        world.consumer()
        with world.bridge():
            pass
        eventually(lambda: lose(world), "the slot is lost")
        result = run(world, "status")
        assert result.returncode == 3, result
        assert f"WAL lost: {why}" in result.stdout and "are lost. max_slot_wal_keep_size is 1" in result.stdout, result
        assert "slot recreate` continues after a gap message" in result.stdout
        assert "no limit" not in result.stdout and "? retained" not in result.stdout
        assert "keeps 0" not in run(world, "lag").stderr
        world.close()


def lose(world: World) -> bool:
    world.execute("insert into t select coalesce(max(id), 0) + 1 from t", "select pg_switch_wal()", "checkpoint")
    found = world.sql.execute("select wal_status from pg_replication_slots where slot_name = %s", (world.slot,))
    return found.fetchone() == ("lost",)
