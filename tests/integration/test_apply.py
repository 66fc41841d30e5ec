"""`consumers apply` refuses what cannot work, and a bridge that meets it goes on: one consumer never stops the others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.harness.world import World, eventually


@pytest.fixture
def shop(world: World) -> World:
    """Two tables with a key and one without, and a consumer of the first."""
    world.execute(
        "create table t (id int primary key, v int)",
        "create table u (id int primary key, v int)",
        "create table bare (v int)",
    )
    world.consumer("good")
    return world


BROKEN: dict[str, dict[str, Any]] = {
    "no-such-table": {"tables": ("public.absent",)},
    "no-replica-identity": {"tables": ("public.bare",)},
    "key-not-covered": {"tables": ("public.u",), "key": ["v"]},
    "unknown-column": {"tables": ("public.u",), "columns": {"exclude": ["crad"]}},
    "no-such-role": {"tables": ("public.u",), "role": "nobody_of_that_name"},
    "own-schema": {"tables": ("cdcbridge.*",)},
}
MENDS = {
    "no-such-table": "create table absent (id int primary key)",
    "no-replica-identity": "alter table bare replica identity full",
    "key-not-covered": "alter table u replica identity full",
}


def keys(world: World, name: str) -> list[str]:
    query = (
        "select m.key from consumer_messages w join consumers c on c.id = w.consumer_id join messages m using (seq)"
        " where c.name = %s and m.data ->> 'op' <> 'gap' order by seq"
    )
    return [key for (key,) in world.rows(query, name)]


def reconnect(world: World) -> None:
    world.execute("select pg_terminate_backend(active_pid) from pg_replication_slots where active")


@contextlib.contextmanager
def process(world: World) -> Iterator[Any]:
    """A bridge as a process that must still run at the end."""
    running = world.start_process()
    eventually(lambda: world.active() or running.poll() is not None, "it streams")
    assert running.poll() is None, world.log()
    yield running
    assert running.poll() is None, world.log()
    running.terminate()
    assert running.wait(30) == 0


# apply itself


def test_apply_refuses_what_check_refuses_in_the_same_words(shop: World) -> None:
    with shop.bridge():
        for name, settings in BROKEN.items():
            shop.consumer(name, **settings)
        checked = shop.run_program("check", "--json")
        assert checked.returncode == 2
        messages = [p["message"] for p in json.loads(checked.stdout)["problems"] if p["severity"] == "error"]
        assert len(messages) == len(BROKEN)
        before = shop.rows("select * from consumers")
        for options in ((), ("--dry-run",)):
            refused = shop.run_program("consumers", "apply", *options)
            assert refused.returncode == 2, refused
            assert all(message in refused.stderr for message in messages), refused.stderr
            assert "fix: " in refused.stderr and "Traceback" not in refused.stderr
        assert shop.rows("select * from consumers") == before
        shop.execute("insert into t values (1)")
        eventually(lambda: keys(shop, "good") == ["1"], "the others go on")


def test_a_table_that_the_publication_lacks_and_the_role_may_not_change(world18: World) -> None:
    role = f"r_{world18.database}"
    with psycopg.connect(world18.dsn, autocommit=True) as owner:
        for statement in (
            "drop schema cdcbridge, cdcbridge_internal cascade",  # the role makes its own
            f"create role {role} login replication",
            f"grant create on database {world18.database} to {role}",
            "create table t (id int primary key)",
            "create table u (id int primary key)",
            "create publication cdcbridge for table only t with (publish_via_partition_root = true)",
        ):
            owner.execute(statement.encode())
        try:
            world18.user = role
            world18.consumer("good")
            with process(world18):
                world18.consumer("late", ("public.u",))
                refused = world18.run_program("consumers", "apply")
                assert refused.returncode == 2 and "it lacks public.u" in refused.stderr
                reconnect(world18)  # the bridge reads the file, as it does after a blip
                eventually(lambda: "consumer.refused" in world18.log(), "it says so")
                owner.execute(b"insert into t values (1)")
                eventually(lambda: keys(world18, "good") == ["1"], "the others go on")
                assert world18.rows("select name from consumers") == [("good",)]
                owner.execute(b"alter publication cdcbridge add table only u")
                eventually(lambda: world18.rows("select name from consumers where name = 'late'"), "it is taken up")
                eventually(world18.active)
                owner.execute(b"insert into u values (2)")
                eventually(lambda: keys(world18, "late") == ["2"])

                owner.execute(b"alter publication cdcbridge drop table u")  # of a consumer that worked
                eventually(lambda: "consumer.faulty" in world18.log(), "it says so")
                eventually(world18.active)
                owner.execute(b"insert into u values (3)")
                owner.execute(b"insert into t values (3)")
                eventually(lambda: keys(world18, "good") == ["1", "3"], "the others go on")
                gaps = world18.value("select count(*) from messages where data ->> 'op' = 'gap'")
                owner.execute(b"alter publication cdcbridge add table only u")
                eventually(
                    lambda: world18.value("select count(*) from messages where data ->> 'op' = 'gap'") > gaps,
                    "what was left out is told",
                )
                eventually(world18.active)
                owner.execute(b"insert into u values (4)")
                eventually(lambda: keys(world18, "late") == ["2", "4"])
        finally:
            world18.close()
            world18.user = "postgres"
            owner.execute(b"drop publication if exists cdcbridge")
            owner.execute(b"select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", (role,))
            owner.execute(f"drop owned by {role} cascade".encode())
            owner.execute(f"drop role {role}".encode())


def test_a_change_of_mode_is_refused_by_check_apply_and_run(shop: World) -> None:
    with shop.bridge():
        shop.execute("insert into t values (1)")
        eventually(lambda: keys(shop, "good") == ["1"])
    shop.consumer("good", mode="fifo")
    for arguments in (("check",), ("consumers", "apply"), ("consumers", "apply", "--dry-run"), ("run",)):
        refused = shop.run_program(*arguments)
        assert refused.returncode == 2, (arguments, refused)
        said = refused.stdout + refused.stderr
        assert "consumer 'good' has mode queue, which cannot become fifo" in said
        assert "cdcbridge consumers remove good" in said


def test_a_dry_run_shows_each_setting_and_changes_nothing(shop: World) -> None:
    shop.consumer("same", ("public.u",))
    shop.consumer("old", ("public.u",))
    with shop.bridge():
        pass
    shop.consumers = [c for c in shop.consumers if c["name"] != "old"]
    shop.consumer(
        "good", filter="record.v == 1", visibility_timeout="90s", retry_delay={"max": "1h"}, max_message_bytes="2MB"
    )
    shop.consumer("new", ("public.u",), start="earliest", topics=["news"])
    before = shop.rows("select * from consumers order by id"), shop.rows("select count(*) from leaders")
    text = shop.run_program("consumers", "apply", "--dry-run")
    assert (text.returncode, text.stderr) == (0, "")
    assert text.stdout.splitlines() == [
        "added: new",
        "    mode: queue",
        "    tables: public.u",
        "    topics: news",
        "    start: earliest",
        "changed: good",
        "    filter: none → record.v == 1",
        "    visibility_timeout: 30s → 90s",
        "    retry_delay.max: 10m → 1h",
        "    max_message_bytes: 1MB → 2MB",
        "unchanged: same",
        "not in the file: old",
    ]
    found = shop.json("consumers", "apply", "--dry-run", "--json")
    assert (found["added"], found["changed"], found["unchanged"], found["not_in_file"]) == (
        ["new"],
        ["good"],
        ["same"],
        ["old"],
    )
    assert found["changes"]["good"]["visibility_timeout"] == {"old": 30, "new": 90}
    assert (shop.rows("select * from consumers order by id"), shop.rows("select count(*) from leaders")) == before
    assert "changed: good" in shop.run_program("consumers", "apply").stdout
    again = shop.run_program("consumers", "apply", "--dry-run").stdout
    assert again.splitlines() == ["unchanged: same", "unchanged: good", "unchanged: new", "not in the file: old"]


# a running bridge


def test_a_running_bridge_goes_on_without_consumers_that_cannot_work(shop: World) -> None:
    with process(shop):
        shop.execute("insert into t values (1)")
        eventually(lambda: keys(shop, "good") == ["1"])
        for name, settings in BROKEN.items():
            shop.consumer(name, **settings)
        shop.write_config()
        reconnect(shop)
        eventually(lambda: shop.log().count("consumer.refused") == len(BROKEN), "it says so")
        shop.execute("insert into t values (2)")
        eventually(lambda: keys(shop, "good") == ["1", "2"], "the others go on")
        assert shop.rows("select name from consumers") == [("good",)]
        alarms = [a["message"] for a in shop.json("lag", "--json")["alarms"] if a["code"] == "consumer_refused"]
        assert len(alarms) == len(BROKEN) and all("gets nothing" in alarm and "Fix: " in alarm for alarm in alarms)
        eventually(lambda: shop.log().count("code=consumer_refused") >= len(BROKEN), "the alarms are in the log")
        for name, mend in MENDS.items():
            shop.execute(mend)
            eventually(lambda name=name: shop.rows("select from consumers where name = %s", name), "it is taken up")  # type: ignore[misc]
        shop.consumers = [c for c in shop.consumers if c["name"] in ("good", *MENDS)]
        shop.write_config()
        feeds = "select jsonb_path_query_array(feeds, '$.consumers.*.reason') from source"
        whole = [""] * (1 + len(MENDS))
        eventually(lambda: shop.value(feeds) == whole, "a file that is mended is read by itself, and all are fed")
        eventually(shop.active)
        shop.execute("insert into t values (3)", "insert into u values (4, 4)", "insert into bare values (5)")
        eventually(lambda: keys(shop, "good") == ["1", "2", "3"] and keys(shop, "key-not-covered") == ["4"])


def test_a_changed_consumer_goes_on_as_it_was_until_the_change_can_work(shop: World) -> None:
    shop.consumer("other", ("public.u",), filter="record.v == 1", on_leave="delete")
    for command in (("migrate",), ("consumers", "apply")):
        assert shop.run_program(*command).returncode == 0
    shop.consumer("other", ("public.u",), filter="record.v == 1")  # the store remembers that it once had on_leave
    with process(shop):
        shop.consumer("other", ("public.u", "public.absent"), filter="record.v == 2")
        shop.write_config()
        reconnect(shop)
        eventually(lambda: "consumer.faulty" in shop.log(), "it says so")
        shop.execute("insert into u values (1, 1), (2, 2)", "insert into t values (1)")
        eventually(lambda: (keys(shop, "good"), keys(shop, "other")) == (["1"], ["1"]))
        (row,) = [row for row in shop.json("consumers", "list", "--json") if row["name"] == "other"]
        assert row["fed"] is True and "public.absent" in row["problem"]
        assert "other (as before)" in shop.run_program("lag").stdout
        shop.execute("create table absent (id int primary key, v int)")
        eventually(lambda: shop.value("select config ->> 'filter' from consumers where name = 'other'")[-1] == "2")
        eventually(shop.active)
        shop.execute("insert into u values (3, 1), (4, 2)", "insert into absent values (5, 2)")
        eventually(lambda: keys(shop, "other") == ["1", "4", "5"])


def test_a_changed_mode_in_the_file_of_a_running_bridge(shop: World) -> None:
    with process(shop):
        shop.consumer("good", mode="fifo")
        shop.consumer("late", ("public.u",))
        shop.write_config()
        reconnect(shop)
        eventually(lambda: "which cannot become fifo" in shop.log(), "it says so")
        eventually(lambda: shop.log().count("bridge.streaming") == 2, "it goes on, with the other change")
        shop.execute("insert into t values (1)", "insert into u values (2)")
        eventually(lambda: (keys(shop, "good"), keys(shop, "late")) == (["1"], ["2"]))


def test_a_stand_by_takes_over_with_a_consumer_that_cannot_work(shop: World) -> None:
    leader = shop.start_process()
    eventually(shop.active)
    shop.write_config()
    stand_by = shop.start_process()
    eventually(lambda: "bridge.standby" in shop.log())
    shop.consumer("bad", ("public.absent",))
    shop.write_config()
    leader.kill()
    leader.wait()
    eventually(lambda: "consumer.refused" in shop.log() or stand_by.poll() is not None, "it takes over")
    shop.execute("insert into t values (1)")
    eventually(lambda: keys(shop, "good") == ["1"])
    stand_by.terminate()
    assert stand_by.wait(30) == 0


def test_a_stand_by_says_what_it_would_not_feed_before_it_leads(shop: World, tmp_path_factory: Any) -> None:
    other = other_file(shop, tmp_path_factory.mktemp("other"))
    other.consumers = []
    other.consumer("bad", ("public.absent",))
    with process(shop):
        stand_by = other.start_process()
        eventually(lambda: "standby.other_file" in other.log() and "consumer.refused" in other.log())
        assert "consumer=good" in other.log() and "there is no table public.absent" in other.log()
        stand_by.terminate()
        assert stand_by.wait(30) == 0


def test_a_start_still_refuses(shop: World) -> None:
    shop.consumer("bad", ("public.absent",))
    refused = shop.run_program("run")
    assert refused.returncode == 2 and "there is no table public.absent" in refused.stderr


# another file


def other_file(world: World, folder: Path) -> World:
    """The same source and store, as a second host has them in a file of its own."""
    other = World(world.server, world.database, world.plugin, folder)
    other.consumers = [dict(c) for c in world.consumers]
    return other


def test_a_consumer_of_another_file_is_marked_everywhere(shop: World, tmp_path_factory: Any) -> None:
    other = other_file(shop, tmp_path_factory.mktemp("other"))
    other.consumer("late", ("public.u",))
    with process(shop):
        applied = other.run_program("consumers", "apply")
        assert applied.returncode == 0 and "added: late" in applied.stdout
        assert "late gets nothing" in applied.stderr and str(shop.folder / "cdcbridge.yaml") in applied.stderr
        eventually(lambda: "consumers.not_fed" in shop.log(), "the bridge says so")
        for arguments in (("consumers", "list"), ("lag",)):
            shown = shop.run_program(*arguments)
            assert "late (gets nothing)" in shown.stdout and "late gets nothing" in shown.stderr
            assert "good (" not in shown.stdout
        rows = {row["name"]: row for row in shop.json("lag", "--json")["consumer_feeds"]}
        assert rows["late"]["fed"] is False and "late gets nothing" in rows["late"]["problem"]
        assert (rows["good"]["fed"], rows["good"]["problem"]) == (True, None)


def test_a_consumer_of_another_file_is_fed_as_soon_as_the_bridges_file_has_it(
    shop: World, tmp_path_factory: Any
) -> None:
    other = other_file(shop, tmp_path_factory.mktemp("other"))
    other.consumer("late", ("public.u",))
    with process(shop):
        assert "late gets nothing" in other.run_program("consumers", "apply").stderr
        shop.consumers = other.consumers
        assert shop.run_program("consumers", "apply").stderr == ""
        shop.execute("insert into u values (1)")
        eventually(lambda: keys(shop, "late") == ["1"])
        shop.consumers = [c for c in shop.consumers if c["name"] != "late"]
        assert "not in the file: late" in shop.run_program("consumers", "apply").stdout
        shop.execute("insert into u values (2)", "insert into t values (3)")
        eventually(lambda: keys(shop, "good") == ["3"])
        assert keys(shop, "late") == ["1"]


def test_a_version_of_another_file_is_put_back_and_apply_says_so(shop: World, tmp_path_factory: Any) -> None:
    other = other_file(shop, tmp_path_factory.mktemp("other"))
    other.consumer("good", filter="record.v == 2")
    shop.settings["heartbeat_interval"] = "1h"  # it notices although it has nothing to append
    with process(shop):
        applied = other.run_program("consumers", "apply")
        assert applied.returncode == 0 and "good does not have the settings of this file" in applied.stderr
        assert shop.value("select config ->> 'filter' from consumers") is None
        removed = other.run_program("consumers", "remove", "good", "--yes")
        assert removed.returncode == 0 and "has added it again" in removed.stderr


def test_a_removal_says_first_who_adds_the_consumer_again(shop: World, tmp_path_factory: Any) -> None:
    other = other_file(shop, tmp_path_factory.mktemp("other"))
    shop.consumer("late", ("public.u",))
    other.consumers = []
    again = f"late in its file {shop.folder / 'cdcbridge.yaml'}, and will add it again, empty, within seconds."
    with process(shop):
        for world in (shop, other):  # asked
            asked = world.run_program("consumers", "remove", "late")
            assert asked.returncode != 0 and asked.stderr.index(again) < asked.stderr.index("Remove late?"), asked
            assert "Remove it from that file first." in asked.stderr
        assert "will add" not in other.run_program("consumers", "remove", "good", "--yes").stdout
        kept = shop.value("select id from consumers where name = 'late'")
        said = shop.run_program("consumers", "remove", "late", "--yes").stderr
        assert said.index(again) < said.index("has added it again, empty"), said
        assert shop.value("select id from consumers where name = 'late'") != kept
        shop.consumers = [
            c for c in shop.consumers if c["name"] != "late"
        ]  # not applied: the bridge has yet to read it
        removed = shop.run_program("consumers", "remove", "late", "--yes")
        assert (removed.returncode, removed.stderr) == (0, ""), removed
    said = shop.run_program("consumers", "remove", "good").stderr
    assert said.index("the next `run` adds it again") < said.index("Remove good?"), said


def test_no_bridge_is_no_fault(shop: World) -> None:
    shop.run_program("migrate")
    applied = shop.run_program("consumers", "apply")
    assert applied.returncode == 0 and "no bridge runs on this store now" in applied.stderr
    assert "gets nothing" not in shop.run_program("consumers", "list").stdout
    assert shop.json("consumers", "list", "--json")[0]["fed"] is None
