"""Places and times on the command line, looks at a stream, and what publish, seek and replay answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner

from cdcbridge.cli import main
from tests.acceptance.test_cli import lines
from tests.harness.world import PATIENCE, World, clean_environment, eventually


@pytest.fixture(params=["world18", "world15"])
def store(request: pytest.FixtureRequest) -> World:
    """A store without a bridge: a queue `billing` and a stream `audit`, both of the topic news."""
    world: World = request.getfixturevalue(request.param)
    world.consumer("billing", (), topics=["news"])
    world.consumer("audit", (), topics=["news"], mode="stream", start="earliest")
    for arguments in (("migrate",), ("consumers", "apply")):
        done = called(world, *arguments)
        assert done.returncode == 0, done.stderr
    return world


def called(world: World, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """What World.run_program() does, in this process: a test with many calls would start Python for each."""
    world.write_config()
    words = ["cdcbridge", "-c", str(world.folder / "cdcbridge.yaml"), *arguments]
    code: Any = 0
    with CliRunner().isolation(input=stdin) as (output, errors, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
        sys.stderr.flush()
        return subprocess.CompletedProcess(words, code, output.getvalue().decode(), errors.getvalue().decode())


def one(world: World, *arguments: str) -> dict[str, Any]:
    (line,) = lines(called(world, *arguments))
    return line


def test_publish_tells_delays_duplicates_and_topics_without_a_consumer(store: World) -> None:
    first = one(store, "publish", "news", "1", "--dedup-id", "x")
    assert first == {"seq": 1, "duplicate": False}
    again = called(store, "publish", "news", "1", "--dedup-id", "x")
    assert lines(again) == [{"seq": 1, "duplicate": True}]
    assert "notice: dedup_id 'x' of topic 'news' was published before as seq 1" in again.stderr
    wrong = called(store, "publish", "newz", stdin="1\n2\n3\n")
    assert len(lines(wrong)) == 3
    assert wrong.stderr == (
        "warning: no consumer lists the topic 'newz', so no consumer receives the message\n"
        "hint: Add the topic to a consumer. With start: earliest, a new consumer receives this message, too.\n"
    )
    for option in (("--delay", "5m"), ("--delay", "300"), ("--deliver-at", "+5m")):
        one(store, "publish", "news", "2", *option)
    one(store, "publish", "news", "2", "--deliver-at", "-5m")
    waits = "select round(extract(epoch from visible_at - now())) from delayed order by seq"
    assert [290 < wait <= 300 for (wait,) in store.rows(waits)] == [True] * 3
    refusals: tuple[tuple[tuple[str, ...], str], ...] = (
        (("--delay", "5m", "--deliver-at", "+5m"), "only one of them may be given"),
        (("--deliver-at", "5m"), "'5m' is a duration, not a time"),
        (("--deliver-at", "soon"), "'soon' is not a time"),
        (("--delay", "-5m"), "is not a duration"),
        (("--delay", "yesterday"), "is not a duration"),
    )
    for options, message in refusals:
        refused = called(store, "publish", "news", "1", *options)
        assert (refused.returncode, refused.stdout, message in refused.stderr) == (2, "", True), refused.stderr


def test_seek_and_replay_say_where_they_went(store: World) -> None:
    for key in "aab":
        one(store, "publish", "news", "1", "--key", key)
    done = called(store, "offsets", "seek", "audit", "3")
    (answer,) = lines(done)
    moved: Any = answer["moved"]
    assert answer["partitions"] == len(moved) == 16
    assert {(part["old_seq"], part["new_seq"]) for part in moved} == {(0, 2)}
    (time,) = [part["time"] for part in moved if part["time"]]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(time)) < timedelta(minutes=5)
    assert "audit: 16 partitions continue after seq 2 (the next message is of 20" in done.stderr
    assert "before: after seq 0" in done.stderr
    for place, seq in (("-1h", 0), ("latest", 3), ("yesterday", 0), ("+1h", 3), ("earliest", 0)):
        moved = one(store, "offsets", "seek", "audit", place, "--partition", "7")["moved"]
        assert [part["new_seq"] for part in moved] == [seq], place
    lines(called(store, "receive", "billing", "--ack"))
    done = called(store, "consumers", "replay", "billing", "--from", "-1h", "--to", "3")
    (answer,) = lines(done)
    assert (answer["replayed"], answer["from_seq"], answer["to_seq"]) == (2, 1, 2)
    assert str(answer["from_time"]) < str(answer["to_time"])
    assert "billing: from seq 1 of 20" in done.stderr
    nothing = called(store, "consumers", "replay", "billing", "--from", "latest")
    assert lines(nothing)[0]["replayed"] == 0
    assert "the log has no message from latest up to latest" in nothing.stderr


def test_read_looks_at_a_stream(store: World) -> None:
    for number in range(3):
        one(store, "publish", "news", str(number), "--key", str(number))
    first = lines(called(store, "read", "audit", "-n", "2"))
    assert list(first[0]) == [
        "receipt", "partition", "seq", "topic", "key", "data", "commit_lsn", "ordinal", "commit_time", "inserted_at",
    ]  # fmt: skip
    for options, seqs in (
        ((), [1, 2, 3]), (("-n", "1"), [1]), (("--from", "2"), [2, 3]), (("--from", "-1h"), [1, 2, 3]),
        (("--from", "latest"), []),
    ):  # fmt: skip
        assert [row["seq"] for row in lines(called(store, "read", "audit", *options))] == seqs, options
    assert store.value("select max(seq) from consumer_group_offsets") == 0, "nothing was moved"


@pytest.fixture
def tail(store: World) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`tail` of the stream after two messages, and the seqs that it has printed so far."""
    for number in range(2):
        one(store, "publish", "news", str(number))
    process = subprocess.Popen(
        [sys.executable, "-m", "cdcbridge", "-c", str(store.folder / "cdcbridge.yaml"), "tail", "audit", "-n", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip
    seen: list[int] = []

    def collect() -> None:
        for line in process.stdout or ():
            seen.append(json.loads(line)["seq"])  # noqa: PERF401 - each as it comes

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    eventually(lambda: seen, "the last message")
    yield process, seen
    process.kill()
    process.wait()
    thread.join(PATIENCE)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def test_tail_follows_and_ends_on_ctrl_c(store: World, tail: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, seen = tail
    assert seen == [2]
    store.rows("select publish('news', 'k', '1')")
    eventually(lambda: seen == [2, 3], "it comes by itself")
    store.sql.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'cdcbridge cli'")
    store.rows("select publish('news', 'k', '1')")
    eventually(lambda: seen == [2, 3, 4], "it survives its session")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert process.stderr and "Traceback" not in process.stderr.read()


def test_tail_takes_a_count_or_a_place(store: World) -> None:
    refused = called(store, "tail", "audit", "--from", "1", "-n", "1")
    assert refused.returncode == 2
    assert "cdcbridge read audit --from 1 -n 1" in refused.stderr


@pytest.mark.parametrize(
    ("command", "right"),
    [
        (("receive", "audit"), "cdcbridge read audit"),
        (("peek", "audit"), "cdcbridge read audit"),
        (("ack", "audit", "1-1"), "cdcbridge offsets show audit"),
        (("nack", "audit", "1-1"), "cdcbridge offsets seek audit"),
        (("dead", "list", "audit"), "cdcbridge read audit"),
        (("consumers", "replay", "audit", "--from", "1"), "cdcbridge offsets seek audit"),
        (("read", "billing"), "cdcbridge peek billing"),
        (("tail", "billing"), "cdcbridge receive billing --wait"),
        (("offsets", "show", "billing"), "cdcbridge peek billing"),
        (("offsets", "seek", "billing", "-1h"), "cdcbridge consumers replay billing --from"),
    ],
)
def test_a_command_for_the_other_mode_names_the_right_one(modes: World, command: tuple[str, ...], right: str) -> None:
    refused = called(modes, *command)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: consumer '") and f"`{right}" in refused.stderr, refused.stderr


@pytest.fixture
def modes(world18: World) -> World:
    world18.consumer("billing", (), topics=["news"])
    world18.consumer("audit", (), topics=["news"], mode="stream")
    assert called(world18, "migrate").returncode == 0
    assert called(world18, "consumers", "apply").returncode == 0
    return world18
