"""What the engine does when a target refuses, names a time, goes for good, or has a past that does not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdcbridge.sinks.lanes import TICK
from tests.harness.brokers.http import Answer, HttpTarget, Request
from tests.harness.brokers.redis import Redis
from tests.harness.world import World, eventually


@pytest.fixture
def world(world15: World) -> World:
    world15.execute("create table t (id int primary key, n int not null default 0)")
    world15.store_settings["partitions"] = 4
    return world15


@pytest.fixture
def out(world: World) -> Path:
    return world.folder / "out.jsonl"


def to_file(world: World, out: Path, **settings: Any) -> None:
    world.consumer("events", sink={"type": "file", "path": str(out), **settings})


def to_http(world: World, target: HttpTarget, mode: str, on_failure: str, **settings: Any) -> None:
    sink = {"type": "http", "url": f"{target.url}{{topic}}", "on_failure": on_failure}
    retry = {"initial": "100ms", "factor": 2, "max": "1s"}
    world.consumer("events", mode=mode, sink=sink, retry_delay=retry, **settings)


def ids(out: Path) -> list[int]:
    """The rows' ids in the file, in its order."""
    if not out.exists():
        return []
    lines = out.read_bytes().rpartition(b"\n")[0].splitlines()
    return [json.loads(line)["data"]["record"]["id"] for line in lines]


def received(target: HttpTarget) -> list[int]:
    return [int(json.loads(one.body)["key"]) for one in target.requests]


def insert(world: World, *rows: int) -> None:
    for row in rows:
        world.execute(f"insert into t values ({row})")


def state(world: World) -> dict[str, Any]:
    (found,) = world.json("sinks", "list", "--json")
    assert isinstance(found, dict)
    return found


def living(world: World) -> int:
    """The number of sinks' processes that were seen in the last two seconds."""
    found = world.value("select count(*) from sink_members where seen_at > clock_timestamp() - interval '2 s'")
    assert isinstance(found, int)
    return found


def refusing(key: int, answer: Answer) -> Callable[[Request], Answer]:
    return lambda request: answer if json.loads(request.body)["key"] == str(key) else Answer()


@pytest.mark.parametrize("mode", ["stream", "fifo", "queue"])
def test_a_refused_message_becomes_a_dead_letter_with_the_answer(
    world: World, http_target: HttpTarget, mode: str
) -> None:
    http_target.otherwise = refusing(2, Answer(422, b"no such customer"))
    to_http(world, http_target, mode, "dead_letter")
    with world.bridge():
        world.start_sinks()
        insert(world, 1, 2, 3)
        eventually(lambda: {1, 2, 3} <= set(received(http_target)), "all are sent")
        row = eventually(lambda: world.rows("select key, reason from dead_messages"), "the dead letter")[0]
        assert row[0] == "2" and row[1].startswith("sink: ") and "422" in row[1] and "no such customer" in row[1]
        eventually(lambda: state(world)["failed"] == 1 and state(world)["behind"] == 0, "it is counted")
        assert received(http_target).count(2) == 1, "it is not sent again"
        shown = world.run_program("dead", "list", "events", "--json")
        assert shown.returncode == 0 and "no such customer" in shown.stdout, shown
        if mode == "stream":
            refused = world.run_program("dead", "redrive", "events")
            assert refused.returncode == 2 and "write its row" in refused.stderr, refused
            http_target.otherwise = lambda _request: Answer()
            world.execute("update t set id = id where id = 2")
            eventually(lambda: received(http_target).count(2) == 2, "the row that was written again is sent")
        assert world.run_program("dead", "purge", "events", "--yes").returncode == 0
        assert world.value("select count(*) from dead_messages") == 0


def test_a_refused_message_that_blocks_holds_its_key_alone(world: World, http_target: HttpTarget) -> None:
    http_target.otherwise = refusing(2, Answer(422))
    to_http(world, http_target, "fifo", "block", max_deliveries=2)
    with world.bridge():
        world.start_sinks()
        insert(world, 1, 2, 3)
        world.execute("update t set n = 1 where id = 2")
        eventually(lambda: received(http_target).count(2) > 4, "it is tried again, more often than max_deliveries")
        assert {1, 3} <= set(received(http_target)), "the other keys continue"
        assert all(json.loads(one.body)["data"]["op"] == "insert" for one in http_target.requests), "its key waits"
        blocked = eventually(lambda: (found := state(world))["state"] == "blocked" and found, "it is told")
        assert "key 2" in blocked["reason"] and "422" in blocked["reason"]
        assert "(fix: correct the target, or set `on_failure: dead_letter`)" in blocked["reason"]
        alarms = world.json("lag", "--json")["alarms"]
        assert [one["code"] for one in alarms if one["consumer"] == "events"] == ["sink_blocked"]
        http_target.otherwise = Answer()
        eventually(lambda: [json.loads(one.body)["data"]["op"] for one in http_target.requests][-1] == "update")
        eventually(lambda: state(world)["state"] == "delivering", "the end of it is told")
        assert world.value("select count(*) from dead_messages") == 0


def test_a_refused_message_that_blocks_holds_its_partition(world: World, http_target: HttpTarget) -> None:
    world.store_settings["partitions"] = 1
    http_target.otherwise = refusing(2, Answer(400))
    to_http(world, http_target, "stream", "block")
    with world.bridge():
        world.start_sinks()
        insert(world, 1, 2)
        eventually(lambda: received(http_target).count(2) > 2, "it is tried again")
        insert(world, 3)
        assert eventually(lambda: state(world)["state"] == "blocked", "it is told")
        assert 3 not in received(http_target)
        to_http(world, http_target, "stream", "dead_letter")  # the way out that the documentation names
        world.write_config()
        eventually(lambda: 3 in received(http_target), "the partition continues")
        assert world.value("select count(*) from dead_messages") == 1


def test_a_message_that_fails_for_now_is_tried_until_its_deliveries_are_used_up(
    world: World, http_target: HttpTarget
) -> None:
    http_target.otherwise = refusing(2, Answer(500, b"oops"))
    to_http(world, http_target, "queue", "dead_letter", max_deliveries=3)
    with world.bridge():
        world.start_sinks()
        insert(world, 1, 2)
        reason = eventually(lambda: world.rows("select reason, deliver_count from dead_messages"), "it dies")[0]
        assert reason[1] == 3 and "max_deliveries" in reason[0]
        assert received(http_target).count(2) == 3


def test_the_target_names_a_time(world: World, http_target: HttpTarget) -> None:
    http_target.answer(Answer(503, headers={"Retry-After": "2"}))
    to_http(world, http_target, "stream", "block")
    with world.bridge():
        world.start_sinks()
        insert(world, 1)
        first, second = http_target.wait(2)[:2]
        assert second.at - first.at >= 2


@pytest.mark.parametrize("mode", ["stream", "queue"])
def test_a_target_that_wants_no_more_pauses_the_consumer(world: World, http_target: HttpTarget, mode: str) -> None:
    http_target.answer(Answer(410))
    to_http(world, http_target, mode, "block")
    with world.bridge():
        world.start_sinks()
        insert(world, 1)
        http_target.wait(1)
        eventually(lambda: world.value("select paused from consumers"), "it is paused")
        assert state(world)["state"] == "paused"
        world.json("sinks", "resume", "events")
        http_target.wait(2)


def test_a_transform_that_fails_makes_dead_letters_and_the_rest_arrives(world: World, out: Path) -> None:
    to_file(world, out, transform="{'id': record.id, 'inverse': 6 / record.n}")
    with world.bridge():
        world.start_sinks()
        world.execute("insert into t values (1, 3), (2, 0), (3, 2)")
        eventually(lambda: out.exists() and len(out.read_bytes().splitlines()) == 2, "two arrive")
        (reason,) = eventually(lambda: world.rows("select reason from dead_messages"), "one does not")[0]
        assert reason.startswith("sink: the transform failed")


def test_filter_columns_and_key_work_in_a_stream(world: World, out: Path) -> None:
    world.execute("create table p (id int primary key, kind text, secret text)")
    world.consumer(
        "events", tables=("public.p",), filter="record.kind == 'a'", columns={"exclude": ["secret"]}, key=["id"],
        sink={"type": "file", "path": str(out)},
    )  # fmt: skip
    with world.bridge():
        world.start_sinks()
        world.execute(
            "insert into p select n, case when n % 2 = 0 then 'a' else 'b' end, 'x' from generate_series(1, 20) n"
        )
        eventually(lambda: len(ids(out)) == 10, "half of them")
        assert b"secret" not in out.read_bytes()
        behind = "select pending from consumer_lag()"
        eventually(lambda: world.value(behind) == 0, "the offset passes the others")


def test_the_rows_that_were_there_arrive_before_their_changes(world: World, out: Path) -> None:
    world.execute("insert into t select n from generate_series(1, 50) n")
    world.consumer("events", start="snapshot", filter="op != 'truncate'", sink={"type": "file", "path": str(out)})
    with world.bridge():
        world.start_sinks()
        eventually(lambda: len(ids(out)) == 50, "the rows")
        world.execute("update t set n = 1 where id = 7", "truncate t", "insert into t values (51)")
        eventually(lambda: len(ids(out)) == 52, "the changes that the filter takes")
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert [one["data"]["op"] for one in lines] == ["read"] * 50 + ["update", "insert"]
        assert all("/seq/" in one["id"] for one in lines[:50]) and "/seq/" not in lines[-1]["id"]
        assert len({one["id"] for one in lines}) == 52


def test_a_mistake_in_an_adapter_ends_no_other_sink(world: World, out: Path) -> None:
    to_file(world, out)
    world.consumer("broken", sink={"type": "custom", "adapter": "tests.sinks.broken:Broken", "destination": "x"})
    with world.bridge():
        process = world.start_sinks()
        insert(world, 1)
        eventually(lambda: ids(out) == [1], "the other one delivers")
        eventually(lambda: "sink.crashed" in world.log("sinks.log"), "the mistake is told")
        insert(world, 2)
        eventually(lambda: ids(out) == [1, 2], "and goes on")

        def states() -> dict[str, tuple[str, str | None]]:
            return {one["name"]: (one["state"], one["reason"]) for one in world.json("sinks", "list", "--json")}

        eventually(lambda: states()["broken"][0] == "failing", "the state follows")
        assert "ZeroDivisionError" in str(states()["broken"][1]) and states()["events"][0] == "delivering"
        assert process.poll() is None


def test_a_sink_that_was_added_to_the_file_names_the_command_that_adds_it(world: World, out: Path) -> None:
    to_file(world, out)
    with world.bridge():
        world.messages(0)
        world.consumer("later", sink={"type": "file", "path": str(out.with_name("later.jsonl"))})
        added = world.json("sinks", "list", "--json")[1]
        assert added["state"] == "new" and "`cdcbridge consumers apply` adds it" in added["reason"]
        assert world.run_program("consumers", "apply").returncode == 0
        assert world.json("sinks", "list", "--json")[1]["state"] != "new"


def test_messages_that_retention_dropped_are_told(world: World, out: Path) -> None:
    to_file(world, out)
    with world.bridge():
        insert(world, 1)
        world.messages(1)
        world.execute("update cdcbridge_internal.offsets set lost = 5 where partition = 0")
        world.start_sinks()
        found = eventually(lambda: (one := state(world))["state"] == "failing" and one, "it is told")
        assert "5 unread messages of partition 0" in found["reason"]
        world.execute("select cdcbridge.seek('events', 'earliest')")
        eventually(lambda: ids(out) == [1], "it continues after a seek")


def test_a_target_that_lost_its_tail_gets_it_again(world: World, out: Path) -> None:
    to_file(world, out)
    with world.bridge():
        process = world.start_sinks()
        insert(world, *range(1, 31))
        eventually(lambda: len(ids(out)) == 30, "all arrive")
        process.terminate()
        assert process.wait(30) == 0
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:12]) + lines[12][:20])  # restored from a backup, torn in a line
        insert(world, 31)
        world.start_sinks()
        eventually(lambda: ids(out) == list(range(1, 32)), "the file is whole again")


def test_a_target_that_cannot_say_what_it_had_gets_the_rest(world: World, out: Path) -> None:
    to_file(world, out)
    with world.bridge():
        process = world.start_sinks()
        insert(world, 1, 2, 3)
        eventually(lambda: len(ids(out)) == 3, "all arrive")
        process.terminate()
        assert process.wait(30) == 0
        out.rename(f"{out}.kept")  # as a program that rotates logs does
        insert(world, 4)
        world.start_sinks()
        eventually(lambda: ids(out) == [4], "it continues from the offset")


def test_a_target_that_lost_everything_gets_it_again_since_the_consumer_began(world: World) -> None:
    insert(world, 100)
    with Redis() as server:
        world.consumer("events", sink={"type": "redis", "url": server.url, "stream": "shop"})
        with world.bridge(), server.client() as client:
            process = world.start_sinks()
            insert(world, 1, 2, 3)
            eventually(lambda: client.xlen("shop") == 3, "all arrive")
            process.terminate()
            assert process.wait(30) == 0
            client.flushall()
            world.start_sinks()
            eventually(lambda: client.xlen("shop") == 3, "all arrive again")
            assert "sink.empty" in world.log("sinks.log")


def test_a_target_of_another_store_is_refused(world: World, out: Path) -> None:
    out.write_text('{"id":"1/1/0/1/0","seq":900000,"topic":"public.t","key":null,"data":{"record":{"id":0}}}\n')
    to_file(world, out)
    with world.bridge():
        world.start_sinks()
        insert(world, 1)
        found = eventually(lambda: (one := state(world))["state"] == "failing" and one, "it is told")
        assert "900000" in found["reason"] and "another store" in found["reason"]
        assert "(fix: Deliver to another destination" in found["reason"], "the next step is told"
        assert ids(out) == [0]


def test_a_process_that_was_stopped_does_not_deliver_after_its_lease(world: World, http_target: HttpTarget) -> None:
    to_http(world, http_target, "stream", "block")
    with world.bridge():
        first = world.start_sinks()
        insert(world, 1)
        http_target.wait(1)
        eventually(lambda: world.value("select pending from consumer_lag()") == 0, "the offset follows")
        first.send_signal(signal.SIGSTOP)
        world.start_sinks()
        insert(world, *range(2, 12))
        eventually(lambda: set(range(1, 12)) <= set(received(http_target)), "the other one takes over")
        first.send_signal(signal.SIGCONT)
        eventually(lambda: living(world) == 2, "it is there again")
        insert(world, *range(12, 30))
        eventually(lambda: set(range(1, 30)) <= set(received(http_target)), "all arrive")
        assert sorted(received(http_target)) == list(range(1, 30)), "each once"


@pytest.mark.parametrize("mode", ["fifo", "queue"])
def test_a_process_that_was_stopped_delivers_no_claim_of_another(
    world: World, http_target: HttpTarget, mode: str
) -> None:
    to_http(world, http_target, mode, "block", visibility_timeout="2s")
    with world.bridge():
        first = world.start_sinks(crash=("claimed", 1), environment={"CRASH_SIGNAL": "SIGSTOP"})
        world.execute("insert into t select generate_series(1, 10)")
        world.messages(10)
        eventually(lambda: world.value("select sum(deliver_count) from consumer_messages") > 0, "it claims")
        eventually(lambda: world.value("select count(*) from peek('events', 100)") == 10, "its claims come back")
        world.start_sinks()
        http_target.wait(10)
        first.send_signal(signal.SIGCONT)
        eventually(lambda: living(world) == 2, "it is there again")
        world.execute("insert into t select generate_series(11, 30)")
        http_target.wait(30)
        first.terminate()
        assert first.wait(30) == 0
        eventually(lambda: world.value("select pending from consumer_lag()") == 0, "all are acknowledged")
        assert sorted(received(http_target)) == list(range(1, 31)), "each once"


def test_a_delete_and_its_tombstone_are_one_delivery(world: World) -> None:
    sink = {"type": "kafka", "bootstrap_servers": ["127.0.0.1:1"], "topic": "t", "format": "debezium", "timeout": "1s"}
    world.consumer("events", mode="fifo", sink=sink, visibility_timeout="3s")
    insert(world, 1)
    with world.bridge():
        world.execute("delete from t")
        world.start_sinks()
        (taken,) = eventually(
            lambda: world.rows("select last_delivered_at from consumer_messages where deliver_count = 1"), "it claims"
        )
        extended = "select last_delivered_at from consumer_messages where not_visible_until > %s::timestamptz + interval '4.5 s'"
        (now,) = eventually(lambda: world.rows(extended, taken), "the claim is extended twice while Kafka is away")
        assert now == taken, "it is still the same claim"


def test_the_process_ends_although_a_thread_of_an_adapter_does_not(world: World) -> None:
    sink = {"type": "custom", "adapter": "tests.sinks.broken:Hanging", "destination": "x", "timeout": "1s"}
    world.consumer("events", sink=sink)
    with world.bridge():
        command = [sys.executable, "-m", "cdcbridge", "-c", str(world.write_config()), "sinks", "run"]
        log = world.folder / "sinks.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen([*command, "--until-stdin-ends"], stdin=subprocess.PIPE, stderr=stderr)
        eventually(lambda: state(world)["state"] == "failing", "it hangs")
        assert process.stdin is not None
        process.stdin.close()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 1 and "sinks.forced" in log.read_text()
    assert used.ru_utime + used.ru_stime < 5, "it waits, and does not look all the time"


def test_a_rate_is_kept(world: World, out: Path) -> None:
    to_file(world, out, rate=20)
    with world.bridge():
        world.start_sinks()
        world.execute("insert into t select generate_series(1, 60)")
        eventually(lambda: len(ids(out)) >= 20, "the first batch")
        began = time.monotonic()
        eventually(lambda: len(ids(out)) == 60, "all")
        assert time.monotonic() - began > 1.5


@pytest.mark.parametrize("mode", ["stream", "queue"])
def test_two_processes_share_a_rate(world: World, http_target: HttpTarget, mode: str) -> None:
    world.consumer("events", mode=mode, sink={"type": "http", "url": http_target.url + mode, "rate": 40})
    with world.bridge():
        world.start_sinks()
        world.start_sinks()
        eventually(lambda: living(world) == 2, "both are there")
        eventually(lambda: shares(world, mode), "both have a share")
        world.execute("insert into t select generate_series(1, 200)")

        def arrived() -> list[float]:
            return [one.at for one in http_target.requests if one.path == f"/{mode}"]

        eventually(lambda: len(arrived()) == 200, "all arrive")
        assert max(arrived()) - min(arrived()) > 3  # at twice the rate it would take 1.5 s


def shares(world: World, mode: str) -> bool:
    """Whether two processes have their share of a sink: two lanes each, or two looks at the other one."""
    if mode == "queue":
        time.sleep(2 * TICK)
        return True
    held = world.rows("select count(*) from sink_lanes where member is not null group by member")
    return sorted(held) == [(2,), (2,)]


def test_run_starts_the_sinks_and_starts_them_again(world: World, out: Path) -> None:
    to_file(world, out)
    process = world.start_process()
    eventually(world.active, "it streams")
    insert(world, 1)
    eventually(lambda: ids(out) == [1], "it delivers")
    member = world.value("select member from sink_members")
    os.kill(int(member.split(":")[1]), signal.SIGKILL)
    insert(world, 2)
    eventually(lambda: ids(out) == [1, 2], "another process delivers")
    child = int(
        eventually(lambda: world.value("select max(member) from sink_members where member <> %s", member)).split(":")[1]
    )
    process.kill()  # the bridge dies without a word
    process.wait()
    eventually(lambda: not Path(f"/proc/{child}").exists(), "its sinks end, too")


def test_run_leaves_the_sinks_to_others_if_told_so(world: World, out: Path) -> None:
    to_file(world, out)
    process = world.start_process("--no-sinks")
    eventually(world.active, "it streams")
    insert(world, 1)
    world.messages(1)
    found = state(world)
    assert found["state"] == "not running" and found["behind"] == 1 and not out.exists()
    process.terminate()
    assert process.wait(30) == 0


def test_sinks_test_shows_what_would_be_sent(world: World, out: Path) -> None:
    to_file(world, out, mask={"n": "hash"})
    with world.bridge():
        insert(world, 1, 2)
        world.messages(2)
        done = world.run_program("sinks", "test", "events")
        shown = [json.loads(line) for line in done.stdout.splitlines()]
        assert [one["body"]["key"] for one in shown] == ["1", "2"] and shown[0]["destination"] == str(out)
        assert len(shown[0]["body"]["data"]["record"]["n"]) == 32
        assert world.run_program("sinks", "test", "events", "77").stderr.startswith("error: the log has no message 77")
    assert not out.exists()


def test_a_wrong_name_is_an_error_with_the_right_ones(world: World, out: Path) -> None:
    to_file(world, out)
    for command in (("check", "evnets"), ("run", "evnets"), ("pause", "evnets"), ("test", "evnets")):
        done = world.run_program("sinks", *command)
        assert done.returncode == 2 and "events" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_library_names_the_command(world: World, out: Path) -> None:
    world.consumer("events", sink={"type": "custom", "adapter": "no_such_module:Sink", "destination": "x"})
    done = world.run_program("sinks", "check")
    assert done.returncode == 2 and "no_such_module" in done.stdout and "PYTHONPATH" in done.stdout


def test_check_names_a_fix_for_a_destination_that_is_away(world: World) -> None:
    world.consumer("events", sink={"type": "http", "url": "http://127.0.0.1:1/"})
    done = world.run_program("sinks", "check")
    assert done.returncode == 2 and "events: http://127.0.0.1:1" in done.stdout
    assert "fix: Start the destination, or correct its address" in done.stdout
