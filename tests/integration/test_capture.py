"""What pgoutput can no longer tell: publications and tables that are altered, dropped or replaced under the bridge."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from cdcbridge.lsn import parse_lsn
from cdcbridge.source.capture import Capture, losses
from tests.harness.world import World, eventually

GAPS = "select data -> 'record' ->> 'from', data -> 'record' ->> 'to', data -> 'record' ->> 'reason' from messages where topic = 'cdcbridge.gap' order by seq"
# What somebody does to the publication of table t, and what the gap's reason names.
ALTERED = {
    "dropped": ("drop publication cdcbridge", "cdcbridge was dropped"),
    "renamed": ("alter publication cdcbridge rename to elsewhere", "cdcbridge was dropped or renamed"),
    "table taken out": ("alter publication cdcbridge drop table t", "public.t was taken out"),
    "operations": ("alter publication cdcbridge set (publish = 'insert')", "was altered"),
    "row filter": ("alter publication cdcbridge set table t where (id > 100)", "public.t was taken out"),
    "column list": ("alter publication cdcbridge set table t (id)", "public.t was taken out"),
    "taken out and back": (
        "alter publication cdcbridge drop table t; insert into t values (7, 'x'); alter publication cdcbridge add table t",
        "public.t was taken out",
    ),
    "dropped and made anew": (
        "drop publication cdcbridge; insert into t values (7, 'x'); create publication cdcbridge for table t",
        "altered, or dropped and created again",
    ),
}


@pytest.fixture(params=["pg18", "pg15"])
def pgoutput(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    from tests.harness.world import fresh_database

    server = request.getfixturevalue(request.param)
    with fresh_database(server) as database:
        made = World(server, database, "pgoutput", tmp_path)
        made.execute("create table t (id int primary key, v text)", "create table u (id int primary key)")
        made.consumer(tables=("public.t", "public.u"))
        yield made
        made.close()


def _told(world: World, before: str, after: str) -> list[tuple[str, str, str]]:
    """The gaps. They cover what was done at `before`, and everything up to `after` where a change of row 2 is missing.

    The bridge may have corrected the publication before row 2 was written, and then nothing of it is missing.
    """
    gaps = eventually(lambda: world.rows(GAPS), "a gap message")

    def covered(lsn: str) -> bool:
        return any(parse_lsn(first) <= parse_lsn(lsn) <= parse_lsn(last) for first, last, _ in gaps)

    assert covered(before), (before, gaps)
    missing = world.value("select count(*) = 0 from messages where key = '2'")
    assert not missing or covered(after), (after, gaps)
    return list(gaps)


def _lsn(world: World) -> str:
    row = world.sql.execute("select pg_current_wal_lsn()::text").fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize("what", ALTERED)
@pytest.mark.parametrize("running", [True, False], ids=["running", "down"])
def test_a_publication_that_is_altered_is_mended_and_what_it_left_out_is_told(
    pgoutput: World, what: str, running: bool
) -> None:
    world = pgoutput
    statements, reason = ALTERED[what]
    with world.bridge():
        world.execute("insert into t values (1, 'a')")
        world.messages(1)
        before = _lsn(world)
        if running:
            world.execute(*statements.split("; "), "insert into t values (2, 'lost')", "update t set v = 'lost'")
            after = _lsn(world)
            _told(world, before, after)
    if not running:
        before = _lsn(world)
        world.execute(*statements.split("; "), "insert into t values (2, 'lost')", "update t set v = 'lost'")
        after = _lsn(world)
    with world.bridge():
        gaps = _told(world, before, after)
        world.execute("insert into t values (3, 'after')", "update t set v = 'last' where id = 3")
        eventually(lambda: world.value("select count(*) from messages where key = '3'") == 2, "both changes of 3")
    assert reason in gaps[0][2], gaps
    consumers = world.value(
        "select count(*) from consumer_messages m join messages l using (seq) where l.topic = 'cdcbridge.gap'"
    )
    assert consumers == len(world.rows(GAPS)), "every consumer is told"


REPLACED = {
    "one transaction": "begin; drop table t; create table t (id int primary key, v text); insert into t values (2, 'first'); commit",
    "renamed": "alter table t rename to t_old; create table t (like t_old including all); insert into t values (2, 'first')",
    "swapped": "create table t_new (like t including all); begin; alter table t rename to t_old; alter table t_new rename to t; commit; insert into t values (2, 'first')",
    "another schema": "create schema attic; alter table t set schema attic; create table t (like attic.t including all); insert into t values (2, 'first')",
    "restored": "drop table t cascade; create table public.t (id int not null, v text); insert into t values (2, 'first'); alter table only public.t add constraint t_pkey primary key (id)",
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("running", [True, False], ids=["running", "down"])
def test_a_named_table_that_is_replaced_is_captured_again(world: World, how: str, running: bool) -> None:
    world.execute("create table t (id int primary key, v text)", "create table u (id int primary key)")
    world.consumer(tables=("public.t", "public.u"))
    with world.bridge():
        world.execute("insert into t values (1, 'a')")
        world.messages(1)
        before = _lsn(world)
        if running:
            world.sql.execute(REPLACED[how].encode())
            after = _lsn(world)
            if world.plugin == "pgoutput":
                _told(world, before, after)
    if not running:
        before = _lsn(world)
        world.sql.execute(REPLACED[how].encode())
        after = _lsn(world)
    with world.bridge():
        world.execute(
            "insert into t values (3, 'after')", "update t set v = 'last' where id = 3", "insert into u values (9)"
        )
        eventually(lambda: world.value("select count(*) from messages where key = '3'") == 2, "both changes of 3")
        eventually(
            lambda: world.value("select count(*) from messages where topic = 'public.u'") == 1, "the other table"
        )
        if world.plugin == "pgoutput":
            gaps = _told(world, before, after)
            assert "public.t is a different one" in gaps[0][2]
        else:
            assert world.rows(GAPS) == []
            assert world.rows("select data -> 'record' ->> 'v' from messages where key = '2'") == [("first",)]


def test_a_table_that_is_dropped_costs_nothing(pgoutput: World) -> None:
    world = pgoutput
    with world.bridge():
        world.execute("insert into t values (1, 'a')")
        world.messages(1)
        world.execute("drop table t", "insert into u values (1)")
        confirmed = "select confirmed_flush_lsn >= %s from pg_replication_slots where slot_name = %s"
        end = _lsn(world)
        world.execute("insert into u values (2)")
        eventually(lambda: world.sql.execute(confirmed, (end, world.slot)).fetchone() == (True,), "it goes on")
    assert world.rows(GAPS) == []


def test_a_change_of_the_publication_that_the_role_may_not_mend_is_told(pgoutput: World) -> None:
    """A gap message tells what is left out, and the bridge goes on with what the publication has."""
    world = pgoutput
    world.consumer("d", ("public.u",))
    role = f"r_{world.database}"
    world.execute(f"create role {role} login replication", f"grant create on database {world.database} to {role}")
    world.execute("create publication cdcbridge for table only t, only u with (publish_via_partition_root = true)")
    try:
        world.user = role
        owner = psycopg.connect(world.server.dsn(world.database), autocommit=True)
        with world.bridge():
            owner.execute("insert into t values (1, 'a')")
            world.messages(1)
            owner.execute("alter publication cdcbridge drop table t")
            before = owner.execute("select pg_current_wal_lsn()::text").fetchone()
            owner.execute("insert into t values (2, 'lost')")
            owner.execute("insert into u values (1)")
            assert before is not None
            assert "taken out of the publication" in _told(world, before[0], before[0])[-1][2]
            owner.execute("insert into u values (2)")
            arrived = "select count(*) from messages where topic = 'public.u'"
            eventually(lambda: world.value(arrived) == 2, "the other consumer gets its changes")
        with world.bridge():  # a start goes on with the others, too
            owner.execute("insert into u values (3)")
            eventually(lambda: world.value(arrived) == 3, "the other consumer gets its changes")
        owner.execute("alter publication cdcbridge add table only t")
        with world.bridge():
            owner.execute("insert into t values (3, 'after')")
            back = "select count(*) from messages where topic = 'public.t' and key = '3'"
            eventually(lambda: world.value(back) == 1, "it goes on")
            _told(world, before[0], before[0])
        owner.close()
    finally:
        world.user = "postgres"
        if world._sql is not None:
            world.leave()
        world.execute("drop publication if exists cdcbridge", f"drop owned by {role} cascade", f"drop role {role}")


def test_consumers_that_come_and_go_are_no_loss(pgoutput: World) -> None:
    world = pgoutput
    with world.bridge():
        world.execute("insert into t values (1, 'a')")
        world.messages(1)
    world.execute("create table w (id int primary key)", "create schema s", "create table s.x (id int primary key)")
    for tables in (("public.t", "public.w"), ("public.w",), ("public.*", "s.*"), ("*.*",), ("public.t",)):
        world.consumer(tables=tables)
        with world.bridge():
            pass
    assert world.rows(GAPS) == []


def test_check_names_what_changed_since_the_last_session(pgoutput: World) -> None:
    world = pgoutput
    with world.bridge():
        world.execute("insert into t values (1, 'a')")
        world.messages(1)
    world.execute("drop publication cdcbridge")
    found = {p["code"]: p for p in world.json("check", "--json")["problems"]}
    assert found["capture_changed"]["severity"] == "warning"
    assert "cdcbridge was dropped" in found["capture_changed"]["message"]
    assert "cdcbridge run" in found["capture_changed"]["fix"]


ONE = {"row": "1/1", "tables": {"10": "1"}, "schemas": {}}


@pytest.mark.parametrize(
    ("publications", "tables", "expected"),
    [
        ({"p": ONE}, {"public.t": "10"}, 0),
        ({}, {"public.t": "10"}, 1),
        ({"p": {**ONE, "row": "1/2"}}, {"public.t": "10"}, 1),
        ({"p": {**ONE, "tables": {}}}, {"public.t": "10"}, 1),
        ({"p": {**ONE, "tables": {"10": "2"}}}, {"public.t": "10"}, 1),
        ({"p": {**ONE, "tables": {"10": "1", "11": "5"}}}, {"public.t": "10", "public.u": "11"}, 0),
        ({"p": {**ONE, "tables": {}}}, {"public.t": None}, 0),
        ({"p": ONE}, {"public.t": "12"}, 1),
        ({"p": ONE}, {}, 0),
    ],
)  # fmt: skip
def test_losses(publications: dict[str, Any], tables: dict[str, str | None], expected: int) -> None:
    before = Capture({"p": ONE}, {"public.t": "10"}, {})
    assert len(losses(before, Capture(publications, tables, {}))) == expected


def test_what_was_altered_inside_a_transaction_that_is_to_be_finished_is_told_after_it(pgoutput: World) -> None:
    world = pgoutput
    crashing = world.start_process(crash=("committed", 2))
    eventually(world.active, "the bridge streams")
    world.execute("insert into t select g, repeat('x', 200) from generate_series(1, 30000) g")
    crashing.wait(30)
    assert world.value("select unfinished is not null from positions")
    before = _lsn(world)
    world.execute("alter publication cdcbridge drop table t", "insert into t values (50000, 'lost')")
    after = _lsn(world)
    world.start_process()
    eventually(lambda: world.value("select count(*) from messages where topic = 'public.t'") == 30000, "the rest of it")
    gaps = eventually(lambda: world.rows(GAPS), "a gap message")
    assert parse_lsn(gaps[0][0]) <= parse_lsn(before) < parse_lsn(after) <= parse_lsn(gaps[0][1])
    assert "public.t was taken out" in gaps[0][2]
