"""Tables that a consumer leaves out: `tables: ["public.*", "!public.seen"]`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.harness.world import World, eventually

TABLES = ("public.*", "!public.seen", "!public.tmp_*")


def topics(world: World, name: str) -> set[str]:
    return {topic for (topic,) in world.rows("select topic from peek(%s, 100)", name)}


def problems(world: World) -> dict[str, dict[str, Any]]:
    found = json.loads(world.run_program("check", "--json").stdout)["problems"]
    return {problem["object"]: problem for problem in found if problem["code"] != "wildcard_identity"}


def test_a_table_that_is_left_out_reaches_no_path(world: World) -> None:
    world.execute(
        "create table a (id int primary key)", "create table seen (id int primary key)",
        "create table tmp_1 (id int primary key)", "create table tmpx (id int primary key)",
        "insert into a values (1)", "insert into seen values (1)", "insert into tmp_1 values (1)",
    )  # fmt: skip
    world.consumer("c", TABLES, start="snapshot")
    world.consumer("everything", ("public.*",))
    world.consumer("part", ("public.tmp*", "!public.tmp_*"))
    world.consumer("s", TABLES, mode="stream", start="earliest")
    world.consumer("part_s", ("public.tmp*",), mode="stream", start="earliest")
    assert problems(world) == {}
    with world.bridge():
        eventually(lambda: topics(world, "c") == {"public.a"}, "the snapshot")
        assert {name for (name,) in world.rows("select table_name from backfills")} == {"public.a", "public.tmpx"}
        world.execute("create table tmp_later (id int primary key)", "create table later (id int primary key)")
        world.execute(
            *(f"insert into {name} values (2)" for name in ("a", "seen", "tmp_1", "tmpx", "tmp_later", "later"))
        )
        eventually(lambda: len(topics(world, "everything")) == 6)
        assert topics(world, "c") == {"public.a", "public.tmpx", "public.later"}
        assert topics(world, "part") == {"public.tmpx"}
    world.consumer("late", TABLES, start="earliest")
    with world.bridge():
        assert topics(world, "late") == topics(world, "c")
    for name, expected in (("s", topics(world, "c")), ("part_s", {"public.tmpx", "public.tmp_1", "public.tmp_later"})):
        read: set[str] = set()
        while got := world.rows(
            "with r as materialized (select * from read_stream(%s, 100, '1 min')),"
            " c as (select commit_offset(%s, max(partition), max(seq), max(receipt)) from r having count(*) > 0)"
            " select topic, (select count(*) from c) from r", name, name,
        ):  # fmt: skip
            read |= {topic for topic, _ in got}
        assert read == expected
    world.rows("select purge('c')")
    assert world.json("consumers", "replay", "c", "--from", "earliest")["replayed"] == 0, "all wait already"
    refused = world.run_program("backfill", "start", "c", "public.seen")
    assert refused.returncode == 2 and "does not take public.seen" in refused.stderr


def test_the_loop_of_an_effect_that_is_a_change_is_broken(world18: World) -> None:
    world18.execute("create table a (id int primary key)", "create table seen (seq bigint primary key)")
    world18.consumer("audit", ("public.*", "!public.seen"))
    with world18.bridge():
        world18.execute("insert into a values (1)")
        eventually(lambda: world18.value("select count(*) from messages") == 1)
        world18.rows("with r as (select * from receive('audit')), e as (insert into public.seen select seq from r)"
                     " select ack('audit', array_agg(receipt)) from r")  # fmt: skip
        world18.execute("insert into a values (2)")
        eventually(lambda: world18.value("select count(*) from messages") >= 2)
    assert world18.rows("select topic from messages") == [("public.a",)] * 2


def test_check_says_what_a_pattern_does_not_find(world18: World) -> None:
    world18.execute("create table a (id int primary key)", "create table b (id int primary key)")
    world18.consumer("c", ("public.*", "!public.sene", "public.nothing*", "!other.*"))
    found = problems(world18)
    assert {name: (p["code"], p["severity"]) for name, p in found.items()} == dict.fromkeys(
        ("!public.sene", "public.nothing*", "!other.*"), ("pattern_empty", "warning")
    )
    world18.consumer("c", ("public.a*", "!public.a"))
    assert "besides public.a, which `tables` leaves out" in problems(world18)["public.a*"]["message"]
    world18.consumer("c", ("!public.a",))
    refused = world18.run_program("config", "check")
    assert refused.returncode == 2 and "has nothing to leave out" in refused.stderr


@pytest.mark.parametrize("tables", [("public.*", "!public.bare"), ("public.a*",)])
def test_a_table_that_nobody_takes_needs_an_identity_where_it_is_published(
    world: World, tables: tuple[str, ...]
) -> None:
    """A publication of a schema has each of its tables: PostgreSQL would refuse the application's UPDATE."""
    world.execute("create table a (id int primary key)", "create table bare (v int)")
    world.consumer("c", tables)
    found = problems(world)
    if world.plugin == "wal2json":
        assert found == {}
        return
    assert found["public.bare"]["code"] == "replica_identity"
    assert found["public.bare"]["fix"].startswith('alter table "public"."bare" replica identity full;')
    world.consumer("c", tables, operations=["insert"])
    assert problems(world) == {}
