"""`cdcbridge uninstall`: what cdcbridge made is gone, what others made is not, and half of it may be gone before."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.forked import program
from tests.harness.world import PATIENCE, World, eventually, fresh_database


@pytest.fixture(params=["pg15-wal2json", "pg15-pgoutput", "pg18-pgoutput"])
def used(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A bridge has run, with everything that it can make: a trigger, identities, publications, messages."""
    server_name, plugin = request.param.split("-")
    server = request.getfixturevalue(server_name)
    with fresh_database(server) as database:
        world = World(server, database, plugin, tmp_path)
        world.execute("create table t (id int primary key)", "create table mine (id int)",
                      "alter table mine replica identity full", "create table seen (id int primary key)")  # fmt: skip
        world.settings["event_trigger"] = True
        world.consumer("c", ("public.*",))
        world.consumer("i", ("public.seen",), operations=["insert"], mode="stream")
        with world.bridge():
            world.execute("create table later (id int)", "create table nothing (id int primary key)",
                          "alter table nothing replica identity nothing", "insert into t values (1)")  # fmt: skip
            world.messages(1)
            world.value("select count(*) from receive('c')")
        yield world
        world.close()


def run(world: World, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    world.write_config()
    return program(world.folder, *arguments, stdin=stdin)


def left(world: World) -> dict[str, Any]:
    def names(query: str) -> list[str]:
        return [row[0] for row in world.sql.execute(query.encode()).fetchall()]

    return {
        "slots": names(f"select slot_name from pg_replication_slots where database = '{world.database}'"),
        "publications": names("select pubname from pg_publication order by 1"),
        "triggers": names("select evtname from pg_event_trigger"),
        "schemas": names("select nspname from pg_namespace where nspname ~ 'cdcbridge'"),
    }


NOTHING: dict[str, list[str]] = {"slots": [], "publications": [], "triggers": [], "schemas": []}


def identities(world: World) -> dict[str, str]:
    query = (
        "select relname, relreplident::text from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
    )
    return dict(world.sql.execute(query).fetchall())


def test_everything_is_printed_and_then_gone(used: World) -> None:
    before = identities(used)
    assert before == {"t": "d", "mine": "f", "seen": "d", "later": "f", "nothing": "f"}
    asked = run(used, "uninstall", stdin="n\n")
    assert asked.returncode == 1 and "aborted" in asked.stderr
    listed = [line.removeprefix("would be removed: ") for line in asked.stdout.splitlines()]
    assert listed[0] == f"slot {used.slot} ({used.plugin})"
    assert ("publication cdcbridge" in listed) is (used.plugin == "pgoutput")
    assert "replica identity of public.later: from FULL back to DEFAULT" in listed
    assert "replica identity of public.nothing: from FULL back to NOTHING" in listed
    assert not any("public.mine" in line or "public.t:" in line for line in listed), "set by nobody, or by hand"
    assert "with all messages of the consumers: c, i" in listed[-1] and left(used)["slots"] == [used.slot]
    gone = run(used, "uninstall", "--yes")
    assert gone.returncode == 0, gone
    assert [line.removeprefix("removed: ") for line in gone.stdout.splitlines()][len(listed) :] == listed
    assert left(used) == NOTHING
    assert identities(used) == {"t": "d", "mine": "f", "seen": "d", "later": "d", "nothing": "n"}
    used.execute("update t set id = 2", "delete from later")
    again = run(used, "uninstall", "--yes")
    assert (again.returncode, again.stdout) == (0, "nothing to remove\n")


def test_identities_are_known_when_the_trigger_is_gone(used: World) -> None:
    used.settings["event_trigger"] = False
    with used.bridge():
        assert left(used)["triggers"] == []
    assert run(used, "uninstall", "--yes").returncode == 0
    assert identities(used) == {"t": "d", "mine": "f", "seen": "d", "later": "d", "nothing": "n"}
    assert left(used) == NOTHING


@pytest.mark.parametrize(
    "gone",
    [
        "select pg_drop_replication_slot('{slot}')",
        "drop publication if exists cdcbridge",
        "drop schema cdcbridge, cdcbridge_internal cascade",
        "drop schema cdcbridge_identity cascade",
        "drop table later, nothing",
        "drop event trigger cdcbridge_identity_drop",
        "drop table cdcbridge.consumers cascade",
    ],
)
def test_half_of_it_may_be_gone(used: World, gone: str) -> None:
    used.execute(gone.format(slot=used.slot))
    result = run(used, "uninstall", "--yes")
    assert result.returncode == 0, result
    assert left(used) == NOTHING


def test_a_running_bridge_and_a_stand_by_are_named(used: World) -> None:
    leader = used.start_process()
    eventually(used.active, "the bridge streams")
    refused = run(used, "uninstall", "--yes")
    assert refused.returncode == 1 and f" pid {leader.pid} leads (session pid " in refused.stderr, refused
    assert refused.stdout == "" and left(used)["slots"] == [used.slot]
    standby = used.start_process()
    eventually(lambda: "2 bridges are running" in run(used, "uninstall", "--yes").stderr, "both are named")
    standby.send_signal(signal.SIGTERM)
    leader.send_signal(signal.SIGTERM)
    assert (standby.wait(PATIENCE), leader.wait(PATIENCE)) == (0, 0)
    assert run(used, "uninstall", "--yes").returncode == 0


def test_what_others_made_stays(used: World) -> None:
    used.execute(
        "create table cdcbridge.mine_too (id int)",
        "create view cdcbridge_internal.hers as select",
        "create publication other for table later",
    )
    result = run(used, "uninstall", "--yes")
    assert result.returncode == 0, result
    assert "kept: schema cdcbridge: it also has hers, mine_too, not made by cdcbridge" in result.stderr
    assert "kept: replica identity of public.later: without it, UPDATE and DELETE would fail" in result.stderr
    assert "the publication other has the table" in result.stderr
    used.execute("insert into later values (1)", "update later set id = 2", "drop table cdcbridge.mine_too",
                 "drop view cdcbridge_internal.hers",
                 "drop publication other")  # fmt: skip
    assert left(used)["triggers"] == []
    assert sorted(left(used)["schemas"]) == ["cdcbridge", "cdcbridge_identity", "cdcbridge_internal"]
    assert run(used, "uninstall", "--yes").returncode == 0
    assert left(used) == NOTHING and identities(used)["later"] == "d"


@pytest.mark.usefixtures("impatient")
def test_a_receiver_in_its_transaction_makes_nobody_wait(used: World) -> None:
    with psycopg.connect(used.dsn) as receiver:
        receiver.execute("set search_path = cdcbridge, cdcbridge_internal")
        receiver.execute("select * from receive('c')")
        result = run(used, "uninstall", "--yes")
        assert result.returncode == 1 and f"pid {receiver.info.backend_pid}" in result.stderr, result
        assert f"removed: slot {used.slot}" in result.stdout
        assert sorted(left(used)["schemas"]) == ["cdcbridge", "cdcbridge_internal"]
    assert run(used, "uninstall", "--yes").returncode == 0
    assert left(used) == NOTHING


def test_source_and_store_on_two_servers(pg15: Any, pg18: Any, tmp_path: Path) -> None:
    with fresh_database(pg18) as database, fresh_database(pg15) as kept:
        world = World(pg18, database, "pgoutput", tmp_path)
        world.store_dsn = pg15.dsn(kept)
        world.execute("create table t (id int primary key)")
        world.consumer()
        with world.bridge():
            world.execute("insert into t values (1)")
            world.messages(1)
        assert run(world, "uninstall", "--yes").returncode == 0
        assert left(world) == NOTHING
        assert world.value("select to_regnamespace('cdcbridge')") is None
        world.store_dsn = pg15.dsn("absent")
        gone = run(world, "uninstall", "--yes")
        assert (gone.returncode, gone.stdout) == (0, "nothing to remove\n"), gone
        assert "kept: store: its database no longer exists" in gone.stderr
        world.close()


def test_a_slot_of_another_database_stays(used: World) -> None:
    used.execute(f"select pg_drop_replication_slot('{used.slot}')")
    with psycopg.connect(used.server.dsn("postgres"), autocommit=True) as admin:
        admin.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", (used.slot,))
        try:
            result = run(used, "uninstall", "--yes")
        finally:
            admin.execute("select pg_drop_replication_slot(%s)", (used.slot,))
    assert f"kept: slot {used.slot}: it belongs to the database postgres" in result.stderr


def test_a_publication_that_another_slot_may_read_stays(used: World) -> None:
    if used.plugin != "pgoutput":
        return
    used.execute(f"select pg_create_logical_replication_slot('{used.slot}_other', 'pgoutput')")
    result = run(used, "uninstall", "--yes")
    assert result.returncode == 0, result
    assert f"kept: publication cdcbridge: the slot {used.slot}_other may read it." in result.stderr
    assert "kept: replica identity of public.later: without it, UPDATE and DELETE would fail" in result.stderr
    used.execute("insert into later values (1)", "update later set id = 2", "insert into nothing values (1)",
                 "update nothing set id = 2")  # fmt: skip
    used.execute(f"select pg_drop_replication_slot('{used.slot}_other')")
    assert run(used, "uninstall", "--yes").returncode == 0
    assert left(used) == NOTHING
    assert identities(used)["later"] == "d"


@pytest.mark.usefixtures("impatient")
def test_a_publication_that_cannot_be_dropped_now_keeps_its_identities(used: World) -> None:
    if used.plugin != "pgoutput":
        return
    with psycopg.connect(used.dsn) as reader:
        reader.execute("lock table pg_publication in access share mode")
        reader.execute("comment on publication cdcbridge is 'locked'")
        result = run(used, "uninstall", "--yes")
        assert result.returncode == 1 and f"pid {reader.info.backend_pid}" in result.stderr, result
        assert "not removed: replica identity of public.later" in result.stderr
    used.execute("insert into later values (1)", "update later set id = 2")
    assert run(used, "uninstall", "--yes").returncode == 0
    assert left(used) == NOTHING and identities(used)["later"] == "d"


def test_a_role_that_may_not_is_told_what_stays(used: World) -> None:
    role = f"plain_{used.database}"
    used.execute(f"create role {role} login replication")
    used.execute(f"grant usage on schema cdcbridge, cdcbridge_internal to {role}",
                 f"grant select on all tables in schema cdcbridge, cdcbridge_internal to {role}")  # fmt: skip
    used.user = role
    try:
        result = run(used, "uninstall", "--yes")
    finally:
        used.execute(f"drop owned by {role}", f"drop role {role}")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result
    assert "run this as a superuser" in result.stderr and "not removed: schema cdcbridge" in result.stderr
    assert f"removed: slot {used.slot}" in result.stdout


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_another_store_uses_stays(used: World, elsewhere: bool) -> None:
    before, had = left(used), identities(used)
    used.schema = "never"
    used.store_dsn = used.server.dsn("absent") if elsewhere else None
    result = run(used, "uninstall", "--yes")
    used.schema, used.store_dsn = "cdcbridge", None
    assert (result.returncode, result.stdout) == (0, "nothing to remove\n"), result
    place = f" (database {used.database}, with the source)" if elsewhere else ""
    assert f"kept: slot {used.slot}: the store in the schema cdcbridge{place} uses it\n" in result.stderr
    assert (
        f"kept: event trigger and replica identities: the store in the schema cdcbridge{place} uses them"
        in result.stderr
    )
    captures = f"kept: publication cdcbridge: the store in the schema cdcbridge{place} captures its changes through it"
    assert (captures in result.stderr) is (used.plugin == "pgoutput")
    assert (left(used), identities(used)) == (before, had)
    assert run(used, "uninstall", "--yes").returncode == 0
    assert left(used) == NOTHING


def test_the_publication_of_a_bridge_goes_beside_another_bridge(used: World) -> None:
    if used.plugin != "pgoutput":
        return
    first = used.slot
    used.slot, used.schema = f"{first}_two", "cdc2"
    used.settings = {**used.settings, "publication": "two", "event_trigger": False}
    consumers, used.consumers = used.consumers, []
    used.consumer("c", ("public.t",))
    with used.bridge():
        pass
    used.slot, used.schema, used.consumers = first, "cdcbridge", consumers
    used.settings = {**used.settings, "publication": "cdcbridge"}
    result = run(used, "uninstall", "--yes")
    assert result.returncode == 0 and "kept" not in result.stderr, result
    assert left(used)["publications"] == ["two", "two_inserts"] and left(used)["slots"] == [f"{first}_two"]
    used.execute("create table nn2 (a int)", "insert into nn2 values (1)", "update nn2 set a = 2")
    used.settings["publication"] = "two"
    stays = run(used, "uninstall", "--yes")
    assert "kept: publication two: the store in the schema cdc2 captures its changes through it" in stays.stderr


def test_a_publication_for_an_unknown_reader_is_a_warning(used: World) -> None:
    if used.plugin != "pgoutput":
        return
    used.execute(f"select pg_create_logical_replication_slot('{used.slot}_other', 'pgoutput')")
    said = " ".join(run(used, "uninstall", "--yes").stderr.split())
    assert (
        f"publication cdcbridge: the slot {used.slot}_other may read it. WARNING: while it exists, UPDATE and DELETE"
        in said
    )
    assert "on each new table of the schema public without a primary key" in said
    statement = 'drop publication if exists "cdcbridge"'
    assert f"If it does not: {statement};" in said
    used.execute("create table nn2 (a int)", "insert into nn2 values (1)")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        used.execute("update nn2 set a = 2")
    used.execute(statement, "update nn2 set a = 2")


def test_a_file_with_another_slot_than_its_store_is_refused(used: World) -> None:
    first, used.slot = used.slot, f"{used.slot}_b"
    refused = run(used, "uninstall", "--yes")
    assert refused.returncode == 3 and f"uses the slot {first}" in refused.stderr, refused
    used.slot = first
    assert run(used, "uninstall", "--yes").returncode == 0
    assert left(used) == NOTHING


@pytest.fixture
def roles(pg15: EmbeddedServer, tmp_path: Path) -> Iterator[World]:
    """The roles of the manual: the source's, the store's and a consumer's. The publications are a superuser's."""
    with fresh_database(pg15) as database:
        world = World(pg15, database, "pgoutput", tmp_path)
        for name in ("source", "store", "app"):
            world.execute(f"create role {name}_{database} login")
        world.execute("create table t (id int primary key)", f"alter role source_{database} replication",
                      "create publication cdcbridge for tables in schema public with (publish_via_partition_root = true)",
                      "create publication cdcbridge_inserts with (publish = 'insert, truncate')",
                      f"create schema cdcbridge authorization store_{database}",
                      f"create schema cdcbridge_internal authorization store_{database}")  # fmt: skip
        admin = world.sql
        world.user, world.store_dsn = f"source_{database}", pg15.dsn(database, f"store_{database}")
        world.consumer("c", ("public.*",), role=f"app_{database}")
        with world.bridge():
            pass
        yield world
        world.user = "postgres"
        for name in ("source", "store", "app"):
            admin.execute(f"drop owned by {name}_{database}".encode())
            admin.execute(f"drop role {name}_{database}".encode())
        world.close()


def test_the_roles_of_the_manual_are_given_the_statement(roles: World) -> None:
    result = run(roles, "uninstall", "--yes")
    assert result.returncode == 0, result
    said = " ".join(result.stderr.split())
    assert (
        "kept: publication cdcbridge: the role postgres owns it. WARNING: while it exists, UPDATE and DELETE fail"
        in said
    )
    assert "check" not in said and f"removed: slot {roles.slot}" in result.stdout
    statements = re.findall(r"As that role, or as a superuser: ([^;]+);", said)
    assert len(statements) == 2, said
    for statement in statements:
        roles.execute(statement)
    assert left(roles) == NOTHING


def test_a_weak_role_reads_which_role_is_needed(roles: World) -> None:
    owner = f"store_{roles.database}"
    roles.store_dsn = roles.server.dsn(roles.database, f"app_{roles.database}")
    for command in (("uninstall", "--yes"), ("verify", "public.t")):
        refused = run(roles, *command)
        assert refused.returncode == 3, refused
        assert f"`cdcbridge {command[0]}` needs the store's owner, {owner}" in " ".join(refused.stderr.split())
        assert "`cdcbridge check`" not in refused.stderr, refused
    roles.execute(
        f"grant usage on schema cdcbridge_internal to app_{roles.database}",
        f"grant select on cdcbridge_internal.schema_migrations, cdcbridge_internal.schema_code to app_{roles.database}",
    )
    for command in (("uninstall", "--yes"), ("verify", "public.t")):
        refused = run(roles, *command)
        said = " ".join(refused.stderr.split())
        assert refused.returncode == 3 and "has no right on table" in said, refused
        assert f"Connect as the store's owner, {owner}" in said and "check" not in said, refused
    roles.store_dsn = roles.server.dsn(roles.database, owner)
    refused = run(roles, "verify", "public.t")
    assert f"grant select on public.t to source_{roles.database};" in refused.stderr, refused
    assert left(roles)["slots"] == [roles.slot]
