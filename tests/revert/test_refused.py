"""What is not undone, and why: nothing changes then, and the exit code is 2."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import psycopg
import pytest

from cdcbridge.database import connect_store
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import LockedOut, RevertRefused
from cdcbridge.revert.selection import Selection
from cdcbridge.revert.undo import Revert, apply, prepare
from tests.harness.world import World, eventually, fresh_database
from tests.revert.conftest import caught_up, planned, revert, rows


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("99999",), "the log has no message with seq 99999: it has seq 1 to"),
        (("--transaction", "0/1"), "the log has no change of a transaction with the commit LSN 0/1"),
        (("--transaction", "x"), "--transaction: not an LSN: 'x'"),
        (
            ("--table", "public.T", "--key", "1", "--to", "1"),
            "the source has no table public.T; did you mean public.t?",
        ),
        (("--table", "public.t", "--key", "77", "--to", "1"), "the log has no message of public.t with the key '77'"),
        (("--table", "public.t", "--key", "1", "--to", "99999"), "--to: seq 99999 is not in the log"),
        (("--table", "public.t", "--from", "soon"), "'soon' is not a time"),
        (("--table", "public.t"), "--table needs --key with --to, or --from"),
        (("--table", "public.t", "--to", "1"), "--to needs --key"),
        (("--key", "1", "3"), "--key needs --table"),
        (("1", "--transaction", "0/1"), "name the changes in one way"),
        ((), "name the changes in one way"),
        (("0",), "out of range"),
    ],
)
def test_wrong_arguments(described: World, arguments: tuple[str, ...], reason: str) -> None:
    refused = revert(described, *arguments, "--apply", code=2)
    assert reason in refused.stderr and "Traceback" not in refused.stderr


@pytest.fixture(scope="module")
def described(pg18: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world with a log that no test here changes."""
    with fresh_database(pg18) as database:
        world = World(pg18, database, "pgoutput", tmp_path_factory.mktemp("described"))
        world.execute("create table t (id int primary key, a int)")
        world.consumer()
        with world.bridge():
            world.execute("insert into t values (1, 1)", "update t set a = 2")
            caught_up(world)
        yield world
        world.close()


def test_what_is_no_change_and_a_truncate(world: World) -> None:
    world.execute("create table t (id int primary key, a int)", "insert into t values (1, 1)")
    world.consumer(start="snapshot", topics=["news"])
    with world.bridge():
        eventually(lambda: world.value("select count(*) from messages") == 1, "the snapshot")
        world.execute("select pg_logical_emit_message(true, 'cdcbridge:news', '{\"data\": 1}')", "truncate t")
        world.execute("insert into t values (1, 2)")
        last = caught_up(world)
        for seq, reason in (
            (1, "seq 1 is a row that a backfill read"), (last - 2, "is a published message"),
            (last - 1, "is a truncate, which cannot be undone"),
        ):  # fmt: skip
            assert reason in revert(world, str(seq), "--apply", code=2).stderr
        refused = revert(world, "--table", "public.t", "--key", "1", "--to", "1", "--apply", code=2)
        assert "is a truncate" in refused.stderr
        assert rows(world, "select * from t") == [(1, 2)]


def test_conflicts_are_shown_with_all_versions_and_can_be_forced(world: World) -> None:
    world.execute("create table t (id int primary key, a int, b int)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), (5, 1, 1)")
        start = caught_up(world)
        world.execute("update t set a = 2 where id < 4", "delete from t where id = 4", "insert into t values (6, 6, 6)")
        world.execute("update t set b = 9 where id = 1")  # another column
        world.execute("update t set a = 3 where id = 2", "update t set a = 2 where id = 2")  # and back
        world.execute("delete from t where id = 3", "insert into t values (4, 8, 8)", "update t set b = 7 where id = 6")
        caught_up(world)
        seqs = [str(start + n) for n in range(1, 6)]
        revert(world, seqs[0], "--apply")
        assert rows(world, "select * from t where id = 1") == [(1, 1, 9)]
        found = planned(world, *seqs[1:], code=2)
        assert [(s["key"], s["conflict"]["reason"], s["conflict"]["versions"]["now"]) for s in found["steps"]] == [
            ("6", "b changed since", {"id": 6, "a": 6, "b": 7}),
            ("4", "a row with this key exists again", {"id": 4, "a": 8, "b": 8}),
            ("3", "the row does not exist any more", None),
            ("2", "the same columns changed later", {"id": 2, "a": 2, "b": 1}),
        ]
        assert len(found["steps"][3]["conflict"]["later"]) == 2
        shown = revert(world, seqs[1], code=2)
        assert "before: " in shown.stdout and "change: " in shown.stdout and "now: " in shown.stdout
        assert "later changes: seq" in shown.stdout and "--force undoes the changes anyway" in shown.stderr
        before = rows(world, "select * from t order by id")
        revert(world, *seqs[1:], "--apply", code=2)
        assert rows(world, "select * from t order by id") == before
        revert(world, *seqs[1:], "--apply", "--force")
        assert rows(world, "select * from t order by id") == [(1, 1, 9), (2, 1, 1), (3, 1, 1), (4, 1, 1), (5, 1, 1)]


def test_rows_that_refer_to_a_row_are_not_deleted_with_it(world18: World) -> None:
    world18.execute(
        "create table p (id int primary key)",
        "create table c (id int primary key, p int references p on delete cascade)",
        "create table r (id int primary key, p int references p)",
    )
    world18.consumer(tables=("public.p", "public.c"))
    with world18.bridge():
        world18.execute("insert into p values (1)", "insert into p values (2)", "insert into c values (1, 1), (2, 1)")
        last = caught_up(world18)
        world18.execute("insert into r values (1, 2)")
        refused = revert(world18, "1", "--apply", code=2)
        assert "2 rows of public.c that the revert leaves refer to it (c_p_fkey), and would be deleted with it" in (
            refused.stderr
        )
        refused = revert(world18, "2", "--apply", "--force", code=2)
        assert (
            "1 row of public.r that the revert leaves refer to it (r_p_fkey), and prevent the delete" in refused.stderr
        )
        assert rows(world18, "select count(*) from p, c") == [(4,)]
        revert(world18, "1", str(last - 1), str(last), "--apply")
        assert rows(world18, "select * from p") == [(2,)] and rows(world18, "select * from c") == []


def test_a_gap_or_a_filter_makes_earlier_messages_worthless(world18: World) -> None:
    world18.execute("create table t (id int primary key, a int)", "create table f (id int primary key, a int)")
    world18.consumer()
    world18.consumer("filtered", tables=("public.f",), filter="record.a != 2")
    with world18.bridge():
        world18.execute("insert into t values (1, 1)", "insert into f values (1, 1)")
        world18.execute("update f set a = 2", "update f set a = 3")
        filtered = caught_up(world18)
    world18.execute("update t set a = 2")
    assert world18.run_program("slot", "recreate", "--yes").returncode == 0
    with world18.bridge():
        world18.execute("update t set a = 3")
        for seq in (caught_up(world18), filtered):
            refused = revert(world18, str(seq), "--apply", code=2)
            assert "neither `old` nor an earlier message of the key has the values" in refused.stderr
    assert rows(world18, "select t.a, f.a from t, f") == [(3, 3)]


def test_a_value_that_its_column_cannot_hold_any_more(world18: World) -> None:
    world18.execute(
        "create table t (id int primary key, a text, b text)", "create table n (id text primary key, a int)"
    )
    world18.consumer(tables=("public.t", "public.n"))
    with world18.bridge():
        world18.execute("insert into t values (1, 'long text', '1')", "insert into n values ('x', 1)")
        world18.execute("update t set a = 'short'", "update t set b = '2'", "update n set a = 2")
        last = caught_up(world18)
        world18.execute("update n set id = '1'")
        world18.execute("alter table t alter a type varchar(5), alter b type int using b::int")
        world18.execute("alter table n alter id type int using id::int")
        refused = revert(world18, str(last - 2), "--apply", code=2)
        assert "the table cannot hold the former values of a any more" in refused.stderr
        refused = revert(world18, str(last), "--apply", code=2)
        assert "the key of a row does not fit its columns any more" in refused.stderr
        refused = revert(world18, str(last - 1), "--apply", code=2)
        assert "the table cannot hold the former values of b any more" in refused.stderr
        assert rows(world18, "select a, b from t") == [("short", 2)]


def test_a_role_that_may_not_write_is_told_the_grant(world18: World) -> None:
    world18.execute("create table t (id int primary key, a int)")
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t values (1, 1)", "update t set a = 2")
        last = caught_up(world18)
    role = f"reader_{world18.database}"
    world18.execute(f"create role {role} login", f"grant select on t to {role}")
    try:
        world18.store_dsn, world18.user = world18.dsn, role
        refused = revert(world18, str(last), "--apply", code=3)
        assert "permission denied for table t" in refused.stderr
        assert "A revert needs SELECT, INSERT, UPDATE and DELETE" in " ".join(refused.stderr.split())
    finally:
        world18.user, world18.store_dsn = "postgres", None
        world18.execute(f"drop owned by {role}", f"drop role {role}")


def prepared(world: World, seq: int) -> Revert:
    """A plan that is not applied yet."""
    config = world.config()
    with connect_store(config.store_dsn, config.store.schema_, "test") as store:
        return prepare(config, store, Selection(seqs=(seq,)), force=False)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("update t set a = 7 where id = 1", "a changed since"),
        ("delete from t where id = 1", "the row does not exist any more"),
        ("alter table t add c int", "was altered meanwhile"),
    ],
)
@pytest.mark.parametrize("open_", [True, False], ids=["open", "committed"])
def test_a_writer_between_the_plan_and_its_application(
    world18: World, statement: str, reason: str, open_: bool
) -> None:
    """The rows are locked and compared again, also after a wait for a transaction that holds them."""
    world18.execute("create table t (id int primary key, a int)")
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t values (1, 1)", "update t set a = 2")
        plan = prepared(world18, caught_up(world18))
    assert not plan.plan.conflicts
    raised: list[BaseException] = []

    def undo() -> None:
        try:
            apply(world18.config(), plan, force=False)
        except BaseException as error:
            raised.append(error)

    with psycopg.connect(world18.dsn) as writer:
        writer.execute(statement.encode())
        if not open_:
            writer.commit()
        thread = threading.Thread(target=undo)
        thread.start()
        if open_:
            waits = (
                "select from pg_stat_activity where application_name = 'cdcbridge revert' and wait_event_type = 'Lock'"
            )
            eventually(lambda: rows(world18, waits), "the revert waits")
            writer.commit()
        thread.join(60)
    assert len(raised) == 1 and reason in str(raised[0]), raised
    assert rows(world18, "select a from t") in ([(7,)], [], [(2,)])


def test_a_row_that_stays_locked(world18: World, impatient: None) -> None:
    world18.execute("create table t (id int primary key, a int)")
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t values (1, 1)", "update t set a = 2")
        plan = prepared(world18, caught_up(world18))
    with psycopg.connect(world18.dsn) as writer:
        writer.execute("select from t for update")
        with pytest.raises(LockedOut, match=f"pid {writer.info.backend_pid}"):
            apply(world18.config(), plan, force=False)
    assert rows(world18, "select a from t") == [(2,)]


def test_a_row_that_another_session_inserts_meanwhile(world18: World) -> None:
    world18.execute("create table t (id int primary key, a int)")
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t values (1, 1)", "delete from t")
        plan = prepared(world18, caught_up(world18))
    world18.execute("insert into t values (1, 5)")
    with pytest.raises(RevertRefused, match="a row with this key exists again"):
        apply(world18.config(), plan, force=False)


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_an_end_in_the_middle_leaves_nothing(world18: World, end: str) -> None:
    """The last step waits in a trigger, and then the program, or its session, ends."""
    world18.execute(
        "create table t (id int primary key, a int)",
        "create function wait() returns trigger language plpgsql as"
        " $$ begin perform pg_advisory_xact_lock(7); return new; end $$",
    )
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t select i, 1 from generate_series(1, 50) i", "update t set a = 2")
        last = caught_up(world18)
        world18.execute("create trigger w before update on t for each row when (old.id = 1) execute function wait()")
        arguments = ["revert", *map(str, range(last - 49, last + 1)), "--apply"]
        with psycopg.connect(world18.dsn) as holder:
            holder.execute("select pg_advisory_xact_lock(7)")
            process = world18._start(arguments, "revert.log", None, None, None)
            query = "select pid from pg_stat_activity where wait_event = 'advisory' and application_name = 'cdcbridge revert'"
            ((pid,),) = eventually(lambda: rows(world18, query), "the revert waits in the trigger")
            if end == "kill":
                process.send_signal(signal.SIGKILL)
            else:
                holder.execute("select pg_terminate_backend(%s)", (pid,))
            assert process.wait(30) != 0
        eventually(lambda: not rows(world18, f"select from pg_stat_activity where pid = {pid}"), "the session ended")
        assert rows(world18, "select count(*) from t where a = 2") == [(50,)]
        assert caught_up(world18) == last
