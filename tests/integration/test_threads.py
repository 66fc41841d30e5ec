"""Threads and database sessions of running bridges, compared with the table in docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import psycopg
import pytest

from cdcbridge.observe.health import Health
from cdcbridge.observe.lag_watcher import Watcher
from cdcbridge.observe.metrics import Metrics
from cdcbridge.observe.monitor import HttpServer
from tests.harness import named
from tests.harness.world import PATIENCE, World, clean_environment, eventually, fresh_database

ROOT: Final = Path(__file__).parents[2]
_SESSION: Final = re.compile(r"`([^`]+)` \((source|store)(, for a moment)?\)(?: × (\d+))?")
ALWAYS, STARTS, LEADS, STREAMS = "always", "while it starts", "while it leads", "while it streams"
CREATES, BACKFILL, HTTP, SYSTEMD = "while it creates a slot", "while a backfill runs", "with `http`", "under systemd"


class Row(NamedTuple):
    threads: list[str]
    lives: str
    sessions: Counter[tuple[str, str]]  # (application_name, side)
    momentary: Counter[tuple[str, str]]


def table() -> list[Row]:
    """The rows of the bridge's threads, then those of the clients'."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    section = text.partition("## Threads and database sessions\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = []
    for line in lines:
        threads, lives, _, sessions, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        steady, momentary = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for name, side, moment, count in _SESSION.findall(sessions):
            (momentary if moment else steady)[name, side] += int(count or 1)
        rows.append(Row(re.findall(r"`([^`]+)`", threads), lives, steady, momentary))
    return rows


class Seen(NamedTuple):
    threads: Counter[str]
    sessions: Counter[tuple[str, str]]


def expected(*bridges: Iterable[str]) -> tuple[Seen, Counter[tuple[str, str]]]:
    """What the table says of bridges in these states, and the sessions that may be there for a moment."""
    threads, sessions, momentary = Counter[str](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    rows = table()
    for states in bridges:
        assert {row.lives for row in rows} >= set(states)
        here = [row for row in rows if row.lives in states]
        threads.update({name for row in here for name in row.threads})
        for row in here:
            sessions += row.sessions
            momentary += row.momentary
    return Seen(threads, sessions), momentary


def seen(world: World, pids: Iterable[int]) -> Seen:
    """What the kernel and the server say; `backfill-7` is `backfill-N`, as in the table."""
    threads = Counter(re.sub(r"^(backfill-)\d+$", r"\1N", name) for pid in pids for name in named.names(pid))
    sides = {world.database: "source", psycopg.conninfo.conninfo_to_dict(world.store_dsn or "")["dbname"]: "store"}
    rows = world.sql.execute(
        "select application_name, datname::text, count(*) from pg_stat_activity"
        " where datname = any (%s) and application_name like 'cdcbridge%%' group by 1, 2",
        (list(sides),),
    ).fetchall()
    return Seen(threads, Counter({(name, sides[database]): count for name, database, count in rows}))


def agree(world: World, *bridges: tuple[int, Iterable[str]]) -> None:
    """Wait until bridges, each a process and its states, have the table's threads and sessions, neither less nor more."""
    (threads, sessions), momentary = expected(*(states for _, states in bridges))
    deadline = time.monotonic() + 2 * PATIENCE
    while True:
        found = seen(world, [pid for pid, _ in bridges])
        surplus = found.sessions - sessions
        if found.threads == threads and not sessions - found.sessions and not surplus - momentary:
            return
        assert time.monotonic() < deadline, "\n".join(
            (
                f"threads without a row: {dict(found.threads - threads)}; missing: {dict(threads - found.threads)}",
                f"sessions without a row: {dict(surplus - momentary)}; missing: {dict(sessions - found.sessions)}",
                world.log(),
            )
        )
        threading.Event().wait(0.05)


@pytest.fixture(params=["world15", "world18"])
def apart(request: pytest.FixtureRequest) -> Iterator[World]:
    """PostgreSQL 15 with wal2json, 18 with pgoutput; the store in a database of its own."""
    world: World = request.getfixturevalue(request.param)
    with fresh_database(world.server) as store:
        world.store_dsn = world.server.dsn(store)
        world.top_settings["http"] = {"listen": "127.0.0.1:0"}
        yield world
        world.close()


@contextlib.contextmanager
def program(world: World, notify: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """`cdcbridge run`, whose threads can be told apart from outside; ended by SIGTERM."""
    environment = clean_environment() | ({"NOTIFY_SOCKET": str(notify)} if notify else {})
    arguments = [sys.executable, "-m", "tests.harness.named", "-c", str(world.write_config()), "run"]
    with (world.folder / "bridge.log").open("a") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, text=True, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()
                process.wait()


@pytest.mark.timeout(300)
def test_a_bridge_has_the_threads_and_sessions_of_the_table(apart: World) -> None:
    world = apart
    world.execute("create table t (id int primary key)", "insert into t select generate_series(1, 50)")
    world.consumer()
    notify = world.folder / "nobody"  # a socket that nobody reads would fill up, and hold the bridge
    with ExitStack() as stack:
        writer = stack.enter_context(psycopg.connect(world.dsn))
        writer.execute("create table elsewhere ()")
        first = stack.enter_context(program(world, notify))
        beside = {ALWAYS, HTTP, SYSTEMD}
        agree(world, (first.pid, beside | {LEADS, CREATES}))
        writer.commit()
        agree(world, (first.pid, beside | {LEADS, STREAMS}))

        writer.execute("insert into t values (100)")
        assert world.run_program("backfill", "start", "c", "public.t").returncode == 0
        works = beside | {LEADS, STREAMS, BACKFILL}
        agree(world, (first.pid, works))

        world.execute(
            "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = '" + world.slot + "'"
        )
        eventually(lambda: world.log().count("bridge.streaming") > 1)
        agree(world, (first.pid, works))  # nothing is left of the session before

        second = stack.enter_context(program(world))
        agree(world, (first.pid, works), (second.pid, {ALWAYS, HTTP}))
        first.terminate()
        assert first.wait(PATIENCE) == 0
        agree(world, (second.pid, {ALWAYS, HTTP, LEADS, STREAMS, BACKFILL}))
        writer.commit()
        agree(world, (second.pid, {ALWAYS, HTTP, LEADS, STREAMS}))
        second.terminate()
        assert second.wait(PATIENCE) == 0
    assert "thread.failed" not in world.log()
    eventually(lambda: not seen(world, ()).sessions, "no session is left")


def test_no_thread_is_left_of_a_bridge_that_stopped(apart: World) -> None:
    """In a process that goes on: this one."""
    world = apart
    world.execute("create table t (id int primary key)", "insert into t select generate_series(1, 50)")
    world.consumer()
    before = set(threading.enumerate())
    health = Health()
    metrics = Metrics(health, "1", "src", world.slot)
    with psycopg.connect(world.dsn) as writer:
        with HttpServer(("127.0.0.1", 0), health, metrics), Watcher(world.config(), metrics), world.bridge():
            writer.execute("insert into t values (100)")
            assert world.run_program("backfill", "start", "c", "public.t").returncode == 0
            eventually(lambda: any(thread.name.startswith("backfill-") for thread in threading.enumerate()))
        eventually(lambda: not set(threading.enumerate()) - before, "no thread is left")
    eventually(lambda: not seen(world, ()).sessions, "no session is left")


def test_every_thread_in_the_code_has_a_row() -> None:
    """Also those that no test sees in a bridge, such as the one that looks who holds a lock."""
    listed = {name for row in table() for name in row.threads}
    made: set[str] = set()
    for path in (ROOT / "cdcbridge").rglob("*.py"):
        text = path.read_text()
        if path.name == "background.py":
            continue
        assert "threading.Thread(" not in text or path.parent.name == "client", f"{path.name} makes a thread by itself"
        if "threading.Thread(" in text:
            made.update(re.findall(r'threading\.Thread\(.*name="([^"]+)"', text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Background" for base in node.bases):
                made.update(re.findall(r"super\(\)\.__init__\(f?'([^']+)'", ast.unparse(node)))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "BlockerWatch":
                made.add(str(ast.literal_eval(node.args[0])))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "ChildProcess":
                made.add(str(ast.literal_eval(node.args[1])))
            elif isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["ChildProcess"]:
                made.update(re.findall(r"super\(\)\.__init__\(\w+, '([^']+)'", ast.unparse(node)))
    made = {re.sub(r"\{.*\}", "N", name) for name in made} - {"copy-N"} | {"copy-1", "copy-2"}
    assert made | {"main", "process_request_thread"} == listed
