"""Changes are undone in the source: each way of naming them, and each kind of change."""

from __future__ import annotations

import re

from tests.harness.world import World, eventually, store_database
from tests.revert.conftest import caught_up, planned, revert, rows


def test_an_update_a_delete_and_an_insert_are_undone(world: World) -> None:
    world.execute("create table t (id int primary key, a text, b numeric)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 'x', 1.50), (2, 'y', 2)")
        world.execute("update t set a = 'wrong' where id = 1", "delete from t where id = 2", "insert into t values (3)")
        last = caught_up(world)
        plan = revert(world, str(last - 2), str(last - 1), str(last))
        assert "Nothing was changed. --apply undoes 3 changes" in plan.stderr
        assert 'a: "wrong" -> "x"' in plan.stdout and "begin;" in plan.stdout
        assert rows(world, "select id, a from t order by id") == [(1, "wrong"), (3, None)]
        assert caught_up(world) == last
        done = revert(world, str(last), str(last - 2), str(last - 1), "--apply")
        assert "Undid 3 changes" in done.stderr
        assert rows(world, "select id, a, b::text from t order by id") == [(1, "x", "1.50"), (2, "y", "2")]
        caught_up(world)
    annotated = world.rows("select data ->> 'op', data -> 'annotation' from messages where seq > %s order by seq", last)
    reverts = {"reverts": {"seqs": [last - 2, last - 1, last], "changes": 3}}
    assert annotated == [("delete", reverts), ("insert", reverts), ("update", reverts)]


def test_values_that_an_update_did_not_carry_come_from_earlier_messages(world: World) -> None:
    world.execute(
        "create table t (id int primary key, a int, big text)", "alter table t alter big set storage external"
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 1, repeat('x', 9000))")
        world.execute("update t set a = 2", "update t set a = 3", "delete from t")
        last = caught_up(world)
        assert world.value("select data ->> 'unchanged' from messages where seq = %s", last - 1) == '["big"]'
        revert(world, str(last), "--apply")
        assert rows(world, "select a, length(big) from t") == [(3, 9000)]
        world.execute("update t set big = 'short'")
        last = caught_up(world)
        revert(world, str(last), "--apply")
        assert rows(world, "select a, length(big) from t") == [(3, 9000)]


def test_a_row_that_is_older_than_the_log_needs_its_old_values(world: World) -> None:
    world.execute("create table t (id int primary key, a text)", "create table f (id int primary key, a text)")
    world.execute(
        "alter table f replica identity full", "insert into t values (1, 'x')", "insert into f values (1, 'x')"
    )
    world.consumer(tables=("public.t", "public.f"))
    with world.bridge():
        world.execute("update t set a = 'y'", "update f set a = 'y'", "delete from f", "delete from t")
        last = caught_up(world)
        refused = revert(world, str(last - 3), str(last - 2), "--apply", code=2)
        assert f"seq {last - 3}: neither `old` nor an earlier message of the key has the values" in refused.stderr
        assert rows(world, "select from f") == []
        revert(world, str(last), "--apply")  # the update has the whole row
        assert rows(world, "select * from t") == [(1, "y")]
        revert(world, str(last - 3), "--apply", "--force", code=2)
        revert(world, str(last - 2), str(last - 1), "--apply")
        assert rows(world, "select * from f") == [(1, "x")]


def test_a_transaction_is_undone_in_reverse_order(world: World) -> None:
    world.execute(
        "create table p (id int primary key)",
        "create table t (id int primary key, p int references p on delete cascade, v int)",
    )
    world.consumer(tables=("public.p", "public.t"))
    with world.bridge():
        world.execute("insert into p values (1), (2)", "insert into t values (1, 1, 1), (2, 1, 1), (3, 2, 1)")
        world.execute(
            "begin; update t set v = 2 where id = 1; update t set v = 3 where id = 1; delete from p where id = 1;"
            " insert into p values (9); insert into t values (9, 9, 9); update t set p = 9 where id = 3; commit"
        )
        last = caught_up(world)
        lsn = world.value("select commit_lsn::text from messages where seq = %s", last)
        document = planned(world, "--transaction", lsn)
        assert [s["act"] for s in document["steps"]] == [
            "update", "delete", "delete", "insert", "insert", "insert", "update", "update",
        ]  # fmt: skip
        revert(world, "--transaction", lsn, "--apply")
        assert rows(world, "select * from p order by 1") == [(1,), (2,)]
        assert rows(world, "select * from t order by 1") == [(1, 1, 1), (2, 1, 1), (3, 2, 1)]
        caught_up(world)
        made = world.value("select data #>> '{annotation,reverts,transaction}' from messages order by seq desc limit 1")
        assert made == lsn


def test_a_key_returns_to_a_state_and_a_table_to_a_time(world: World) -> None:
    world.execute("create table t (id int primary key, a int)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 1), (2, 1)", "update t set a = 2 where id = 1")
        kept = caught_up(world)
        world.execute("update t set a = 3", "delete from t where id = 1", "insert into t values (1, 4)")
        revert(world, "--table", "public.t", "--key", "1", "--to", str(caught_up(world)), "--apply")  # nothing
        done = revert(world, "--table", "public.t", "--key", "1", "--to", str(kept), "--apply")
        assert "Undid 3 changes" in done.stderr
        assert rows(world, "select * from t order by id") == [(1, 2), (2, 3)]
        (begin,) = rows(world, "select clock_timestamp()::text")[0]
        world.execute("update t set a = 7", "delete from t where id = 2")
        (end,) = rows(world, "select clock_timestamp()::text")[0]
        world.execute("insert into t values (5, 5)")
        caught_up(world)
        revert(world, "--table", "public.t", "--from", begin, "--until", end, "--apply")
        assert rows(world, "select * from t order by id") == [(1, 2), (2, 3), (5, 5)]
        done = revert(world, "--table", "public.t", "--from", "+1h", "--until", "+2h", "--apply")
        assert "There is nothing to undo." in done.stderr


def test_a_changed_key_changes_back(world: World) -> None:
    world.execute("create table t (a int, b text, v int, primary key (a, b))")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 'x', 1), (2, 'x', 1)", "update t set a = 9, v = 2 where a = 1")
        last = caught_up(world)
        world.execute("update t set v = 5 where a = 2")
        revert(world, str(last), "--apply")
        assert rows(world, "select * from t order by 1") == [(1, "x", 1), (2, "x", 5)]
        world.execute("update t set b = 'y' where a = 1", "insert into t values (1, 'x', 7)")
        last = caught_up(world)
        refused = revert(world, str(last - 1), "--apply", "--force", code=2)
        assert "another row has the former key" in refused.stderr
        assert rows(world, "select * from t order by 1, 2") == [(1, "x", 7), (1, "y", 1), (2, "x", 5)]


def test_columns_that_were_dropped_added_or_are_generated(world: World) -> None:
    world.execute(
        "create table t (id int generated always as identity primary key, a int, b int,"
        " double int generated always as (a * 2) stored)"
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t (a, b) values (1, 1), (2, 2)", "update t set a = 5, b = 5 where id = 1")
        world.execute("delete from t where id = 2")
        last = caught_up(world)
        world.execute("alter table t drop b", "alter table t add c int not null default 7")
        plan = revert(world, str(last - 1), str(last)).stdout
        assert "column b is left out, because the table lacks it now" in plan
        assert "column c was added later, and gets its default" in plan and "overriding system value" in plan
        revert(world, str(last - 1), str(last), "--apply")
        assert rows(world, "select id, a, double, c from t order by id") == [(1, 1, 2, 7), (2, 2, 4, 7)]
        world.execute("alter table t add d int default 1", "update t set d = 8 where id = 1")
        refused = revert(world, str(caught_up(world)), "--apply", code=2)
        assert "has the values before the change of: d" in refused.stderr


def test_partitions_are_undone_through_their_root(world: World) -> None:
    world.execute(
        "create table t (id int primary key, a int) partition by range (id)",
        "create table t1 partition of t for values from (0) to (10)",
        "create table t2 partition of t for values from (10) to (20)",
    )
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, 1), (12, 1)")
        world.execute(
            "begin; update t set id = 11 where id = 1; update t set a = 2; delete from t where id = 12; commit"
        )
        lsn = world.value("select commit_lsn::text from messages where seq = %s", caught_up(world))
        revert(world, "--transaction", lsn, "--apply")
        assert rows(world, "select tableoid::regclass::text, * from t order by id") == [("t1", 1, 1), ("t2", 12, 1)]


def test_rows_without_a_key_are_told_apart_by_all_columns(world: World) -> None:
    world.execute("create table t (a int, j json)", "alter table t replica identity full", "create table k (a int)")
    world.consumer()
    world.consumer("k", tables=("public.k",), operations=["insert"])
    with world.bridge():
        world.execute(
            "insert into t values (1, '{\"x\":  1}'), (1, '{\"x\":  1}'), (2, null)", "insert into k values (1)"
        )
        no_key = caught_up(world)
        world.execute("delete from t where a = 2", "update t set a = 5 where ctid = '(0,1)'")
        last = caught_up(world)
        revert(world, str(last - 1), str(last), "--apply")
        assert rows(world, "select a, j::text from t order by a") == [(1, '{"x":  1}'), (1, '{"x":  1}'), (2, None)]
        refused = revert(world, str(no_key), "--apply", code=2)
        assert "public.k has no primary key and no REPLICA IDENTITY FULL" in refused.stderr
        world.execute("update t set a = 6 where a = 1", "update t set a = 7 where a = 6")
        refused = revert(world, str(caught_up(world) - 2), "--apply", "--json", code=2)
        assert "no row has these values any more" in refused.stdout


def test_the_sql_of_the_plan_does_the_same(world18: World) -> None:
    world = world18
    world.execute("create table t (id int primary key, a text, tags text[], j jsonb)")
    world.consumer()
    with world.bridge():
        world.execute(r"insert into t values (1, E'it''s\n \\ 100%% \u2028{}', '{a,NULL}', '[1.50]')")
        before = rows(world, "select t::text from t")
        world.execute("update t set a = null, tags = null, j = null", "delete from t")
        last = caught_up(world)
        plan = revert(world, str(last - 1), str(last)).stdout
        sql = plan[plan.index("begin;") :]
        assert all(line.endswith(";") for line in sql.splitlines())
        world.sql.execute(sql.encode())
        assert rows(world, "select t::text from t") == before
        last = caught_up(world)
        assert world.value("select data #>> '{annotation,reverts,changes}' from messages where seq = %s", last) == "2"


def test_source_and_store_are_two_databases(world18: World) -> None:
    with store_database(world18.server) as store:
        world18.store_dsn = world18.server.dsn(store)
        world18.execute("create table t (id int primary key, a int)")
        world18.consumer()
        with world18.bridge():
            world18.execute("insert into t values (1, 1)", "update t set a = 2")
            revert(world18, str(caught_up(world18)), "--apply")
            assert rows(world18, "select * from t") == [(1, 1)]
            caught_up(world18)
        world18.leave()


def test_a_stream_and_a_snapshot_are_histories_too(world: World) -> None:
    world.execute("create table t (id int primary key, a int)", "insert into t values (1, 1), (2, 2)")
    world.consumer(mode="stream", start="snapshot")
    with world.bridge():
        eventually(lambda: world.value("select count(*) from messages") == 2, "the snapshot")
        world.execute("update t set a = 5 where id = 1", "delete from t where id = 2")
        last = caught_up(world)
        revert(world, str(last - 1), str(last), "--apply")
        assert rows(world, "select * from t order by 1") == [(1, 1), (2, 2)]


def test_json_for_programs(world18: World) -> None:
    world18.execute("create table t (id int primary key, a numeric)")
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t values (1, 1.50)", "update t set a = 2")
        last = caught_up(world18)
        found = planned(world18, str(last))
        assert found["applied"] is False and found["problems"] == []
        assert found["steps"] == [
            {
                "seq": last, "topic": "public.t", "key": "1", "op": "update", "act": "update",
                "columns": {"a": {"from": 2, "to": 1.5}}, "notes": [], "conflict": None,
            }
        ]  # fmt: skip
        assert re.fullmatch(r'update only "public"."t" t set "a" = \'1.50\'::numeric where .*', found["sql"][1])
        assert planned(world18, str(last), "--apply")["applied"] is True
        assert rows(world18, "select a::text from t") == [("1.50",)]


def test_triggers_fire_and_may_refuse(world18: World) -> None:
    world18.execute(
        "create table t (id int primary key, a int)",
        "create table seen (what text)",
        "create function note() returns trigger language plpgsql as $$ begin insert into public.seen values (tg_op);"
        " if new.a = 13 then raise exception 'not 13'; elsif new.a = 14 then return null; end if; return new; end $$",
    )
    world18.consumer()
    with world18.bridge():
        world18.execute("insert into t values (1, 1), (13, 13), (14, 14)", "update t set a = 0")
        last = caught_up(world18)
        world18.execute("create trigger n before insert or update on t for each row execute function note()")
        for number, reason in ((13, "not 13"), (14, "changed 0 rows of public.t")):
            refused = revert(world18, str(last), str(last - 1), str(last - 2), "--apply", code=2)
            assert "nothing was changed" in refused.stderr
            assert rows(world18, "select distinct a from t") == [(0,)] and rows(world18, "select * from seen") == []
            del number, reason
        revert(world18, str(last - 2), "--apply")
        assert rows(world18, "select * from seen") == [("UPDATE",)] and rows(
            world18, "select a from t where id = 1"
        ) == [(1,)]
