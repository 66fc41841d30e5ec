"""Tables that are created later under a wildcard: the event trigger gives them a replica identity."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from cdcbridge.checks.server import check
from cdcbridge.problem import Problem
from cdcbridge.source import event_trigger
from tests.harness.world import World


def identity(world: World, table: str) -> str:
    row = world.sql.execute("select relreplident::text from pg_class where oid = to_regclass(%s)", (table,)).fetchone()
    assert row
    return str(row[0])


def triggers(world: World) -> list[str]:
    return [name for (name,) in world.sql.execute("select evtname from pg_event_trigger order by 1").fetchall()]


def found(world: World) -> dict[str, Problem]:
    return {problem.code: problem for problem in check(world.config())}


@pytest.fixture
def wild(world: World) -> World:
    world.execute("create table t (id int primary key)")
    world.settings["event_trigger"] = True
    world.consumer(tables=("public.*",))
    return world


def test_a_table_that_is_created_later_without_a_key(wild: World) -> None:
    assert found(wild) == {}
    with wild.bridge():
        assert triggers(wild) == ["cdcbridge_identity_command", "cdcbridge_identity_drop"]
        wild.execute("create table later (id int, v text)", "insert into later values (1, 'a')", "update later set v = 'b'",
                     "delete from later", "insert into t values (1)")  # fmt: skip
        messages = wild.messages(4)
        assert [(topic, data["op"]) for topic, _, data in messages] == [
            ("public.later", "insert"), ("public.later", "update"), ("public.later", "delete"), ("public.t", "insert")
        ]  # fmt: skip
        assert messages[1][2]["old"] == {"id": 1, "v": "a"} and messages[2][2]["record"] == {"id": 1, "v": "b"}
        wild.execute("alter table later add primary key (id)")
        assert identity(wild, "later") == "d"
        wild.execute("insert into later values (2, 'a')", "update later set v = 'c'", "insert into t values (2)")
        later = [data for topic, _, data in wild.messages(7) if topic == "public.later"]
        assert later[-1]["old"] is None
        wild.execute("alter table later drop constraint later_pkey", "update later set v = 'd'")
        assert identity(wild, "later") == "f"
    wild.settings["event_trigger"] = False
    with wild.bridge():
        assert triggers(wild) == []
        assert wild.sql.execute("select to_regnamespace('cdcbridge_identity')").fetchone() == (None,)
        assert identity(wild, "later") == "f"


@pytest.mark.parametrize("schema", ["cdcbridge", "cdcbridge_internal"])
def test_the_stores_own_tables_are_left_out(wild: World, schema: str) -> None:
    wild.consumer(tables=("*.*",))
    with wild.bridge():
        wild.execute(f"create table {schema}.own (id int)", "create table other (id int)")
        assert (identity(wild, f"{schema}.own"), identity(wild, "other")) == ("d", "f")


def test_each_way_to_make_a_table(wild: World) -> None:
    with wild.bridge():
        wild.execute(
            "create table as_query as select 1 as id, 2 as v",
            "select 1 as id, 2 as v into selected",
            "create table root (id int, v int) partition by range (id)",
            "create table root_1 partition of root for values from (0) to (10)",
            "create table root_2 (id int, v int)",
            "alter table root attach partition root_2 default",
            "create table base (id int, v int)",
            "create table kid () inherits (base)",
            "create table copied (like t including all)",
            "create table deferrable_ (id int primary key deferrable, v int)",
            "create unlogged table unlogged_ (id int, v int)",
            "create temporary table temporary_ (id int, v int)",
            "create schema elsewhere create table far (id int, v int)",
            "create table elsewhere.moved (id int, v int)",
            "create table chosen (id int not null unique, v int)",
        )
        full = ("as_query", "selected", "root", "root_1", "root_2", "base", "kid", "deferrable_", "chosen")
        assert {name: identity(wild, name) for name in full} == dict.fromkeys(full, "f")
        for name in ("copied", "unlogged_", "elsewhere.far", "elsewhere.moved"):
            assert identity(wild, name) == "d", name
        wild.execute("alter table elsewhere.moved set schema public", "alter table unlogged_ set logged",
                     "alter table chosen replica identity using index chosen_id_key")  # fmt: skip
        assert [identity(wild, name) for name in ("moved", "unlogged_", "chosen")] == ["f", "f", "i"]
        wild.execute("alter table chosen drop constraint chosen_id_key")
        assert identity(wild, "chosen") == "f"
        wild.execute("alter table root add primary key (id)")
        assert [identity(wild, name) for name in ("root", "root_1", "root_2")] == ["d", "d", "d"]
        wild.execute("alter table t drop column id cascade", "alter table t add column id int")
        assert identity(wild, "t") == "f"
        for name in (*full, "t", "moved", "unlogged_", "copied"):
            first = 50 if name == "root_2" else 5
            wild.execute(
                f"insert into {name} (id) values ({first})", f"update {name} set id = id + 1", f"delete from {name}"
            )


def test_an_index_that_is_dropped_by_itself_or_concurrently(wild: World) -> None:
    with wild.bridge():
        for name, how in (("a", ""), ("b", "concurrently")):
            wild.execute(f"create table {name} (id int not null)", f"create unique index {name}_i on {name} (id)",
                         f"alter table {name} replica identity using index {name}_i",
                         f"drop index {how} {name}_i")  # fmt: skip
            assert identity(wild, name) == "f"
            wild.execute(f"insert into {name} values (1)", f"update {name} set id = 2")


def test_the_owner_of_a_table_needs_no_right_on_the_trigger(wild: World) -> None:
    role = f"r_{wild.database}"
    with wild.bridge():
        wild.execute(f"create role {role} login", f"grant create on schema public to {role}")
        try:
            with psycopg.connect(wild.server.dsn(wild.database, role), autocommit=True) as application:
                application.execute("set search_path = pg_temp, public")
                application.execute("create table public.theirs (id int, v int)")
                application.execute("insert into public.theirs values (1, 1)")
                application.execute("update public.theirs set v = 2")
                application.execute("alter table public.theirs add primary key (id)")
                assert identity(wild, "theirs") == "d"
                with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
                    application.execute("select cdcbridge_identity.mend(null)")
                    raise AssertionError("the function is not for everybody")
        finally:
            wild.execute(f"drop owned by {role} cascade", f"drop role {role}")


def test_what_fails_in_the_trigger_is_a_warning(wild: World) -> None:
    notices: list[str] = []
    with wild.bridge():
        wild.sql.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
        wild.execute("alter table cdcbridge_identity.changed rename to changed_", "create table later (id int)",
                     "alter table later add primary key (id)", "drop table later")  # fmt: skip
        assert any("could not correct the replica identities" in notice for notice in notices), notices
        wild.execute("alter table cdcbridge_identity.changed_ rename to changed", "create table later (id int)")
        assert identity(wild, "later") == "f"


def test_check_prints_it_and_what_was_made_by_hand_stays(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer(tables=("public.*",))
    problem = found(world)["wildcard_identity"]
    assert ("wal2json will drop" if world.plugin == "wal2json" else "PostgreSQL will refuse") in problem.message
    assert problem.severity == "warning" and "source.event_trigger" in problem.message
    world.execute(problem.fix)
    assert found(world) == {}
    with world.bridge():
        world.execute("create table later (id int)", "insert into later values (1)", "update later set id = 2")
        assert len(triggers(world)) == 2
    world.consumer(tables=("public.*", "more.*"))
    world.execute("create schema more")
    world.execute(found(world)["wildcard_identity"].fix, "create table more.later (id int)")
    assert found(world) == {} and identity(world, "more.later") == "f"
    world.execute("alter event trigger cdcbridge_identity_command disable")
    assert "wildcard_identity" in found(world)


def test_it_goes_when_no_wildcard_needs_it_and_comes_for_what_is_added(wild: World) -> None:
    wild.consumer(operations=["insert", "truncate"], tables=("public.*",))
    with wild.bridge():
        assert triggers(wild) == []
    wild.consumer(tables=("public.*",))
    with wild.bridge():
        assert len(triggers(wild)) == 2
    wild.consumer(tables=("*.*",))
    with wild.bridge():
        wild.execute("create schema s", "create table s.later (id int)")
        assert identity(wild, "s.later") == "f"
    wild.consumer(tables=("public.t",))
    with wild.bridge():
        assert triggers(wild) == []


def test_partitions_of_a_named_table(world: World) -> None:
    world.execute("create table root (id int, v int) partition by range (id)", "alter table root replica identity full")
    world.settings["event_trigger"] = True
    world.consumer(tables=("public.root",))
    with world.bridge():
        world.execute("create table leaf partition of root default", "create table other (id int)",
                      "insert into root values (1, 1)", "update root set v = 2")  # fmt: skip
        assert (identity(world, "leaf"), identity(world, "other")) == ("f", "d")
        assert [data["op"] for data in world.data(2)] == ["insert", "update"]


def test_a_role_that_may_not_install_it(world18: World) -> None:
    role = f"r_{world18.database}"
    world18.execute("drop schema cdcbridge, cdcbridge_internal cascade",  # the role makes its own
                    "create table t (id int primary key)", f"create role {role} login replication",
                    f"grant create on database {world18.database} to {role}")  # fmt: skip
    try:
        world18.settings["event_trigger"] = True
        world18.consumer(tables=("public.*",))
        world18.user = role
        problem = found(world18)["event_trigger"]
        assert problem.severity == "error" and "no superuser" in problem.message
        with psycopg.connect(world18.server.dsn(world18.database), autocommit=True) as owner:
            owner.execute(problem.fix.encode())
        assert "event_trigger" not in found(world18)
    finally:
        world18.user = "postgres"
        if world18._sql is not None:
            world18.leave()
        world18.execute(f"drop owned by {role} cascade", f"drop role {role}")


def test_bridges_that_install_and_remove_it_at_once(wild: World) -> None:
    """Each has a slot of its own. CREATE ... IF NOT EXISTS and OR REPLACE fail where another session does the same."""
    rounds, bridges, configs = 5, 4, wild.config()
    together = threading.Barrier(bridges, timeout=20)

    def start(number: int) -> None:
        source = configs.source.model_copy(update={"slot": f"{configs.source.slot}_{number}"})
        config = configs.model_copy(update={"source": source})
        with psycopg.connect(wild.dsn, autocommit=True) as session:
            for _ in range(rounds):
                together.wait()
                assert event_trigger.ensure(config, session)
                together.wait()
                assert event_trigger.installed_scope(session, source.slot) is not None
                together.wait()
                event_trigger.remove(session, source.slot)
                assert event_trigger.installed_scope(session, source.slot) is None

    with ThreadPoolExecutor(bridges) as pool:
        errors = [future.exception() for future in [pool.submit(start, number) for number in range(bridges)]]
    assert not any(errors), errors
    assert triggers(wild) == []
