"""Measure mirrors and PostgreSQL's own subscriptions, on the same two databases and with the same changes.

The source first gets a backlog, and then the time is taken until the target has it. The subscription reads the WAL, and
the mirror reads the log, which the bridge has filled before.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import yaml

from benchmarks.common import ROW, bridge, database, median, wait_until, workspace
from cdcbridge.demo.embedded import EmbeddedServer

RUNS = 3
ROWS = 300_000
SMALL = 60_000
LARGE = 2_000_000
AIMS = {"inserts": 1.3, "updates": 2.0, "small": 1.0, "two_way": 0.7}
MOST_MEMORY = 150 << 20
_PLACE = "select coalesce(max(seq), 0) from cdcbridge.mirror_places"


@dataclass(frozen=True)
class Work:
    """A backlog: the statements before it, the statements that make it, and the number of rows that it writes."""

    name: str
    before: str
    statements: str
    rows: int


def works(rows: int, small: int) -> list[Work]:
    """Return the backlogs to measure."""
    fill = f"insert into t select {ROW.format(first=0)} from generate_series(1, {rows}) g"
    loop = f"""
        do $$ begin
            for i in 1 .. {small} loop
                insert into t select {ROW.format(first="i")} from generate_series(0, 0) g;
                commit;
            end loop;
        end $$"""
    return [
        Work("inserts", "select", fill, rows),
        Work("updates", fill, "update t set status = 'sent', amount = amount + 1", rows),
        Work("small", "select", loop, small),
    ]


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Print and return the rates of mirrors and subscriptions."""
    runs, part = (1, 20) if quick else (RUNS, 1)
    print(f"rows/s from a backlog, medians of {runs} runs\n")
    print("| work | subscription | mirror | ratio | aim |\n|---|---|---|---|---|")
    found = []
    for work in works(ROWS // part, SMALL // part):
        pairs = [(_subscription(server, work), _mirror(server, work)) for _ in range(runs)]
        native, ours = (median([pair[side] for pair in pairs]) for side in (0, 1))
        ratio = median([pair[1] / pair[0] for pair in pairs])
        aim = AIMS[work.name]
        print(f"| {work.name} | {native:,.0f} | {ours:,.0f} | {ratio:.2f} | {aim} |", flush=True)
        found.append({"work": work.name, "native": native, "mirror": ours, "ratio": ratio, "aim": aim})
    work = works(ROWS // part, SMALL // part)[1]
    pairs = [(_mirror(server, work), _mirror(server, work, two_way=True)) for _ in range(runs)]
    one, two = (median([pair[side] for pair in pairs]) for side in (0, 1))
    ratio = median([pair[1] / pair[0] for pair in pairs])
    print(f"| two-way, updates | {one:,.0f} (one-way) | {two:,.0f} | {ratio:.2f} | {AIMS['two_way']} |")
    found.append({"work": "two_way", "one_way": one, "mirror": two, "ratio": ratio, "aim": AIMS["two_way"]})
    large = Work("large", "select", works(LARGE // part, 1)[0].statements, LARGE // part)
    peak: list[int] = []
    rate = _mirror(server, large, peak=peak)
    print(f"\nmemory, a transaction of {large.rows:,} rows: {max(peak) >> 20} MB (aim < 150), {rate:,.0f} rows/s")
    found.append({"work": "memory", "rows": large.rows, "bytes": max(peak), "aim": MOST_MEMORY})
    return found


def _subscription(server: EmbeddedServer, work: Work) -> float:
    """Return the rate at which a subscription applies the backlog."""
    with database(server, "bench_a") as a, database(server, "bench_b") as b:
        a.execute(work.before.encode())
        b.execute(work.before.encode())
        a.execute("create publication p for table t")
        a.execute("select pg_create_logical_replication_slot('bench_sub', 'pgoutput')")
        b.execute(
            f"create subscription s connection '{server.dsn('bench_a', tcp=True)}' publication p"
            " with (create_slot = false, slot_name = bench_sub, copy_data = false, enabled = false)".encode()
        )
        a.execute(work.statements.encode())
        a.execute("checkpoint")
        (target,) = a.execute("select pg_current_wal_lsn()::text").fetchone() or ("",)
        b.execute("alter subscription s enable")
        wait_until(a, "select exists (select from pg_stat_replication where application_name = 's')")
        started = time.perf_counter()
        wait_until(
            a,
            "select exists (select from pg_stat_replication where application_name = 's' and replay_lsn >= %s::pg_lsn)",
            target,
        )
        took = time.perf_counter() - started
        b.execute("alter subscription s disable")
        b.execute("alter subscription s set (slot_name = none)")
        b.execute("drop subscription s")
        wait_until(a, "select not active from pg_replication_slots where slot_name = 'bench_sub'")
    return work.rows / took


def _mirror(server: EmbeddedServer, work: Work, *, two_way: bool = False, peak: list[int] | None = None) -> float:
    """Return the rate at which a mirror applies the backlog, and add the peak of its memory in bytes to `peak`."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(workspace()))
        a, b = (stack.enter_context(database(server, name)) for name in ("bench_a", "bench_b"))
        configs = _configurations(server, folder, two_way=two_way)
        a.execute(work.before.encode())
        if not two_way:
            b.execute(work.before.encode())
        for config, session in zip(configs, (a, b), strict=False):
            stack.enter_context(_bridge_alone(config, session))
        mirrors = [_Mirrors(config) for config in configs]
        with contextlib.ExitStack() as running:
            for one in mirrors:
                running.enter_context(one.running())
            if two_way:  # the rows reach b by the mirror, which is their last writer then
                wait_until(b, "select to_regclass('cdcbridge.mirror_places') is not null")
                wait_until(b, "select count(*) = %s from t", work.rows)
            else:
                wait_until(a, "select exists (select from cdcbridge_internal.mirrors)")
                a.execute("select pg_sleep(1)")
        a.execute(work.statements.encode())
        a.execute("checkpoint")
        wait_until(
            a,
            "select end_lsn >= pg_current_wal_insert_lsn() - 8192::numeric"
            " from cdcbridge_internal.positions order by id desc limit 1",
        )
        (last,) = a.execute("select max(seq) from cdcbridge.messages").fetchone() or (0,)
        with contextlib.ExitStack() as running:
            for one in mirrors[::-1]:
                running.enter_context(one.running())
            wait_until(b, f"select ({_PLACE}) >= %s", last)
            ended = time.time()
            if peak is not None:
                peak.append(mirrors[0].peak())
        took = ended - mirrors[0].started_at()
        assert a.execute("select count(*) from t").fetchone() == b.execute("select count(*) from t").fetchone()
        for config in configs:
            with psycopg.connect(server.dsn(), autocommit=True) as admin:
                for (name,) in admin.execute("select roname from pg_replication_origin").fetchall():
                    admin.execute("select pg_replication_origin_drop(%s)", (name,))
            config.unlink()
    return work.rows / took


def _configurations(server: EmbeddedServer, folder: Path, *, two_way: bool) -> list[Path]:
    made = []
    for here, there, name, peer in (("bench_a", "bench_b", "to_b", "to_a"), ("bench_b", "bench_a", "to_a", "to_b")):
        if here == "bench_b" and not two_way:
            continue
        mirror: dict[str, Any] = {
            "name": name,
            "target": {"dsn": server.dsn(there, tcp=True)},
            "tables": ["public.t"],
            "start": "snapshot" if two_way and here == "bench_a" else "now",
        }
        if two_way:
            mirror["two_way"] = {"peer": peer}
        path = folder / f"{here}.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "source": {"dsn": server.dsn(here, tcp=True), "slot": here},
                    "http": None,
                    "mirrors": [mirror],
                }
            )
        )
        made.append(path)
    return made


@contextlib.contextmanager
def _bridge_alone(config: Path, session: psycopg.Connection[Any]) -> Iterator[None]:
    with bridge(config, "--no-mirrors"):
        wait_until(session, "select to_regclass('cdcbridge.messages') is not null")
        wait_until(session, "select exists (select from pg_replication_slots where slot_name = %s and active)",
                   session.info.dbname)  # fmt: skip
        yield


class _Mirrors:
    """The process of the mirrors of one configuration file."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._log = config.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._log.open("wb") as file:
            command = [sys.executable, "-m", "cdcbridge", "-c", str(self._config), "mirror", "run"]
            self._process = subprocess.Popen(command, stderr=file)
            try:
                yield
            finally:
                self._process.terminate()
                self._process.wait()

    def started_at(self) -> float:
        """Return when the mirror began to read, as seconds since 1970."""
        found = re.search(r"^(\S+) .*mirror\.started", self._log.read_text(), re.MULTILINE)
        assert found is not None, self._log.read_text()
        return datetime.fromisoformat(found[1]).timestamp()

    def peak(self) -> int:
        """Return the most memory that the process has had, in bytes."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) << 10 if found else os.sysconf("SC_PAGE_SIZE")
