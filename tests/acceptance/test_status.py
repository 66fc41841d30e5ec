"""`cdcbridge status`, `dead list` over all consumers, `lag --watch` and `--pretty`: what the engineer on call reads."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import psycopg

from tests.harness.forked import program
from tests.harness.world import PATIENCE, Running, World, clean_environment, eventually


def run(world: World, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    world.write_config()
    return program(world.folder, *arguments, stdin=stdin)


def listed(world: World, *arguments: str) -> Any:
    result = run(world, *arguments)
    assert result.returncode == 0, result
    return json.loads(result.stdout)


def shop(world: World) -> Running:
    world.execute("create table t (id int primary key, amount numeric, v text)")
    world.consumer("billing", visibility_timeout="60s", max_deliveries=1)
    world.consumer("audit")
    process = world.start_process()
    eventually(world.active, "the bridge streams")
    return process


def status(world: World) -> tuple[int, dict[str, Any]]:
    result = run(world, "status", "--json")
    assert "Traceback" not in result.stderr, result
    return result.returncode, json.loads(result.stdout)


def test_healthy_and_not_and_why(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer("billing")
    code, found = status(world)
    assert code == 1 and not found["healthy"], found
    assert "the store does not exist yet: `cdcbridge run` creates it" in found["reasons"]
    process = world.start_process()
    eventually(lambda: status(world)[0] == 0, "healthy")
    text = run(world, "status")
    assert text.returncode == 0 and text.stdout.splitlines()[0] == "healthy", text
    assert f"pid {process.pid} leads since " in text.stdout
    assert f"{world.slot} ({world.plugin}), active, wal_status reserved" in text.stdout
    standby = world.start_process()
    eventually(lambda: len(status(world)[1]["bridges"]) == 2, "the stand-by is there")
    code, found = status(world)
    assert (code, [bridge["leads"] for bridge in found["bridges"]]) == (0, [True, False])
    for one in (standby, process):
        one.send_signal(signal.SIGTERM)
        assert one.wait(PATIENCE) == 0
    stopped = run(world, "status")
    assert stopped.returncode == 1, stopped
    assert stopped.stdout.startswith("NOT healthy\n  - no bridge is running: `cdcbridge run` starts one\n")
    world.sql.execute("select pg_drop_replication_slot(%s)", (world.slot,))
    gone = run(world, "status")
    assert gone.returncode == 3 and "`cdcbridge slot recreate` continues after a gap message" in gone.stdout, gone


def test_servers_out_of_reach_are_reasons(world18: World) -> None:
    world18.consumer()
    path = world18.write_config()
    path.write_text(re.sub(r"port=\d+", "port=1", path.read_text()))
    result = program(world18.folder, "status")
    assert result.returncode == 1 and result.stderr == "", result
    assert "  - source: no connection to " in result.stdout and "  - store: no connection to " in result.stdout
    assert "Is the server running" not in result.stdout


def test_a_role_without_rights_reads_the_reason(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    with world18.bridge():
        pass
    role = f"plain_{world18.database}"
    world18.execute(f"create role {role} login")
    world18.user = role
    try:
        result = run(world18, "status")
    finally:
        world18.execute(f"drop owned by {role}", f"drop role {role}")
    assert result.returncode == 1 and "may not use the store's schema" in result.stdout, result
    world18.user = "postgres"
    world18.store_dsn = "nonsense"
    assert run(world18, "status").returncode == 2


def test_the_last_error_of_a_bridge_stays(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    with world18.bridge():
        pass
    world18.sql.execute("select pg_drop_replication_slot(%s)", (world18.slot,))
    process = world18.start_process()
    assert process.wait(PATIENCE) == 3
    code, found = status(world18)
    assert code == 3 and f"pid {process.pid}" in found["last_error"]["holder"], found
    assert "slot" in found["last_error"]["message"] and "slot recreate" in found["last_error"]["hint"]
    text = run(world18, "status").stdout
    assert re.search(r"last error  +[\d.]+ (ms|s) ago, .* pid \d+: ", text), text
    assert found["last_error"]["mended"] is None
    assert run(world18, "slot", "recreate", "--yes").returncode == 0
    with world18.bridge():
        eventually(lambda: status(world18)[0] == 0, "healthy")
        (leader,) = status(world18)[1]["bridges"]
        assert status(world18)[1]["last_error"]["mended"] == leader["since"]
        text = run(world18, "status").stdout
        assert f" ago, fixed since {leader['since']}, " in text and "hint" not in text, text
    assert status(world18)[1]["last_error"]["mended"] is None, "no bridge runs"


def test_consumers_with_trouble_are_notes(world18: World) -> None:
    shop(world18)
    world18.execute("insert into t values (1, 1, 'a')")
    world18.messages(1)
    world18.rows("select nack('billing', array_agg(receipt), dead => true, reason => 'poison') from receive('billing')")
    run(world18, "consumers", "pause", "audit")
    code, found = status(world18)
    assert code == 0, found
    assert found["notes"] == [
        "consumer audit: paused: `cdcbridge consumers resume audit`",
        "consumer billing: 1 dead: `cdcbridge dead list billing`",
    ]
    assert {c["name"]: (c["dead"], c["paused"]) for c in found["consumers"]} == {
        "audit": (0, True),
        "billing": (1, False),
    }


def test_a_consumer_that_gets_nothing_is_no_health(world: World) -> None:
    process = shop(world)
    eventually(lambda: status(world)[0] == 0, "healthy")
    assert {c["name"]: (c["fed"], c["problem"]) for c in status(world)[1]["consumers"]} == {
        "audit": (True, None),
        "billing": (True, None),
    }
    entry = world.consumers.pop()  # audit
    assert run(world, "consumers", "apply").returncode == 0
    code, found = status(world)
    (said,) = [row for row in listed(world, "lag", "--json")["consumer_feeds"] if not row["fed"]]
    assert (code, found["healthy"], found["reasons"]) == (1, False, [said["problem"]]), found
    assert [c["name"] for c in found["consumers"] if not c["fed"]] == ["audit"]
    text = " ".join(run(world, "status").stdout.split())
    assert text.startswith("NOT healthy - audit gets nothing: the bridge (") and "consumers remove audit" in text, text
    world.consumers.append(entry)
    assert run(world, "consumers", "apply").returncode == 0
    code, found = status(world)
    assert (code, found["reasons"]) == (0, []), found
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert status(world)[1]["reasons"] == ["no bridge is running: `cdcbridge run` starts one"]


def test_a_consumer_that_is_being_taken_up_is_a_note(world18: World) -> None:
    shop(world18)
    eventually(lambda: status(world18)[0] == 0, "healthy")
    # As `consumers apply` has it for the moment until the bridge begins anew.
    world18.rows("select add_consumer('late', mode, config) from consumers where name = 'audit'")
    age = "update leaders set started_at = clock_timestamp() - %s::interval returning 1"
    for seconds, code in ((0, 0), (60, 1)):
        world18.rows(age, f"{seconds} s")
        found = status(world18)
        (line,) = [line for line in found[1]["notes" if code == 0 else "reasons"] if line.startswith("late")]
        assert found[0] == code and "late gets nothing yet" in line, found
        assert {c["name"]: c["fed"] for c in found[1]["consumers"]}["late"] is False


def test_a_gap_is_named_until_a_day_has_passed(world: World) -> None:
    process = shop(world)
    world.execute("insert into t values (1, 1, 'a')")
    world.messages(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert run(world, "slot", "recreate", "--yes").returncode == 0
    world.start_process()
    eventually(lambda: status(world)[0] == 0, "healthy")
    (note,) = status(world)[1]["notes"]
    ((first, last),) = world.rows(
        "select data -> 'record' ->> 'from', data -> 'record' ->> 'to' from messages where topic = 'cdcbridge.gap'"
    )
    assert f"changes from {first} to {last} are missing for audit, billing." in note, note
    assert "`cdcbridge verify TABLE`" in note and "`cdcbridge backfill start CONSUMER TABLE`" in note
    shown = run(world, "status")
    assert shown.stdout.startswith("healthy\nNotes:\n  - a gap ") and shown.returncode == 0
    assert run(world, "consumers", "pause", "audit").returncode == 0
    assert len(status(world)[1]["notes"]) == 2, "it stays beside other notes"
    world.rows("update gaps set at = at - interval '1 day' returning 1")
    assert status(world)[1]["notes"] == ["consumer audit: paused: `cdcbridge consumers resume audit`"]


def test_gaps_of_some_consumers_and_of_removed_ones(world18: World) -> None:
    shop(world18)
    eventually(lambda: status(world18)[0] == 0, "healthy")
    insert = "insert into gaps (record, consumers) values (%s::jsonb, %s::text[]) returning 1"
    world18.rows(insert, '{"from": "0/1", "to": "0/2"}', ["removed"])
    world18.rows(insert, '{"from": "0/1", "to": null, "table": "public.t", "reason": "no identity"}', ["audit"])
    (note,) = status(world18)[1]["notes"]
    assert "changes from 0/1 on may be missing for audit (no identity). Compare: `cdcbridge verify public.t`" in note
    assert "`cdcbridge backfill start audit public.t`" in note
    world18.rows(insert, '{"from": "0/1", "to": "0/3", "table": "public.t", "reason": "it had none"}', ["audit"])
    (note,) = status(world18)[1]["notes"]
    assert "changes from 0/1 to 0/3 may be missing for audit" in note, "its end is told in its place"
    for number in range(4):
        world18.rows(insert, f'{{"from": "1/{number}", "to": "2/0"}}', ["audit"])
    notes = status(world18)[1]["notes"]
    assert [note.split(" to ")[0].split("from ")[-1] for note in notes[:3]] == ["1/3", "1/2", "1/1"]
    assert notes[3:] == ["2 earlier gaps within 24 h: the store's table `gaps` lists them"]


def test_dead_letters_of_all_consumers(world18: World) -> None:
    shop(world18)
    assert listed(world18, "dead", "list", "--json") == []
    world18.execute("insert into t values (1, 1, 'a'), (2, 2, 'b')")
    world18.messages(2)
    for name in ("billing", "audit"):
        reason = f"oh :smile: [red]{name}[/red]"
        query = "select nack(%s, array_agg(receipt), dead => true, reason => %s) from receive(%s, 1)"
        world18.rows(query, name, reason, name)
    both = listed(world18, "dead", "list", "--json")
    assert [row["consumer"] for row in both] == ["audit", "billing"], "the newest first"
    assert list(both[0]) == ["consumer", "id", "seq", "topic", "key", "deliver_count", "reason", "died_at"]
    (one,) = listed(world18, "dead", "list", "billing", "--json")
    assert {"consumer": "billing", **one} == both[1]
    table = run(world18, "dead", "list").stdout.splitlines()
    assert table[0].split() == ["CONSUMER", "ID", "SEQ", "TOPIC", "KEY", "DELIVER", "COUNT", "REASON", "DIED", "AT"]
    assert "nacked: oh :smile: [red]audit[/red]" in table[1], "data is no markup"
    assert len(table) == 3 and not any(line.endswith(" ") for line in table)
    assert [row["consumer"] for row in listed(world18, "dead", "list", "--json", "--reason", "nacked:", "-n", "1")] == [
        "audit"
    ]
    assert run(world18, "dead", "list", "--topic", "nowhere").stderr == "no dead letters\n"


def test_messages_as_blocks(world18: World) -> None:
    shop(world18)
    world18.execute(
        "insert into t values (1, 9007199254740993.10, E'a\\x1b[31mb'), (2, null, 'x')",
        "update t set id = 3 where id = 2",
    )
    world18.messages(3)
    seen = run(world18, "peek", "billing", "--pretty")
    assert seen.returncode == 0, seen
    first, second, third = seen.stdout.rstrip("\n").split("\n\n")
    assert first.splitlines()[0] == "#1 public.t insert key 1"
    assert re.search(r"^    amount  9007199254740993\.10$", first, re.MULTILINE), first
    assert "    v       a\\u001b[31mb" in first.splitlines(), "no text steers the terminal"
    assert re.search(r"^    amount  null$", second, re.MULTILINE)
    assert "  old\n    id  2" in third
    taken = run(world18, "receive", "billing", "--pretty", "-n", "1")
    assert "  receipt" in taken.stdout and "  deliver_count" in taken.stdout
    receipt = re.search(r"receipt +(\S+)", taken.stdout)
    assert receipt is not None
    run(world18, "nack", "billing", receipt[1], "--dead", "--reason", "poison")
    (dead,) = listed(world18, "dead", "list", "--json")
    shown = run(world18, "dead", "show", "billing", str(dead["id"]), "--pretty").stdout
    assert "  reason" in shown and "nacked: poison" in shown and "  history 1" in shown and "    amount" in shown
    assert json.loads(run(world18, "peek", "billing", "-n", "1").stdout)["seq"] == 2, "JSON lines without it"


class Terminal:
    """The program on a terminal of a given width."""

    def __init__(self, world: World, *arguments: str, columns: int = 80) -> None:
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {k: v for k, v in clean_environment().items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.main = main
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cdcbridge", "-c", str(world.write_config()), *arguments],
            stdin=side, stdout=side, stderr=side, env={**environment, "TERM": "xterm"}, start_new_session=True,
        )  # fmt: skip
        os.close(side)

    def read(self, until: str = "", count: int = 1) -> str:
        """What is on the terminal, once it has `until` so often; without it, once the program has ended."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not (until and self.text.count(until) >= count):
            if select.select([self.main], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.main, 65536).decode().replace("\r\n", "\n")
                except OSError:
                    break
        return self.text

    def close(self) -> int:
        os.close(self.main)
        return self.process.wait(PATIENCE)


def test_lag_in_place_with_a_clock_until_ctrl_c(world18: World) -> None:
    shop(world18)
    terminal = Terminal(world18, "lag", "--watch", "0.2", columns=140)
    text = terminal.read(until="until Ctrl-C", count=3)
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, every 200ms, until Ctrl-C", text), text
    assert text.count("\x1b[2J") + text.count("\x1b[H") >= 3, "each look takes the place of the last"
    terminal.process.send_signal(signal.SIGINT)
    rest = terminal.read()
    assert terminal.close() == 130 and "aborted" not in rest and "Traceback" not in rest


def test_lag_in_a_pipe_is_plain(world18: World) -> None:
    shop(world18)
    path = str(world18.write_config())
    with subprocess.Popen(
        [sys.executable, "-m", "cdcbridge", "-c", path, "lag", "--watch", "0.2"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, env=clean_environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        seen = ""
        while seen.count("until Ctrl-C") < 2:
            seen += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(PATIENCE) == 130
    assert "\x1b" not in seen + rest and "Traceback" not in errors and "aborted" not in errors


def test_nothing_is_broken_inside_a_word(world18: World) -> None:
    name = "an-uncommonly-long-name-of-a-consumer"
    shop(world18)
    world18.consumer(name)
    run(world18, "consumers", "apply")
    with psycopg.connect(world18.dsn, autocommit=True) as store:
        store.execute("set search_path = cdcbridge, cdcbridge_internal")
        store.execute("update consumers set paused = true")
    terminal = Terminal(world18, "status", columns=50)
    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal.read()).splitlines()
    assert terminal.close() == 0, lines
    assert any(line.startswith("  - consumer") for line in lines) and any(name in line for line in lines)
    words = {word for line in lines for word in line.split()}
    # Numbers and their units differ from one look to the next, and so does what is said of WAL that still comes.
    same = [line for line in run(world18, "status").stdout.splitlines() if not line.startswith("WAL ")]
    piped = {word for line in same for word in line.split()}
    assert {word for word in piped if len(word) > 3 and not re.search(r"\d", word)} <= words, "each word is whole"
    assert all(len(line) <= 50 or " " not in line.strip() for line in lines)
    narrow = Terminal(world18, "consumers", "list", columns=40)
    block = narrow.read().splitlines()
    assert narrow.close() == 0
    assert f"CONSUMER   {name} (paused)" in block or any(name in line for line in block), block


def test_no_python_in_listings(world18: World) -> None:
    shop(world18)
    world18.consumer("narrow", ("public.t",), operations=["insert", "delete"], columns={"exclude": ["v"]}, key=["id"])
    run(world18, "consumers", "apply")
    shown = run(world18, "consumers", "show", "narrow").stdout
    rows = dict(line.split(None, 1) for line in shown.splitlines() if len(line.split(None, 1)) == 2)
    assert rows["paused"] == "no" and rows["operations"] == "insert, delete" and rows["tables"] == "public.t"
    assert rows["columns"].startswith("exclude: [v]") or "exclude: [v]" in rows["columns"], rows
    for command in (
        ("consumers", "list"),
        ("lag",),
        ("slot", "list"),
        ("config", "show"),
        ("consumers", "show", "narrow"),
    ):
        text = run(world18, *command).stdout
        assert not re.search(r"\b(True|False|None)\b|\('|\['|\{'|',\)", text), (command, text)
