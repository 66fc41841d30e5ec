"""Every stop names commands that work when they are copied: each test runs them and sees the stream go on."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import CdcbridgeError, OperatorNeeded
from tests.harness.world import PATIENCE, World, eventually, fresh_database


def follow(world: World, error: BaseException | str | None) -> list[str]:
    """Run what stands in backticks in the hint, in order: SQL on the source, `cdcbridge` as a program."""
    hint = error if isinstance(error, str) else getattr(error, "hint", None)
    assert hint, error
    commands = re.findall(r"`([^`]+)`", hint)
    assert commands, hint
    for command in commands:
        if not command.startswith("cdcbridge "):
            world.execute(command)
            continue
        words = shlex.split(command)[1:]
        if words[:2] in (["slot", "skip"], ["slot", "recreate"]):
            words.append("--yes")
        if words[0] in ("check", "run") or words[:2] == ["slot", "list"]:
            continue
        done = world.run_program(*words)
        assert done.returncode == 0, (command, done.stderr)
    return commands


def stopped_by(world: World, act: Callable[[], None]) -> OperatorNeeded:
    try:
        with world.bridge():
            act()
            eventually(lambda: not world.active(), "the bridge stops", 4 * PATIENCE)  # the server prints a GB first
    except OperatorNeeded as stopped:
        return stopped
    raise AssertionError("the bridge did not stop")


def goes_on(world: World) -> None:
    with world.bridge():
        world.execute("insert into t values (1000, 1000)", "update t set v = 1001 where id = 1000")
        eventually(
            lambda: world.value("select count(*) from messages where data -> 'record' ->> 'id' = '1000'") == 2,
            "the stream goes on",
        )


def test_an_update_that_wal2json_dropped(world15: World) -> None:
    world15.execute("create table t (id int primary key, v int)", "create table u (id int primary key)")
    world15.consumer(tables=("public.t", "public.u"))
    reason = "select feeds -> 'consumers' -> 'c' ->> 'reason' from source"
    with world15.bridge():
        world15.execute("insert into t values (1, 1)")
        world15.messages(1)
        world15.execute(
            "alter table t drop constraint t_pkey",
            "begin; insert into u values (1); update t set v = 2; insert into u values (2); commit",
            "insert into u values (3)",
        )
        eventually(lambda: world15.value(reason), "it is told")
        fix = world15.value("select feeds -> 'consumers' -> 'c' ->> 'fix' from source")
        world15.execute(fix)
        eventually(lambda: world15.value(reason) == "", "the fix works")
    goes_on(world15)
    assert world15.rows("select key from messages where topic = 'public.u' order by seq") == [("1",), ("2",), ("3",)]
    assert world15.value("select count(*) from messages where topic = 'cdcbridge.gap'") == 2, "its begin and its end"


def test_a_table_whose_key_was_dropped(world18: World) -> None:
    world18.execute("create table t (id int primary key, v int)")
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t values (1, 1)")
        world18.messages(1)
        world18.execute("alter table t drop constraint t_pkey", "insert into t values (2, 2)")
        eventually(lambda: world18.value("select feeds -> 'consumers' -> 'c' ->> 'reason' from source"), "it is told")
        world18.execute(world18.value("select feeds -> 'consumers' -> 'c' ->> 'fix' from source"))
        eventually(lambda: world18.value("select feeds -> 'consumers' -> 'c' ->> 'reason' from source") == "")
    goes_on(world18)
    assert world18.value("select count(*) from messages where data -> 'record' ->> 'id' = '2'") == 1


def test_a_store_that_refuses_an_append(world: World) -> None:
    world.execute("create table t (id int primary key, v int)")
    world.consumer()

    def act() -> None:
        world.execute("insert into t values (1, 1)")
        world.messages(1)
        world.execute(
            "alter table cdcbridge.messages add constraint odd check (key <> '2')", "insert into t values (2, 2)"
        )

    follow(world, stopped_by(world, act))
    goes_on(world)
    assert world.value("select count(*) from messages where topic = 'cdcbridge.gap'") == 1


def test_a_row_that_wal2json_cannot_print(world15: World) -> None:
    world15.execute("create table t (id int primary key, v int, w text)")
    world15.consumer()

    def act() -> None:
        world15.execute("insert into t values (1, 1)")
        world15.messages(1)
        world15.execute("insert into t values (2, 2, repeat(chr(1), 200000000))", "insert into t values (3, 3)")

    follow(world15, stopped_by(world15, act))
    goes_on(world15)
    assert world15.rows("select key from messages where key is not null and key <> '1000' order by seq") == [
        ("1",),
        ("3",),
    ]


def test_a_row_that_pgoutput_cannot_print(pg18: EmbeddedServer, tmp_path: Any) -> None:
    """The server fails at the transaction's first change, before it has named the transaction."""
    with (
        fresh_database(pg18, "encoding 'LATIN1' locale 'C' template template0") as database,
        fresh_database(pg18) as store,
    ):
        world = World(pg18, database, "pgoutput", tmp_path)
        world.store_dsn = pg18.dsn(store)
        world.execute("create table t (id int primary key, v int, a text)")
        world.consumer()
        with world.bridge():
            world.execute("insert into t values (1, 1)")
            world.messages(1)
        # In UTF-8 each character takes two bytes, and a message holds at most 1 GB.
        world.execute("insert into t values (2, 2, repeat(chr(233), 540000000))")
        error = world.bridge_error()
        assert isinstance(error, OperatorNeeded), error
        follow(world, error)
        goes_on(world)
        world.close()


def test_a_slot_that_was_dropped_or_advanced(world: World) -> None:
    world.execute("create table t (id int primary key, v int)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 1)")
        world.messages(1)
    world.execute("insert into t values (2, 2)")
    world.sql.execute("select pg_replication_slot_advance(%s, pg_current_wal_lsn())", (world.slot,))
    follow(world, world.bridge_error())
    goes_on(world)
    world.execute(f"select pg_drop_replication_slot('{world.slot}')")
    follow(world, world.bridge_error())
    with world.bridge():
        world.execute("insert into t values (3, 3)")
        eventually(lambda: world.value("select count(*) from messages where key = '3'") == 1, "it goes on")


@pytest.mark.settings(max_slot_wal_keep_size="1MB", wal_keep_size="0", max_wal_size="48MB", min_wal_size="32MB")
@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
def test_a_slot_that_was_lost(own15: EmbeddedServer, tmp_path: Any, plugin: str) -> None:
    with fresh_database(own15) as database:
        world = World(own15, database, plugin, tmp_path)
        world.execute("create table t (id int primary key, v int)")
        world.consumer()
        with world.bridge():
            pass
        lost = "select wal_status = 'lost' from pg_replication_slots where slot_name = %s"

        def write() -> bool:
            world.execute(
                "select pg_logical_emit_message(false, 'x', repeat('x', 20000000))",
                "select pg_switch_wal()",
                "checkpoint",
            )
            return world.sql.execute(lost, (world.slot,)).fetchone() == (True,)

        eventually(write, "the slot is lost")
        follow(world, world.bridge_error())
        goes_on(world)
        world.close()


@pytest.mark.parametrize(
    "trouble",
    [
        "create table bare (v int); insert into bare values (1)",
        "drop table u; create table u (v int)",
        "drop table u",
    ],
    ids=["a table without a key appears", "a named table loses its key", "a named table is dropped"],
)
def test_one_table_stops_no_other_consumer_at_a_reconnect(world: World, trouble: str) -> None:
    world.execute("create table t (id int primary key, v int)", "create table u (id int primary key)")
    world.consumer("named", ("public.t", "public.u"))
    world.consumer("all", ("public.*",))
    with world.bridge():
        world.execute("insert into t values (1, 1)")
        world.messages(1)
        world.execute(trouble)
        world.execute("select pg_terminate_backend(active_pid) from pg_replication_slots where active")
        world.execute("insert into t values (2, 2)")
        eventually(lambda: world.value("select count(*) from messages where key = '2' and topic = 'public.t'") == 1)
        if "create table u" in trouble:
            world.execute("insert into u values (1)")
        if world.plugin == "pgoutput" and "v int" in trouble:
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                world.execute("update bare set v = 2" if "bare" in trouble else "update u set v = 2")
        world.execute("update t set v = 3 where id = 2")
        eventually(lambda: world.value("select count(*) from messages where key = '2' and topic = 'public.t'") == 2)


def test_a_renamed_database_goes_on(world: World) -> None:
    world.execute("create table t (id int primary key, v int)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 1)")
        world.messages(1)
    world.execute("insert into t values (2, 2)")
    world.leave()
    before, after = world.database, f"{world.database}_renamed"
    with psycopg.connect(world.server.dsn(), autocommit=True) as admin:
        admin.execute(f"alter database {before} rename to {after}".encode())
    world.database = after
    try:
        with world.bridge():
            assert [key for _, key, _ in world.messages(2)] == ["1", "2"]
        assert world.run_program("check").returncode == 0
        assert world.run_program("lag").returncode == 0
    finally:
        world.leave()
        with psycopg.connect(world.server.dsn(), autocommit=True) as admin:
            admin.execute(f"alter database {after} rename to {before}".encode())
        world.database = before


def test_a_database_that_was_created_again_under_its_name_is_another_source(world: World, pg18: EmbeddedServer) -> None:
    with fresh_database(pg18) as store:
        world.store_dsn = pg18.dsn(store)
        world.execute("create table t (id int primary key, v int)")
        world.consumer()
        with world.bridge():
            pass
        world.leave()
        with psycopg.connect(world.server.dsn(), autocommit=True) as admin:
            admin.execute("select pg_drop_replication_slot(%s)", (world.slot,))
            admin.execute(f"drop database {world.database}".encode())
            admin.execute(f"create database {world.database}".encode())
        world.execute("create table t (id int primary key, v int)")
        error = world.bridge_error()
        assert isinstance(error, CdcbridgeError) and error.exit_code == 3
        assert "created again" in str(error)


def test_commands_that_would_drop_a_slot_in_use_say_who_reads_it(world15: World) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        pid = world15.sql.execute(
            "select active_pid from pg_replication_slots where slot_name = %s", (world15.slot,)
        ).fetchone()
        assert pid
        dropped = world15.run_program("slot", "drop", "--yes")
        assert dropped.returncode == 1
        assert f"the slot {world15.slot} is in use by pid {pid[0]} (cdcbridge" in dropped.stderr
        assert "a bridge is running" in dropped.stderr and "hint: Stop it first." in dropped.stderr
    with reading(world15) as other:
        for command in ("drop", "recreate"):
            refused = world15.run_program("slot", command, "--yes")
            assert refused.returncode == 1 and f"in use by pid {other} (" in refused.stderr, refused.stderr
            assert "another client reads it" in refused.stderr and "Stop it first" in refused.stderr
        refused = world15.run_program("uninstall", "--yes")
        assert refused.returncode == 1 and "another client reads it" in refused.stderr
    assert world15.run_program("slot", "drop", "--yes").returncode == 0


@contextlib.contextmanager
def reading(world: World) -> Iterator[int]:
    """Another client streams from the slot; its pid."""
    command = [str(world.server.binaries / "pg_recvlogical"), "-d", world.dsn, "--slot", world.slot, "--start", "-f", "-",
               "-o", "format-version=2"]  # fmt: skip
    query = "select active_pid from pg_replication_slots where slot_name = %s and active"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield eventually(lambda: world.sql.execute(query, (world.slot,)).fetchone())[0]
        finally:
            process.terminate()
    eventually(lambda: not world.sql.execute(query, (world.slot,)).fetchone(), "the slot is free")


def test_the_way_to_another_plugin(world15: World, tmp_path: Path) -> None:
    """docs/OPERATIONS.md, "Changing source.plugin": the refusals name it, nothing is lost, and what comes twice is known."""
    keys = "select m.key from consumer_messages q join messages m using (seq) order by q.seq"
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        world15.execute("insert into t values (1)")
        world15.messages(1)
        world15.plugin = "pgoutput"
        checked = world15.run_program("check")
        assert checked.returncode == 2 and '"Changing source.plugin"' in checked.stdout, checked.stdout
        world15.plugin = "wal2json"
        world15.write_config()

        new = World(world15.server, world15.database, "pgoutput", tmp_path / "new")
        new.folder.mkdir()
        new.slot, new.schema, new.settings["publication"] = f"{world15.slot}_2", "cdcbridge_2", "cdcbridge_2"
        new.consumer()
        assert new.run_program("check").returncode == 0
        bridge = new.start_process()
        eventually(lambda: new.run_program("status").returncode == 0, "the second bridge is healthy")
        world15.execute("insert into t values (2)")
        world15.messages(2)
    world15.execute("insert into t values (3)")
    eventually(lambda: new.value("select count(*) from messages") == 2)
    assert [key for (key,) in world15.rows(keys)] == ["1", "2"]
    assert [key for (key,) in new.rows(keys)] == ["2", "3"]
    gone = world15.run_program("uninstall", "--yes")
    assert gone.returncode == 0, gone.stderr
    world15.execute("insert into t values (4)")
    eventually(lambda: new.value("select count(*) from messages") == 3)
    assert bridge.poll() is None and new.run_program("status").returncode == 0
    new.close()


@pytest.mark.parametrize("setting", ["slot", "plugin"])
def test_a_bridge_that_finds_another_plugin_names_the_way(world15: World, setting: str) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        pass
    world15.plugin = "pgoutput"
    if setting == "slot":
        world15.slot += "_2"
    error = world15.bridge_error()
    assert '"Changing source.plugin"' in f"{error} {getattr(error, 'hint', '')}", error
