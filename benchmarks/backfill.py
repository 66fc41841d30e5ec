"""Measure a backfill into one queue consumer. Compare it with COPY of the same rows into a table with a primary key.

Also measures the latency of changes of another table, and the memory of the bridge, during the backfill.
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import yaml

from benchmarks.common import ROW, TABLE, bridge, database, wait_until, workspace
from cdcbridge.demo.embedded import EmbeddedServer

RATE = 200  # changes of the other table per second
QUIET = 10  # seconds of these changes alone, before the backfill starts
AIMS = {"ratio": 0.5, "latency": 2.0, "memory_mb": 150}
_DONE = "select count(*) > 0 and bool_and(state = 'done') from cdcbridge_internal.backfills where id > %s"


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Measure without and with changes of another table, and print a row for each.

    A row has the rows/s of COPY and of the backfill, and the p99 latency of the other changes before and during the
    backfill. The last column is the memory of the bridge.
    """
    sizes = {"idle": 100_000, "changes": 20_000} if quick else {"idle": 5_000_000, "changes": 600_000}
    print(f"{RATE} changes/s of another table in the run with changes; aim: {AIMS}\n")
    print("| run | rows | COPY, rows/s | backfill, rows/s | ratio | p99 alone, ms | p99 meanwhile, ms | memory, MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = []
    for run, rows in sizes.items():
        with workspace() as folder, database(server, "backfill") as session:
            insert = f"insert into t select {ROW.format(first='0::bigint')} from generate_series(1, {rows}) g"
            session.execute(insert.encode())
            session.execute("create table live (id bigint primary key, v text)")
            session.execute("vacuum analyze t")
            found = _run(server, session, rows, Path(folder), live=run == "changes")
            results.append({"run": run, "rows": rows, **found})
            print(
                f"| {run} | {rows:,} | {found['copy']:,.0f} | {found['backfill']:,.0f}"
                f" | {found['backfill'] / found['copy']:.2f} | {found['alone'] * 1000:.1f}"
                f" | {found['meanwhile'] * 1000:.1f} | {found['memory_mb']:.0f} |",
                flush=True,
            )
    return results


def _run(
    server: EmbeddedServer, session: psycopg.Connection[Any], rows: int, folder: Path, *, live: bool
) -> dict[str, Any]:
    copied = rows / _copy(server, session)
    config = folder / "backfill.yaml"
    document = {
        "source": {"dsn": server.dsn(session.info.dbname, tcp=True), "plugin": "pgoutput", "slot": "backfill"},
        "log": {"level": "warning"},
        "consumers": [{"name": "c0", "tables": ["public.t"]}, {"name": "live", "tables": ["public.live"]}],
    }
    config.write_text(yaml.safe_dump(document))
    with bridge(config) as process:
        wait_until(session, "select count(*) > 0 from pg_stat_replication where state = 'streaming'")
        latency = _Latency(server.dsn(session.info.dbname))
        if live:
            latency.start()
            time.sleep(QUIET)
        memory = _Memory(process.pid)
        begun = time.perf_counter()
        session.execute("select cdcbridge_internal.start_backfill('c0', 'public.t')")
        session.execute("set search_path = cdcbridge, cdcbridge_internal, public")
        wait_until(session, _DONE, 0)
        ended = time.perf_counter()
        took = session.execute("select extract(epoch from finished_at - started_at)::float8 from backfills").fetchone()
        assert took is not None
        found = {"copy": copied, "backfill": rows / took[0], "memory_mb": memory.stop()}
        found |= latency.stop(begun, ended) if live else {"alone": 0.0, "meanwhile": 0.0}
        counted = session.execute("select count(*) from messages where topic = 'public.t'").fetchone()
        assert counted == (rows,), counted
    session.execute("drop schema cdcbridge, cdcbridge_internal cascade; truncate public.live")
    wait_until(session, "select not active from pg_replication_slots where slot_name = 'backfill'")
    session.execute("select pg_drop_replication_slot('backfill')")
    session.execute("drop publication cdcbridge")
    session.execute("drop publication if exists cdcbridge_inserts")
    session.execute("checkpoint")
    return found


def _copy(server: EmbeddedServer, session: psycopg.Connection[Any]) -> float:
    """Return the seconds that COPY … TO STDOUT | COPY … FROM STDIN takes."""
    session.execute(f"drop table if exists public.copied; create table public.copied ({TABLE})".encode())
    psql = [str(server.binaries / "psql"), "-qXd", server.dsn(session.info.dbname, tcp=True), "-c"]
    started = time.perf_counter()
    with subprocess.Popen([*psql, "copy public.t to stdout"], stdout=subprocess.PIPE) as reader:
        subprocess.run([*psql, "copy public.copied from stdin"], stdin=reader.stdout, check=True)
    took = time.perf_counter() - started
    session.execute("drop table public.copied")
    session.execute("checkpoint")
    return took


class _Latency:
    """The latency of changes of the other table, which one waiting reader receives and acks.

    A latency is the time from just before the commit to just after the ack, in seconds.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._sent: dict[int, float] = {}
        self._took: list[tuple[float, float]] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._write), threading.Thread(target=self._read)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, begun: float, ended: float) -> dict[str, float]:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return {
            "alone": _p99([took for at, took in self._took if begun - QUIET + 1 < at < begun]),
            "meanwhile": _p99([took for at, took in self._took if begun < at < ended]),
        }

    def _write(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as session:
            started, number = time.perf_counter(), 0
            while not self._stopping.is_set():
                time.sleep(max(0.0, started + number / RATE - time.perf_counter()))
                self._sent[number] = time.perf_counter()
                session.execute("insert into public.live values (%s, 'x')", (number,))
                number += 1

    def _read(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as session:
            session.execute("listen cdcbridge")
            while not self._stopping.is_set():
                rows = session.execute("select receipt, key from cdcbridge.receive('live', 100)").fetchall()
                if not rows:
                    for _ in session.notifies(timeout=0.2, stop_after=1):
                        pass
                    continue
                session.execute("select cdcbridge.ack('live', %s)", ([receipt for receipt, _ in rows],))
                now = time.perf_counter()
                self._took += [(self._sent[int(key)], now - self._sent[int(key)]) for _, key in rows]


class _Memory:
    """The peak resident memory of a process in MB, sampled every 0.1 seconds."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._most = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> float:
        self._stopping.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._stopping.wait(0.1):
            status = Path(f"/proc/{self._pid}/status").read_text()
            kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            self._most = max(self._most, kilobytes / 1024)


def _p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100] if values else 0.0
