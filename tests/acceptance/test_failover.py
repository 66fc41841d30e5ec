"""The source's primary dies and its standby is promoted, under load: two real PostgreSQL 18 servers, the store on a third.

What PostgreSQL itself loses on the way is lost; what the log has of it is told by a gap message; all else is there once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.bridge.slot_repair import recreate_slot
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import OperatorNeeded
from cdcbridge.lsn import parse_lsn
from tests.acceptance.test_check import problems
from tests.conftest import FAST, NEWER
from tests.harness.standby import Standby
from tests.harness.world import World, eventually, fresh_database

FEEDBACK = {**FAST, "hot_standby_feedback": "on", "wal_receiver_status_interval": "1", "sync_replication_slots": "on"}


@pytest.fixture
def primary() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(NEWER, settings=FAST) as server:
        yield server


@pytest.fixture
def standby(primary: EmbeddedServer) -> Iterator[Standby]:
    with Standby(primary, settings=FEEDBACK) as server:
        yield server


@pytest.fixture
def pair(primary: EmbeddedServer, standby: Standby, pg18: EmbeddedServer, tmp_path: Path) -> Iterator[World]:
    """A source with a standby, named in one DSN; the store elsewhere."""
    with fresh_database(pg18) as elsewhere:
        world = World(primary, "postgres", "pgoutput", tmp_path)
        world.slot = "cdcbridge"
        world.store_dsn = pg18.dsn(elsewhere)
        ports = f"{primary.port},{standby.port}"
        world.settings["dsn"] = f"host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname=postgres"
        world.execute("create table t (id int primary key, v int not null)")
        world.consumer()
        yield world
        world.close()


class Writer:
    """Rows by one session after another, on whichever server takes them: `kept` are those whose commit was answered."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._stop = threading.Event()
        self.kept: list[int] = []
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True, connect_timeout=2) as session:
                    while not self._stop.wait(0.005):
                        number += 1  # never the same twice: whether an unanswered one was committed nobody knows
                        session.execute("insert into t values (%s, %s)", (number, number))
                        self.kept.append(number)
            except psycopg.Error:
                self._stop.wait(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def synced(world: World, standby: Standby) -> bool:
    """The slot stands on the standby, and would stay there. It has to come past what the standby began with."""
    world.execute("select pg_log_standby_snapshot()")
    with psycopg.connect(standby.dsn(), autocommit=True) as session:
        row = session.execute("select not temporary from pg_replication_slots where slot_name = 'cdcbridge'").fetchone()
        return row == (True,)


def promote(primary: EmbeddedServer, standby: Standby, world: World, *, receiver: int | None = None) -> None:
    """The primary dies at once. Sessions of the test go to the new one from now on. `receiver`: a process of the standby
    that was stopped, and must not get what it has not read.
    """
    primary.stop("immediate")
    if receiver is not None:
        os.kill(receiver, signal.SIGKILL)
        eventually(lambda: answers(standby), "the standby is back after its receiver was killed")
    standby.promote()
    world.server = standby
    world.leave()


def write_on(world: World, writer: Writer, rows: int) -> None:
    """So many rows more, and all is in the log."""
    before = len(writer.kept)
    eventually(lambda: len(writer.kept) > before + rows, "the writer writes on")
    writer.stop()
    last = str(writer.kept[-1])
    eventually(lambda: world.rows("select from messages where key = %s", last), "the bridge has it all")


def log_after_the_last_gap(world: World) -> tuple[list[dict[str, Any]], list[str]]:
    """The gap messages' records, and the keys behind the last one, in order."""
    rows = world.rows("select topic, key, data from messages order by seq")
    gaps = [index for index, (topic, _, _) in enumerate(rows) if topic == "cdcbridge.gap"]
    behind = rows[gaps[-1] + 1 :] if gaps else rows
    return [rows[index][2]["record"] for index in gaps], [key for _, key, _ in behind]


def test_a_promoted_standby_goes_on_without_a_gap_where_it_had_everything(
    pair: World, primary: EmbeddedServer, standby: Standby
) -> None:
    """synchronized_standby_slots keeps changes from the bridge until the standby has them."""
    name = standby.slot
    (asked,) = problems(pair).values()
    assert asked["code"] == "synchronized_standby_slots" and asked["severity"] == "warning"
    assert asked["fix"].startswith(f"alter system set synchronized_standby_slots = '{name}'; select pg_reload_conf();")
    pair.execute(f"alter system set synchronized_standby_slots = '{name}'", "select pg_reload_conf()")
    assert problems(pair) == {}
    with pair.bridge():
        assert pair.sql.execute(
            "select failover from pg_replication_slots where slot_name = 'cdcbridge'"
        ).fetchone() == (True,)
        writer = Writer(pair.settings["dsn"] + " target_session_attrs=primary")
        eventually(lambda: synced(pair, standby), "the slot is kept in step")
        eventually(lambda: pair.value("select count(*) from messages") > 100, "the bridge streams")
        promote(primary, standby, pair)
        write_on(pair, writer, 100)
    gaps, keys = log_after_the_last_gap(pair)
    assert gaps == []
    there = [str(key) for (key,) in pair.sql.execute("select id from t order by id").fetchall()]
    assert keys == there
    assert pair.value("select timeline from source") == 2


def test_what_the_standby_did_not_have_is_told_by_a_gap_and_new_changes_are_not_taken_for_it(
    pair: World, primary: EmbeddedServer, standby: Standby
) -> None:
    with pair.bridge():
        writer = Writer(pair.settings["dsn"] + " target_session_attrs=primary")
        eventually(lambda: synced(pair, standby), "the slot is kept in step")
        # From here on the standby gets nothing, and the bridge does not wait for it.
        receiver = receiver_of(standby)
        os.kill(receiver, signal.SIGSTOP)
        seen = len(writer.kept)
        eventually(lambda: len(writer.kept) > seen + 300, "rows that the standby has not")
        lost = str(writer.kept[-1])
        eventually(lambda: pair.rows("select from messages where key = %s", lost), "which the log has")
        promote(primary, standby, pair, receiver=receiver)
        write_on(pair, writer, 500)
    gaps, behind = log_after_the_last_gap(pair)
    assert len(gaps) == 1 and gaps[0]["timeline"] == 2
    branch, end = parse_lsn(gaps[0]["from"]), parse_lsn(gaps[0]["to"])
    assert branch < end
    # Void are those that stand before the gap with positions behind the branch; all else is what the table has.
    void = pair.rows(
        "select key from messages where topic = 'public.t' and commit_lsn >= %s::pg_lsn and seq < (select seq from messages"
        " where topic = 'cdcbridge.gap')",
        gaps[0]["from"],
    )
    assert lost in {key for (key,) in void}
    keys = [
        key for _, key, _ in pair.rows("select topic, key, data from messages where topic = 'public.t' order by seq")
    ]
    there = [str(key) for (key,) in pair.sql.execute("select id from t order by id").fetchall()]
    assert [key for key in keys if key not in {k for (k,) in void}] == there
    assert len(keys) == len(set(keys))
    # New commits stand where the old history had others: that is what deduplicating by LSN alone would have swallowed.
    assert pair.value("select min(commit_lsn) < %s::pg_lsn from messages where key = %s", gaps[0]["to"], behind[0])
    assert pair.value("select count(*) from consumer_messages") == len(keys) + 1


def caught_up(world: World, standby: Standby) -> None:
    """The standby has all that there is."""
    lsn = world.sql.execute("select pg_current_wal_flush_lsn()").fetchone()[0]  # type: ignore[index]
    with psycopg.connect(standby.dsn(), autocommit=True) as there:
        eventually(lambda: there.execute("select pg_last_wal_replay_lsn() >= %s", (lsn,)).fetchone() == (True,))


def answers(standby: Standby) -> bool:
    try:
        with psycopg.connect(standby.dsn(), autocommit=True) as session:
            return session.execute("select not exists (select from pg_stat_wal_receiver)").fetchone() == (True,)
    except psycopg.OperationalError:
        return False


def receiver_of(standby: Standby) -> int:
    with psycopg.connect(standby.dsn(), autocommit=True) as session:
        row = eventually(lambda: session.execute("select pid from pg_stat_wal_receiver").fetchone(), "it receives WAL")
        return int(row[0])


def test_a_promoted_standby_without_the_slot_needs_an_operator_and_recreate_goes_on(
    pair: World, primary: EmbeddedServer, standby: Standby
) -> None:
    pair.settings["failover"] = False
    with pair.bridge():
        pair.execute("insert into t values (1, 1)")
        pair.messages(1)
    caught_up(pair, standby)
    promote(primary, standby, pair)
    error = pair.bridge_error()
    assert isinstance(error, OperatorNeeded) and "slot recreate" in str(error.hint)
    recreate_slot(pair.config(), print)
    with pair.bridge():
        pair.execute("insert into t values (2, 2)")
        assert [key for _, key, _ in pair.messages(3)] == ["1", None, "2"]
    assert pair.value("select timeline from source") == 2


def test_a_standby_is_a_source_and_stays_one_when_it_is_promoted(
    primary: EmbeddedServer, standby: Standby, pg18: EmbeddedServer, tmp_path: Path
) -> None:
    with fresh_database(pg18) as elsewhere:
        world = World(standby, "postgres", "pgoutput", tmp_path)
        world.slot = "cdcbridge"
        world.store_dsn = pg18.dsn(elsewhere)
        world.consumer()
        with psycopg.connect(primary.dsn(), autocommit=True) as writer:
            writer.execute("create table t (id int primary key, v int not null)")
            error = eventually(lambda: _refusal(world), "the table is there, and the publication cannot be made there")
            assert "publication" in str(error), error
            writer.execute("create publication cdcbridge for table t with (publish_via_partition_root = true)")
            process = world.start_process()
            eventually(lambda: "pg_log_standby_snapshot" in world.log(), "it says what the slot waits for")
            eventually(
                lambda: writer.execute("select pg_log_standby_snapshot()").fetchone() and world.active(), "it streams"
            )
            writer.execute("insert into t select g, g from generate_series(1, 100) g")
            world.messages(100)
            primary.stop("fast")
        standby.promote()
        with psycopg.connect(standby.dsn(), autocommit=True) as writer:
            writer.execute("insert into t select g, g from generate_series(101, 200) g")
            world.messages(200, "select topic, key, data from messages order by seq")
            assert world.value("select count(distinct key) from messages where topic = 'public.t'") == 200
            eventually(lambda: world.value("select timeline from source") == 2, "the new timeline is known")
        process.terminate()
        assert process.wait(30) == 0
        world.close()


def _refusal(world: World) -> BaseException | None:
    error = world.bridge_error()
    return None if "there is no table" in str(error) else error
