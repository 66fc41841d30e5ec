"""A server that takes no writes for a while is a server that is away: the bridge, clients and commands wait for it.

A restart as a standby, and a promotion later, is the real thing: `default_transaction_read_only` alone reaches no
session of the program, and recovery cannot be turned off by a session.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from cdcbridge import Message, Queue
from cdcbridge.bridge.supervisor import Bridge
from cdcbridge.database import connect_source, source_errors
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import CdcbridgeError, SourceUnavailable
from tests.conftest import DEBIAN_15, FAST, NEWER
from tests.harness.forked import Result, command
from tests.harness.standby import Standby
from tests.harness.world import PATIENCE, World, clean_environment, eventually, fresh_database


@pytest.fixture(params=["pg15", "pg18"])
def own(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server that the test restarts."""
    with EmbeddedServer(DEBIAN_15 if request.param == "pg15" else NEWER, settings=FAST) as server:
        yield server


@pytest.fixture
def apart(own: EmbeddedServer, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A world whose store is on that server, and the source on another one of the same version."""
    version = request.node.callspec.params["own"]
    with fresh_database(request.getfixturevalue(version)) as database, fresh_database(own) as store:
        made = World(request.getfixturevalue(version), database, "pgoutput", tmp_path)
        made.store_dsn = own.dsn(store)
        made.execute("create table t (id int primary key)")
        made.consumer("c", topics=["news"])
        yield made
        made.close()
        if (own.data / "standby.signal").exists():
            promote(own)  # the test failed, and its database is dropped now


def demote(server: EmbeddedServer) -> None:
    """Restart it as a standby that follows nobody: it takes no writes until it is promoted."""
    server.stop()
    signal = server.data / "standby.signal"
    signal.touch()
    shutil.chown(signal, (server.data / "PG_VERSION").owner())
    server.start()


def promote(server: EmbeddedServer) -> None:
    """Let it take writes."""
    server._run("pg_ctl", "-w", "promote")


def waits(bridge: Bridge) -> Callable[[], bool]:
    """Whether the bridge tries again because a server is read-only."""

    def told() -> bool:
        ready, why = bridge._health.ready()
        return not ready and ("read-only" in why or "in recovery" in why or "during recovery" in why)

    return told


def test_a_bridge_waits_for_a_store_that_takes_no_writes(apart: World, own: EmbeddedServer) -> None:
    with apart.bridge() as bridge:
        apart.execute("insert into t values (1)")
        apart.messages(1)
        demote(own)
        apart.execute("insert into t values (2)")
        eventually(waits(bridge), "the bridge says why it waits")
        promote(own)
        assert [key for _, key, _ in apart.messages(2)] == ["1", "2"]


def test_a_bridge_waits_for_a_source_that_takes_no_writes(own: EmbeddedServer, tmp_path: Path) -> None:
    with fresh_database(own) as database:
        world = World(own, database, "pgoutput", tmp_path)
        world.execute("create table t (id int primary key)")
        world.consumer()
        with world.bridge() as bridge:
            world.execute("insert into t values (1)")
            world.messages(1)
            demote(own)
            eventually(waits(bridge), "the bridge says why it waits")
            promote(own)
            world.leave()
            world.execute("insert into t values (2)")
            assert [key for _, key, _ in world.messages(2)] == ["1", "2"]
        world.close()


def test_a_bridge_follows_its_store_to_a_standby_that_is_promoted_later(apart: World, own: EmbeddedServer) -> None:
    """With target_session_attrs=any it reaches the standby before the promotion, and gets 25006."""
    assert apart.store_dsn is not None
    first = apart.store_dsn
    with Standby(own, settings=FAST) as standby:
        home, port = (f"{own._home},{standby._home}", f"{own.port},{standby.port}")
        database = psycopg.conninfo.conninfo_to_dict(first)["dbname"]
        apart.store_dsn = f"host={home} port={port} user=postgres dbname={database} target_session_attrs=any"
        with apart.bridge() as bridge:
            apart.execute("insert into t values (1)")
            apart.messages(1)
            with psycopg.connect(first, autocommit=True) as primary:
                same = "select count(*) = 1 from pg_stat_replication where replay_lsn = pg_current_wal_lsn()"
                eventually(lambda: primary.execute(same).fetchone() == (True,), "the standby has all")
                own.stop("immediate")
            apart.execute("insert into t values (2)")
            eventually(waits(bridge), "the bridge says why it waits")
            standby.promote()
            assert [key for _, key, _ in apart.messages(2)] == ["1", "2"]
        own.start()
        apart.store_dsn = first


def test_default_transaction_read_only_reaches_neither_bridge_nor_client(world15: World) -> None:
    """The sessions set it themselves, so a server that turns it on and off again does not stop anything."""
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    name = world15.database
    with world15.bridge(), Queue.connect(world15.dsn, consumer="c") as queue:
        for number, value in enumerate(("on", "off", "on"), 1):
            with psycopg.connect(world15.server.dsn(), autocommit=True) as admin:
                admin.execute(f"alter database {name} set default_transaction_read_only = {value}".encode())
                admin.execute(
                    f"alter role postgres in database {name} set default_transaction_read_only = {value}".encode()
                )
                # The sessions that are open already belong to an older value.
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> %s",
                    (name, world15.sql.info.backend_pid),
                )
            world15.execute(f"insert into t values ({number})")
            (message,) = eventually(lambda: queue.receive(wait=5), "it is delivered")
            assert (message.key, message.ack()) == (str(number), True)
            assert world15.run_program("publish", "news", "1").returncode == 0


@pytest.mark.parametrize("version", ["world15", "world18"])
@pytest.mark.parametrize("attributes", ["", "target_session_attrs=read-write"])
def test_default_transaction_read_only_hides_no_primary_of_several_hosts(
    request: pytest.FixtureRequest, version: str, attributes: str
) -> None:
    """Libpq takes a primary with this default for one that takes no writes, and `connect` finds no server."""
    world: World = request.getfixturevalue(version)
    world.execute("create table t (id int primary key)")
    world.consumer(topics=["news"])
    host, port = (psycopg.conninfo.conninfo_to_dict(world.dsn)[name] for name in ("host", "port"))
    dsn = f"host={host},{host} port={port},{port} user=postgres dbname={world.database} {attributes}"
    world.settings["dsn"] = dsn
    world.execute(f"alter database {world.database} set default_transaction_read_only = on")
    with world.bridge(), Queue.connect(dsn, consumer="c") as queue:
        world.execute("insert into t values (1)")
        (message,) = queue.receive(wait=5)
        assert message.ack()
        assert world.run_program("publish", "news", "1").returncode == 0


def test_what_is_not_supported_ends_with_an_error_unless_it_passes(own: EmbeddedServer) -> None:
    """All these have the code 0A000."""
    session = connect_source(own.dsn())
    other = connect_source(own.dsn())

    def error(statement: str) -> CdcbridgeError:
        with pytest.raises(CdcbridgeError) as caught, source_errors():
            session.execute(statement.encode(), prepare=True)
        assert isinstance(caught.value.__cause__, psycopg.errors.FeatureNotSupported), caught.value
        return caught.value

    for statement in ("create extension nonsense", "select * from other.public.t"):
        assert type(error(statement)) is CdcbridgeError, statement
    other.execute("create table t (a int)")
    session.execute("select * from t", prepare=True)
    other.execute("alter table t add b int")
    assert type(error("select * from t")) is SourceUnavailable, "the next session has a new plan"
    other.close()
    session.close()
    demote(own)
    session = connect_source(own.dsn())
    if session.info.server_version < 160000:
        assert type(error("select pg_create_logical_replication_slot('s', 'pgoutput')")) is SourceUnavailable
    session.execute("set default_transaction_isolation = serializable")
    assert type(error("select 1")) is SourceUnavailable
    session.close()
    promote(own)


@pytest.mark.parametrize("version", ["world15", "world18"])
def test_a_client_goes_on_although_its_plans_are_older_than_a_migration(
    request: pytest.FixtureRequest, version: str
) -> None:
    world: World = request.getfixturevalue(version)
    world.consumer("c", (), topics=["news"])
    assert run(world, "migrate").code == 0 == run(world, "consumers apply").code
    with Queue.connect(world.dsn, consumer="c") as queue:
        for number in range(10):
            assert queue.publish("news", number, dedup_id=str(number)) == number + 1
        pids = "select array_agg(pid order by pid) from pg_stat_activity where application_name like '%settling'"
        before = world.value(pids)
        # The seq as text: a plan for bigint does not fit.
        world.execute(
            "alter function cdcbridge.publish set schema public",
            "create function cdcbridge.publish(text, text, json, timestamptz, text, interval) returns text language sql"
            " security definer begin atomic select public.publish($1, $2, $3, $4, $5, $6)::text; end",
        )
        assert queue.publish("news", 10, dedup_id="10") == 11
        assert world.value(pids) != before


def store_of(apart: World) -> str:
    """The store's DSN, with the consumers applied and no bridge."""
    assert run(apart, "migrate").code == 0 == run(apart, "consumers apply").code
    assert apart.store_dsn is not None
    return apart.store_dsn


def run(world: World, line: str) -> Result:
    return command(["-c", str(world.write_config()), *line.split()])


def publish(dsn: str, number: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute("select cdcbridge.publish('news', null, %s::json)", (str(number),))


def test_a_worker_waits_for_a_store_that_takes_no_writes(apart: World, own: EmbeddedServer) -> None:
    handled: list[int] = []
    dsn = store_of(apart)
    with Queue.connect(dsn, consumer="c") as queue:

        @queue.worker(wait=1)
        def handle(message: Message) -> None:
            handled.append(message.data["record"])

        thread = threading.Thread(target=handle.run)
        thread.start()
        publish(dsn, 1)
        eventually(lambda: handled == [1], "the worker works")
        demote(own)
        with psycopg.connect(dsn, autocommit=True) as session:
            looks = "select count(*) > 0 from pg_stat_activity where application_name like 'cdcbridge client%'"
            eventually(lambda: session.execute(looks).fetchone() == (True,), "it has found the standby")
        assert thread.is_alive()
        promote(own)
        publish(dsn, 2)
        eventually(lambda: handled == [1, 2], "the worker goes on")
        queue.stop()
        thread.join(PATIENCE)


def test_a_command_says_that_the_store_takes_no_writes(apart: World, own: EmbeddedServer) -> None:
    store_of(apart)
    demote(own)
    for line in (
        "publish news 2",
        "receive c",
        "ack c 1-1",
        "dead redrive c",
        "consumers pause c",
        "receive c --wait 1",
    ):
        result = run(apart, line)
        assert result.code == 1 and b"takes no writes now" in result.err, (line, result)
    for line in ("peek c", "consumers list", "dead list c", "lag"):
        result = run(apart, line)
        assert result.code == 0, (line, result)
    promote(own)


def test_a_command_that_waits_tries_again_until_the_store_takes_writes(apart: World, own: EmbeddedServer) -> None:
    dsn = store_of(apart)
    demote(own)
    program = [sys.executable, "-m", "cdcbridge", "-c", str(apart.write_config()), "receive", "c", "--wait", "60s"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as reader:
        assert reader.stderr is not None and "Trying again" in reader.stderr.readline()
        promote(own)
        publish(dsn, 1)
        out, _ = reader.communicate(timeout=PATIENCE)
    assert reader.returncode == 0 and json.loads(out)["data"]["record"] == 1
