"""What the engineer on call reads: who holds messages, whether a bridge runs, when the disk is full, what a role may do."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Iterator

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.source.wal_room import free_bytes
from tests.harness.forked import command
from tests.harness.world import World, eventually


@pytest.mark.timeout(400)  # many programs
def test_a_receiver_that_stays_in_its_transaction_is_named_everywhere(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer("ledger", mode="queue" if world.plugin == "wal2json" else "fifo")
    with world.bridge():
        world.execute("insert into t select generate_series(1, 423)")
        world.messages(423)
        with contextlib.closing(psycopg.connect(world.dsn, application_name="stuck-worker")) as stuck:
            taken = stuck.execute("select count(*) from cdcbridge.receive('ledger', 500)").fetchone()
            assert taken == (423,)
            pid = stuck.info.backend_pid
            sentence = f"423 messages are held by the transaction of pid {pid} (stuck-worker), open for "
            age = "select clock_timestamp() - xact_start > interval '0.1 s' from pg_stat_activity where pid = %s"
            eventually(lambda: world.value(age, pid), "a transaction so young is not named")
            received = world.run_program("receive", "ledger")
            assert (received.returncode, received.stdout) == (0, "") and sentence in received.stderr
            assert f"`select pg_terminate_backend({pid})`" in received.stderr
            for words in (("lag",), ("consumers", "list"), ("consumers", "show", "ledger")):  # after a second of it
                said = functools.partial(world.run_program, *words)
                eventually(lambda: sentence in said().stderr, " ".join(words))  # noqa: B023 - it is called at once
            lag = world.json("lag", "--json")
            (holder,) = lag["consumer_holders"]
            assert (holder["pid"], holder["messages"], holder["kind"]) == (pid, 423, "receiver")
            assert holder["fix"] == f"select pg_terminate_backend({pid})"
            assert lag["consumers"][0]["pending"] == lag["consumer_health"][0]["held"] == 423
            world.execute(holder["fix"])
        eventually(lambda: world.json("lag", "--json")["consumer_holders"] == [], "the statement ends it")
        assert len(world.run_program("receive", "ledger", "-n", "500").stdout.splitlines()) == 423
    assert "held" not in world.run_program("receive", "ledger").stderr, "in flight, and nobody holds them"


def test_a_paused_consumer_is_marked_and_delayed_messages_are_seen(world18: World) -> None:
    world18.consumer("later", (), topics=["news"])
    with world18.bridge():
        world18.execute("select cdcbridge.publish('news', 'k', '1', now() + interval '1 hour')")
        world18.run_program("consumers", "pause", "later")
        assert world18.run_program("peek", "later").stdout == ""
        (line,) = world18.run_program("peek", "later", "--delayed").stdout.splitlines()
        assert json.loads(line)["key"] == "k" and json.loads(line)["not_visible_until"]
        for words in (("lag",), ("consumers", "list")):
            assert "later (paused)" in world18.run_program(*words).stdout
        assert "consumers resume" in world18.run_program("consumers", "show", "later").stdout
        lag = world18.json("lag", "--json")
        consumer = {**lag["consumers"][0], **lag["consumer_health"][0]}
        assert (consumer["paused"], consumer["pending"], consumer["delayed"]) == (True, 1, 1)
        assert consumer["oldest_due_age_seconds"] is None and consumer["oldest_age_seconds"] is not None


def test_the_first_line_says_since_when_no_bridge_runs(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        assert "no bridge" not in world.run_program("lag").stdout
    first = eventually(lambda: world.run_program("lag").stdout.splitlines()[0])
    assert first.startswith("no bridge has been running for ") and "`cdcbridge run`" in first
    assert (" at most" in first) == (world.server.binaries.parent.name == "15")


def test_other_slots_are_named_with_what_they_keep(world: World) -> None:
    world.execute("create table t (id int primary key, v text)")
    world.consumer()
    other = f"other_{world.database}"
    world.settings["max_retained_wal"] = "1MB"
    with world.bridge():
        pass
    world.execute(
        f"select pg_create_logical_replication_slot('{other}', 'pgoutput')",
        "insert into t select g, repeat('x', 500) from generate_series(1, 10000) g",
    )
    shown = world.run_program("lag")
    assert other in shown.stdout and shown.stderr.startswith("ALARM "), "alarms come first"
    assert f"`select pg_drop_replication_slot('{other}')`" in shown.stderr
    assert "start the bridge (`cdcbridge run`)" in shown.stderr
    lag = world.json("lag", "--json")
    found = {slot["name"]: slot for slot in lag["other_slots"]}
    assert found[other]["retained_bytes"] > 1 << 20 and not found[other]["active"]
    listed = {slot["name"]: slot for slot in world.json("slot", "list", "--json")}
    assert listed[other]["retained_bytes"] > 1 << 20
    assert "RETAINED" in world.run_program("slot", "list").stdout


@pytest.mark.settings(max_slot_wal_keep_size="-1")
def test_without_a_limit_check_warns_and_lag_knows_the_free_space(own15: EmbeddedServer, world15: World) -> None:
    world = World(own15, "postgres", "wal2json", world15.folder)
    world.execute("create table t (id int primary key, v text)")
    world.consumer()
    (problem,) = world.json("check", "--json")["problems"]
    assert (problem["code"], problem["severity"]) == ("wal_unlimited", "warning")
    with world.bridge():
        pass
    free = world.json("lag", "--json")["disk_free_bytes"]
    assert free is not None and free > 0
    shown = world.run_program("lag").stderr
    assert "max_slot_wal_keep_size is -1, so it may fill the disk (" in shown
    world.execute(*problem["fix"].partition(" -- ")[0].split("; "))
    eventually(lambda: world.json("check", "--json")["problems"] == [], "the fix works")
    assert world.json("lag", "--json")["wal_limit_bytes"] == 50 << 30
    world.settings["max_retained_wal"] = "60GB"
    (problem,) = world.json("check", "--json")["problems"]
    assert problem["code"] == "wal_limit_before_alarm"
    row = world.sql.execute("select system_identifier::text from pg_control_system()").fetchone()
    directory = world.sql.execute("show data_directory").fetchone()
    assert row and directory
    from pathlib import Path

    assert free_bytes(Path(directory[0]), "1") is None, "another server's directory"
    assert free_bytes(Path("/nowhere"), row[0]) is None
    world.close()


@pytest.mark.settings(max_slot_wal_keep_size="100MB")
def test_a_burst_that_is_over_is_no_alarm(own15: EmbeddedServer, world15: World) -> None:
    world = World(own15, "postgres", "wal2json", world15.folder)
    world.execute("create table t (id int primary key, v text) with (autovacuum_enabled = off)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (0, '')")
        world.messages(1)
    world.execute("insert into t select g, repeat('x', 500) from generate_series(1, 40000) g")
    world.rows("update positions set commit_time = commit_time - interval '20 seconds' returning 1")
    said = eventually(lambda: ", none in the last " in (lag := world.run_program("lag").stderr) and lag, "it is over")
    assert "ALARM" not in said and "WAL: " in said and " MB written since " in said
    eventually(lambda: ", none in the last " in world.run_program("status").stdout, "the same words")
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(world.dsn, autocommit=True) as session:
            while not stop.is_set():
                session.execute("update t set v = repeat('y', 500) where id <= 100")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        forecast = r"/s in the last \d\.\d s\) max_slot_wal_keep_size is reached in"
        eventually(lambda: re.search(forecast, world.run_program("lag").stderr), "it is written")
    finally:
        stop.set()
        writer.join()
    world.close()


@pytest.fixture
def guest(world18: World) -> Iterator[World]:
    """A bridge that runs as the owner, and the configuration of a consumer's role."""
    role = f"app_{world18.database}"
    world18.execute("create table t (id int primary key)", f"create role {role} login")
    world18.consumer("mine", role=role, visibility_timeout="10m")
    world18.consumer("stream", mode="stream", role=role)
    world18.consumer("owners")
    with world18.bridge():
        world18.execute("insert into t select generate_series(1, 5)")
        world18.messages(5)
    world18.user = role
    yield world18
    world18.user = "postgres"
    if world18._sql is not None:
        world18.leave()
    world18.execute(f"drop owned by {role}", f"drop role {role}")


@pytest.mark.timeout(400)  # many programs
def test_the_command_line_works_as_a_consumers_role(guest: World) -> None:
    def good(*words: str, stdin: str = "") -> str:
        result = command(["-c", str(guest.write_config()), *words], stdin=stdin.encode())
        assert result.code == 0, (words, result.err)
        return result.out.decode()

    batch = good("receive", "mine", "-n", "3")
    first, second, third = [json.loads(line)["receipt"] for line in batch.splitlines()]
    assert len(good("peek", "mine").splitlines()) == 2 and good("peek", "mine", "--delayed") == ""
    assert json.loads(good("extend", "mine", first, "--by", "60")) == {"extended": 1}
    assert json.loads(good("ack", "mine", "-", stdin=first + "\n")) == {"acked": 1}
    assert json.loads(good("nack", "mine", second, third, "--dead")) == {"nacked": 2}
    letters = json.loads(good("dead", "list", "mine", "--json"))
    assert len(letters) == 2 and "nacked" in good("dead", "show", "mine", str(letters[0]["id"]))
    assert json.loads(good("dead", "redrive", "mine", "--reason", "nacked:")) == {"redriven": 2}
    assert json.loads(good("dead", "purge", "mine", "--yes")) == {"purged": 0}
    assert {row["name"] for row in json.loads(good("consumers", "list", "--json"))} == {"mine", "stream"}
    assert json.loads(good("consumers", "show", "mine", "--json"))["name"] == "mine"
    assert len(json.loads(good("offsets", "show", "stream", "--json"))) == 16
    assert json.loads(good("offsets", "seek", "stream", "latest"))["partitions"] == 16
    lag = json.loads(good("lag", "--json"))
    assert {row["name"] for row in lag["consumers"]} == {"mine", "stream"} and lag["store_error"] is None
    assert b"sees only its own consumers" in command(["-c", str(guest.write_config()), "lag"]).err


OF_THE_OWNER = (
    "consumers pause mine", "consumers resume mine", "consumers remove mine --yes", "consumers apply", "migrate", "check",
    "consumers replay mine --from earliest", "backfill start mine public.t", "backfill list", "verify public.t",
    "slot drop --yes", "slot recreate --yes", "run --no-wait", "publish news 1",
    "receive owners", "consumers show owners", "dead list owners", "peek owners",
)  # fmt: skip


@pytest.mark.timeout(400)  # many programs
def test_what_is_not_for_a_consumers_role_is_said_in_one_sentence(guest: World) -> None:
    wrong = []
    for line in OF_THE_OWNER:
        result = command(["-c", str(guest.write_config()), *line.split()])
        told = (result.out + result.err).decode()
        raw = "Traceback" in told or "permission denied" in told
        if result.code not in (2, 3) or raw or not any(word in told for word in ("owner", "may not", "no right")):
            wrong.append((line, result.code, told))
    assert wrong == []
