"""What production does to a bridge: servers that go away, slots that are lost, stores that do not fit, bad input."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.bridge.slot_repair import recreate_slot, skip
from cdcbridge.bridge.supervisor import Bridge
from cdcbridge.config import load
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import CheckFailed, NotLeader, OperatorNeeded, UsageError
from cdcbridge.lsn import parse_lsn
from cdcbridge.source.facts import SourceFacts
from cdcbridge.source.slots import Identity, Slot
from cdcbridge.store.facts import History
from cdcbridge.store.log import BridgeStore
from tests.harness.world import World, eventually, fresh_database


def test_sessions_cut_on_either_side_are_made_anew_and_nothing_is_lost(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        for number in range(5):
            world.execute(f"insert into t select generate_series({number * 100}, {number * 100 + 99})")
            world.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name like 'cdcbridge %' and datname = current_database()"
            )
        eventually(lambda: world.value("select count(distinct key) from messages") == 500, "500 rows")
    assert world.value("select count(*) from messages") == 500
    assert world.value("select count(*) from consumer_messages") == 500


def test_neither_sessions_nor_bridges_leave_files_open(world15: World) -> None:
    def open_files() -> int:
        gc.collect()
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        world15.messages(0)  # a session that stays open
    before = open_files()
    with world15.bridge():
        eventually(world15.active, "the bridge streams")
        of_one_bridge = open_files()
        for number in range(12):
            world15.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name like 'cdcbridge %' and datname = current_database()"
            )
            world15.execute(f"insert into t values ({number})")
            world15.messages(number + 1)
        # One file left open per session would be 12 more. The threads beside the stream reconnect in their own time.
        eventually(lambda: open_files() < of_one_bridge + 8, f"about {of_one_bridge} open files")
    assert open_files() <= before


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_restart_is_waited_for(own15: EmbeddedServer, tmp_path: object, mode: str) -> None:
    with fresh_database(own15) as database:
        world = World(own15, database, "wal2json", tmp_path)  # type: ignore[arg-type]
        world.execute("create table t (id int primary key)")
        world.consumer()
        with world.bridge():
            world.execute("insert into t values (1)")
            world.messages(1)
            world.leave()
            own15.stop(mode)
            own15.start()
            world.execute("insert into t values (2)")
            assert [key for _, key, _ in world.messages(2)] == ["1", "2"]
        world.close()


def test_the_store_may_be_another_server(pg18: EmbeddedServer, world15: World) -> None:
    with fresh_database(pg18) as elsewhere:
        world15.store_dsn = pg18.dsn(elsewhere)
        world15.execute("drop schema cdcbridge, cdcbridge_internal cascade", "create table t (id int primary key)")
        world15.consumer()
        with world15.bridge():
            world15.execute("insert into t values (1)")
            assert world15.messages(1)[0][1] == "1"
    assert world15.sql.execute("select to_regnamespace('cdcbridge')").fetchone() == (None,)


def test_a_dropped_slot_says_what_was_lost_and_recreate_goes_on_behind_a_gap(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1)")
        world.messages(1)
    world.execute(f"select pg_drop_replication_slot('{world.slot}')", "insert into t values (2)")
    error = world.bridge_error()
    assert isinstance(error, OperatorNeeded) and error.exit_code == 3
    assert "no longer exists" in str(error) and "slot recreate" in str(error.hint)
    start, end = recreate_slot(world.config(), print)
    assert start < end
    with world.bridge():
        world.execute("insert into t values (3)")
        messages = world.messages(3)
    assert messages[1][0] == "cdcbridge.gap"
    assert messages[1][2]["op"] == "gap"
    assert parse_lsn(messages[1][2]["record"]["from"]) == start
    assert parse_lsn(messages[1][2]["record"]["to"]) == end
    assert [key for _, key, _ in messages] == ["1", None, "3"]
    assert world.value("select count(*) from consumer_messages") == 3


def test_a_slot_advanced_beyond_the_store_is_refused_from_where_to_where(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1)")
        world.messages(1)
    world.execute("insert into t values (2)")
    advanced = world.sql.execute(
        "select end_lsn::text from pg_replication_slot_advance(%s, pg_current_wal_lsn())", (world.slot,)
    ).fetchone()
    assert advanced is not None
    stored = world.value("select end_lsn::text from positions")
    error = world.bridge_error()
    assert isinstance(error, OperatorNeeded)
    assert advanced[0] in str(error) and stored in str(error)
    skip(world.config(), parse_lsn(advanced[0]))
    with world.bridge():
        world.execute("insert into t values (3)")
        assert [key for _, key, _ in world.messages(3)] == ["1", None, "3"]


def test_a_store_of_another_source_is_refused(world15: World) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        pass
    for what, column, value in (
        ("system identifier", "system_identifier", "42"),
        ("database", "database", "elsewhere"),  # a renamed database is known by its OID
        ("slot", "slot", "another"),
    ):
        was = world15.value(f"select {column} from source")
        world15.execute(f"update cdcbridge_internal.source set {column} = '{value}', database_oid = null")
        error = world15.bridge_error()
        assert isinstance(error, OperatorNeeded) and what in str(error) and repr(value) in str(error)
        world15.execute(f"update cdcbridge_internal.source set {column} = '{was}'")
    world15.plugin = "pgoutput"
    error = world15.bridge_error()
    assert isinstance(error, OperatorNeeded) and "wal2json" in str(error)


def test_an_older_timeline_is_refused(world15: World) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        pass
    world15.execute("update cdcbridge_internal.source set timeline = 7")
    error = world15.bridge_error()
    assert isinstance(error, OperatorNeeded) and "timeline" in str(error)


def test_a_second_bridge_stands_by_and_takes_over(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge() as leader:
        with pytest.raises(NotLeader, match="another bridge leads"):
            Bridge(world.config(), wait=False).run()
        second = Bridge(world.config())
        thread = threading.Thread(target=second.run)
        thread.start()
        world.execute("insert into t values (1)")
        world.messages(1)
        assert world.value("select count(*) from leaders") == 1
        leader.stop()
        eventually(lambda: world.value("select count(*) from leaders") == 2, "the second leads")
        world.execute("insert into t values (2)")
        assert [key for _, key, _ in world.messages(2)] == ["1", "2"]
        second.stop()
        thread.join()


def test_a_stand_by_leads_with_the_file_as_it_is_then(world15: World) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge() as leader:
        second = Bridge(world15.config(), reload=lambda: load(world15.folder / "cdcbridge.yaml"))
        thread = threading.Thread(target=second.run)
        thread.start()
        world15.execute("insert into t values (1)")
        world15.messages(1)
        world15.consumer("later")
        assert world15.run_program("consumers", "apply").returncode == 0
        world15.execute("insert into t values (2)")
        world15.messages(2)
        leader.stop()
        world15.execute("insert into t values (3)")
        world15.messages(3)
        second.stop()
        thread.join()
    per_consumer = "select c.name, array_agg(m.key order by seq) from consumer_messages m join consumers c on c.id = consumer_id group by 1 order by 1"
    assert world15.rows(per_consumer) == [("c", ["1", "2", "3"]), ("later", ["2", "3"])]


@pytest.mark.parametrize(
    ("branch", "slot_lsn", "gap"),
    [
        (450, 100, ("0/190", "0/1F5")),  # before the commit of the transaction that was appended in part: it is void
        (700, 100, None),  # behind it: it goes on where it was
        (300, 100, ("0/12C", "0/1F5")),
        (300, 350, None),  # the slot was confirmed on the new timeline: what the store has is of it
    ],
)
def test_a_branch_beside_a_transaction_that_was_appended_in_part(
    world15: World, branch: int, slot_lsn: int, gap: tuple[str, str] | None
) -> None:
    """The store ends at 400, and has three changes of the transaction that committed at 500."""
    from cdcbridge.bridge.preparation import Sides, _follow_timeline
    from cdcbridge.changes.position import Position
    from cdcbridge.checks.decision import decide
    from cdcbridge.checks.facts import Facts
    from cdcbridge.routing.batch import AppendBatch
    from cdcbridge.store.consumers import apply

    store = BridgeStore(world15.dsn, "cdcbridge")
    store.migrate()
    store.begin_epoch()
    world15.consumer()
    config = world15.config()
    slot = Slot(config.source.slot, "wal2json", "d", None, "reserved", 1, slot_lsn)
    history = History("1", 1, "d", slot.name, "wal2json")
    apply(store.connection, config.consumers)
    store.begin_history(history, 1)
    store.append(AppendBatch(position=Position(500, 2), end_lsn=400, open=True), {"options": {}, "subscriptions": []})
    source = SourceFacts(Identity("1", "d", 1), 150000, False, 2, "UTF8", slot)
    facts = Facts(source, store.facts(), 1000, 2, branch)
    plan = decide(config, facts)
    assert plan.branch is not None and plan.finishing == (gap is None)
    _follow_timeline(plan, plan.branch, Sides(store.connection, store, None, facts))  # type: ignore[arg-type]
    tail = store.facts().tail
    gaps = world15.rows("select data -> 'record' ->> 'from', data -> 'record' ->> 'to' from messages")
    assert gaps == ([gap] if gap else [])
    if gap:
        start = min(branch, 400)
        assert (tail.position, tail.end_lsn, tail.unfinished) == (Position(start, -1), start, None)
    else:
        assert (tail.position, tail.end_lsn) == (Position(500, 2), 400) and tail.unfinished
    assert world15.value("select timeline from source") == 2
    store.close()


def test_an_append_of_an_older_epoch_writes_nothing(world15: World) -> None:
    """The fence: a bridge that lost the lead, wherever it hung, can commit nothing more."""
    from cdcbridge.routing.batch import AppendBatch

    store = BridgeStore(world15.dsn, "cdcbridge")
    store.migrate()
    zombie = BridgeStore(world15.dsn, "cdcbridge")
    zombie.begin_epoch()
    zombie.append(AppendBatch(end_lsn=1), None)
    store.begin_epoch()
    with pytest.raises(NotLeader, match="epoch 1 has ended"):
        zombie.append(AppendBatch(end_lsn=2), None)
    assert world15.value("select end_lsn::text from positions") == "0/1"
    zombie.close()
    store.close()


def test_a_schema_newer_than_the_program_is_refused(world15: World) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        pass
    world15.execute("insert into cdcbridge_internal.schema_migrations (version, name) values (9999, 'future')")
    error = world15.bridge_error()
    assert isinstance(error, OperatorNeeded) and "9999" in str(error)


def test_a_publication_made_by_hand_that_is_enough_stays_as_it_is(world18: World) -> None:
    role = f"r_{world18.database}"
    world18.execute("drop schema cdcbridge, cdcbridge_internal cascade")  # the role makes its own
    world18.execute("create table t (id int primary key)", "create publication cdcbridge for all tables")
    world18.execute("alter publication cdcbridge set (publish_via_partition_root = true)")
    world18.execute(f"create role {role} login replication", f"grant create on database {world18.database} to {role}")
    try:
        world18.consumer()
        world18.user = role
        with world18.bridge():
            with psycopg.connect(world18.server.dsn(world18.database), autocommit=True) as owner:
                owner.execute("insert into t values (1)")
            assert world18.messages(1)[0][1] == "1"
    finally:
        world18.user = "postgres"
        world18.leave()
        world18.execute("drop publication cdcbridge", f"drop owned by {role} cascade", f"drop role {role}")


# what a message may do


def test_an_oversized_message_is_a_dead_letter_with_reason_and_position(world: World) -> None:
    world.execute("create table t (id int primary key, v text)")
    world.consumer("small", max_message_bytes="1kB")
    world.consumer("large")
    with world.bridge():
        world.execute("insert into t values (1, repeat('x', 5000)), (2, 'y')")
        world.messages(2)
    assert world.rows(
        "select seq, key, left(reason, 10), commit_lsn is not null, ordinal, deliver_count from dead_messages"
    ) == [(1, "1", "oversized:", True, 0, 0)]
    assert world.rows(
        "select c.name, array_agg(m.seq order by m.seq) from consumer_messages m join consumers c on c.id = m.consumer_id"
        " group by 1 order by 1"
    ) == [("large", [1, 2]), ("small", [2])]


def test_a_filter_that_fails_on_a_row_is_a_dead_letter(world: World) -> None:
    world.execute("create table t (id int primary key, v text)")
    world.consumer(filter="int(record.v) > 5")
    with world.bridge():
        world.execute("insert into t values (1, '9'), (2, 'nine'), (3, '1')", "delete from t where id = 3")
        world.messages(3)  # 3's insert is nobody's; its delete carries no v and is delivered
    assert world.rows("select key, left(reason, 13) from dead_messages") == [("2", "filter_error:")]
    assert world.rows("select key from consumer_messages order by seq") == [("1",), ("3",)]


def test_a_row_that_wal2json_cannot_print_stops_the_bridge_and_skip_goes_on(world15: World) -> None:
    world15.execute("create table t (id int primary key, v text)")
    world15.consumer()
    with world15.bridge():
        world15.execute("insert into t values (1, 'a')")
        world15.messages(1)
    world15.execute("insert into t values (2, repeat(chr(1), 200000000))")
    after = world15.sql.execute("select pg_current_wal_lsn()::text").fetchone()
    assert after is not None
    error = world15.bridge_error(patience=100)  # the server takes its time over so large a row
    assert isinstance(error, OperatorNeeded), error
    assert "slot skip" in str(error.hint)
    assert world15.value("select count(*) from messages") == 1
    skip(world15.config(), parse_lsn(after[0]))
    with world15.bridge():
        world15.execute("insert into t values (3, 'c')")
        messages = world15.messages(3)
    assert [(topic, key) for topic, key, _ in messages] == [
        ("public.t", "1"),
        ("cdcbridge.gap", None),
        ("public.t", "3"),
    ]


def test_skip_refuses_what_lies_behind_or_beyond(world15: World) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with world15.bridge():
        pass
    with pytest.raises(UsageError, match="is not ahead of it"):
        skip(world15.config(), 1)
    with pytest.raises(UsageError, match="is beyond it"):
        skip(world15.config(), 1 << 60)


# time


@pytest.mark.settings(wal_sender_timeout="2s")
@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
def test_status_updates_are_on_time_in_a_backlog_with_slow_appends(
    own15: EmbeddedServer, tmp_path: object, plugin: str
) -> None:
    """wal_sender_timeout is 2 s; an append that hangs for 5 s and one huge transaction must not end the session. Nor
    must TCP, which gives up after 2 s on a peer that does not answer: the store waits for a lock and takes no data.
    """
    with fresh_database(own15) as database:
        world = World(own15, database, plugin, tmp_path)  # type: ignore[arg-type]
        world.settings["dsn"] = world.store_dsn = own15.dsn(database, tcp=True)
        world.execute("create table t (id int primary key, v text)")
        world.consumer()
        with world.bridge():
            pid = "select active_pid from pg_replication_slots where slot_name = %s"
            session = world.sql.execute(pid, (world.slot,)).fetchone()
            with psycopg.connect(world.dsn) as blocker:
                blocker.execute("lock table cdcbridge.messages in access exclusive mode")
                world.execute("insert into t select g, repeat('x', 300) from generate_series(1, 100000) g")
                threading.Event().wait(5)
            world.messages(100_000, "select 1 from messages")
            assert world.sql.execute(pid, (world.slot,)).fetchone() == session
        world.close()


def test_nothing_is_confirmed_while_its_append_hangs(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer()
    replies = "select reply_time from pg_stat_replication r join pg_replication_slots s on s.active_pid = r.pid where slot_name = %s"
    ends = "select confirmed_flush_lsn from pg_replication_slots where slot_name = %s"
    with world.bridge():
        with psycopg.connect(world.dsn) as blocker:
            blocker.execute("lock table cdcbridge.messages in access exclusive mode")
            world.execute("insert into t values (1)")
            for _ in range(3):
                last = world.sql.execute(replies, (world.slot,)).fetchone()
                eventually(lambda: world.sql.execute(replies, (world.slot,)).fetchone() != last, "a status update")  # noqa: B023
            confirmed = world.sql.execute(ends, (world.slot,)).fetchone()
        world.messages(1)
    first = world.value("select min(commit_lsn) from messages")
    assert confirmed is not None
    assert world.value("select %s::pg_lsn <= %s::pg_lsn", confirmed[0], first), (confirmed, first)


def test_retained_wal_stays_flat_while_only_another_database_writes(world: World) -> None:
    world.settings["heartbeat_interval"] = "500ms"
    world.execute("create table t (id int primary key)")
    world.consumer()
    lag = "select pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn) from pg_replication_slots where slot_name = %s"
    with world.bridge(), psycopg.connect(world.server.dsn(), autocommit=True) as other:
        other.execute("drop table if exists elsewhere")
        other.execute("create table elsewhere (v text)")
        for _ in range(3):
            other.execute("insert into elsewhere select repeat('x', 1000) from generate_series(1, 5000)")
            other.execute("select pg_log_standby_snapshot()" if other.info.server_version >= 160000 else "checkpoint")
            eventually(lambda: world.sql.execute(lag, (world.slot,)).fetchone()[0] < 1_000_000, "WAL is confirmed")  # type: ignore[index]
        restart = (
            "select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) from pg_replication_slots where slot_name = %s"
        )
        other.execute("checkpoint")
        eventually(lambda: world.sql.execute(restart, (world.slot,)).fetchone()[0] < 2_000_000, "WAL may go")  # type: ignore[index]
        other.execute("drop table elsewhere")


def test_slot_creation_says_which_pid_it_waits_for(world15: World, capfd: pytest.CaptureFixture[str]) -> None:
    world15.execute("create table t (id int primary key)")
    world15.consumer()
    with psycopg.connect(world15.dsn) as open_one:
        open_one.execute("create table o (v int)")
        pid = open_one.info.backend_pid
        process = world15.start_process()
        eventually(lambda: "slot.waiting" in world15.log() and str(pid) in world15.log(), "the pid is named")
        open_one.rollback()
    eventually(world15.active, "the bridge streams")
    process.terminate()
    assert process.wait(30) == 0
    capfd.readouterr()


def test_run_refuses_a_table_without_identity_in_the_words_of_check(world: World) -> None:
    world.execute("create table t (v int)")
    world.consumer()
    error = world.bridge_error()
    assert isinstance(error, CheckFailed) and error.exit_code == 2
    assert "replica identity full" in str(error)
    assert world.sql.execute("select count(*) from pg_publication").fetchone() == (0,)
    world.execute("insert into t values (1)", "update t set v = 2")


def test_a_slot_that_is_moved_after_the_facts_were_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would begin where the slot is, and the rows between would be lost without a word."""
    from cdcbridge.bridge import preparation

    world.execute("create table t (id int primary key)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1)")
        world.messages(1)
    original = preparation.prepare

    def and_meanwhile(*args: Any, **kwargs: Any) -> preparation.Ready:
        ready = original(*args, **kwargs)
        world.execute("insert into t values (2)")
        world.sql.execute("select pg_replication_slot_advance(%s, pg_current_wal_lsn())", (world.slot,))
        return ready

    monkeypatch.setattr("cdcbridge.bridge.supervisor.prepare", and_meanwhile)
    with pytest.raises(OperatorNeeded, match="the changes between them are lost"):
        Bridge(world.config()).run()
    monkeypatch.undo()
    with pytest.raises(OperatorNeeded, match="the changes between them are lost"):
        Bridge(world.config()).run()
