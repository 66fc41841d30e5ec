"""Measure each type of sink: how fast its messages arrive, and how soon after their commit.

A sink in mode `stream` reads the log and delivers it to a real server. Beside it, in the same run, the adapter alone
gets the same messages from memory. The ratio shows the cost of reading, judging, shaping and leases.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psycopg
import yaml

from benchmarks.common import database, fill, median, wait_until, workspace
from benchmarks.fan_out import run_bridge
from cdcbridge.config import Consumer, load
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.routing.subscription import Subscription
from cdcbridge.sinks.log_row import COLUMNS, LogRow, read_integers
from cdcbridge.sinks.message import Origin, SinkMessage
from cdcbridge.sinks.reading import judge
from cdcbridge.sinks.shaper import Names, Shaper, Unshaped
from cdcbridge.sinks.target import Lane, Outgoing
from cdcbridge.sinks.targets import target_class
from cdcbridge.store.consumers import stored_config
from tests.harness.brokers.redis import Redis
from tests.sinks.cases import KINDS

PARTITIONS = 4
AIM = 0.7
ROWS = {
    "file": 400_000,
    "kafka": 400_000,
    "redis": 400_000,
    "nats": 200_000,
    "rabbitmq_stream": 200_000,
    "rabbitmq_exchange": 10_000,
    "mqtt": 10_000,
    "http": 10_000,
    "sqs": 2_000,
}
_FEW_NOTES = 3
RUNS = 3
BATCH = 500
RATE = 1000
QUEUES = 5
AWAY_AIM = 0.95
LATENCY_AIM = {"p50": 0.015, "p99": 0.060}
_LOG = f"select {COLUMNS} from (select *, null::text as shown from cdcbridge.messages) m order by seq"


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Print and return a row for each type of sink."""
    print(f"messages/s, medians of {1 if quick else RUNS} runs; aim: ratio at least {AIM}\n")
    print("| type | messages | adapter alone | sink | ratio |\n|---|---|---|---|---|", flush=True)
    only = os.environ.get("ONLY_SINKS", ",".join(ROWS)).split(",")
    results = []
    for name in only:
        rows = ROWS[name] // (10 if quick else 1)
        row = _kind(server, name, rows, 1 if quick else RUNS)
        results.append(row)
        print(f"| {name} | {rows:,} | {row['alone']:,.0f} | {row['sink']:,.0f} | {row['ratio']:.2f} |", flush=True)
    if "ONLY_SINKS" in os.environ:
        return results
    found = sorted(_latencies(server, 3 if quick else 15))
    row = {"p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100], "max": found[-1]}
    print(
        f"\ncommit → in Redis at {RATE}/s: " + ", ".join(f"{k} {v * 1000:.1f} ms" for k, v in row.items()), flush=True
    )
    pairs = _beside_away(server, 20_000 if quick else 1_000_000, 1 if quick else 7)
    ratio = median([beside / alone for alone, beside in pairs])
    print(
        f"\nfan-out to {QUEUES} queues beside a sink whose target is away: {ratio:.2f} of the rate without it",
        flush=True,
    )
    beside = {"type": "fan-out beside a sink that is away", "pairs": pairs, "ratio": ratio, "aim": AWAY_AIM}
    return [*results, {"type": "latency", **row, "aim": LATENCY_AIM}, beside]


def _beside_away(server: EmbeddedServer, rows: int, runs: int) -> list[tuple[float, float]]:
    """Return pairs of rows/s that a bridge appends: with a stream without a reader, and with a sink that is away.

    The second half of the rows counts, because the process of the sinks starts during the first one.
    """
    away = {"type": "redis", "url": "redis://127.0.0.1:1", "stream": "s"}
    with workspace() as folder, database(server, "sink_away") as session:
        session.execute("create publication cdcbridge for table t with (publish_via_partition_root = true)")
        session.execute("select pg_create_logical_replication_slot('origin', 'pgoutput')")
        target = fill(session, rows, 50)

        def rate(groups: int, sink: dict[str, Any] | None) -> float:
            where = Path(folder)
            return run_bridge(
                server, session, "pgoutput", QUEUES, target, where, groups=groups, sink=sink, warm=rows // 2
            ).streaming

        return [(rate(1, None), rate(0, away)) for _ in range(runs)]


def _latencies(server: EmbeddedServer, seconds: int) -> list[float]:
    """Commit single rows, and return after how many seconds each one was read from a stream of Redis."""
    with workspace() as folder, database(server, "sink_latency") as session, Redis() as redis:
        document = {
            "source": {"dsn": server.dsn(session.info.dbname), "slot": "sink_latency", "plugin": "pgoutput"},
            "http": None,
            "log": {"level": "warning"},
            "consumers": [
                {"name": "c", "tables": ["public.t"], "sink": {"type": "redis", "url": redis.url, "stream": "s"}}
            ],
        }
        path = Path(folder) / "cdcbridge.yaml"
        path.write_text(yaml.safe_dump(document))
        arrived: dict[int, float] = {}
        rows = RATE * seconds

        def read() -> None:
            with redis.client() as client:
                last: Any = "0"
                while len(arrived) < rows:
                    for _, entries in client.xread({"s": last}, block=1000) or ():
                        now = time.perf_counter()
                        for entry, fields in entries:
                            last = entry
                            arrived[int(fields[b"key"])] = now

        with _Process(path, "run"):
            wait_until(session, "select count(*) > 0 from pg_stat_replication where state = 'streaming'")
            time.sleep(3)  # the process of the sinks starts
            thread = threading.Thread(target=read)
            thread.start()
            committed = {}
            begin = time.perf_counter()
            for n in range(rows):
                time.sleep(max(0.0, begin + n / RATE - time.perf_counter()))
                committed[n] = time.perf_counter()
                session.execute("insert into t values (%s, 1, 'paid', 1, 'x', now())", (n,))
            thread.join(60)
    return [arrived[n] - at for n, at in committed.items()]


def _kind(server: EmbeddedServer, name: str, rows: int, runs: int) -> dict[str, Any]:
    kind = KINDS[name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(workspace()))
        session = stack.enter_context(database(server, f"sink_{name}"))
        broker = stack.enter_context(kind.server()) if kind.server is not None else None
        if isinstance(broker, Redis):  # it has all runs in memory
            with broker.client() as client:
                client.config_set("maxmemory", 0)
        cases = [kind.case(broker, f"b{secrets.token_hex(4)}", partitions=PARTITIONS) for _ in range(2 * runs)]
        path = _configure(server, session.info.dbname, folder, cases[::2], name)
        with _Process(path, "run", "--no-sinks"):
            wait_until(session, "select count(*) > 0 from pg_stat_replication where state = 'streaming'")
            fill(session, rows, 1000)
            wait_until(session, f"select count(*) = {rows} from cdcbridge.messages")
            alone, sink = [], []
            for run in range(runs):
                alone.append(rows / _in_a_process(path, cases[2 * run + 1].sink(), server.dsn(session.info.dbname)))
                sink.append(_sink(session, path, run, rows))
    found = {"type": name, "messages": rows, "alone": median(alone), "sink": median(sink)}
    return found | {"ratio": statistics.median(s / a for s, a in zip(sink, alone, strict=True))}


class _Process:
    """`cdcbridge` with these arguments, for the duration of a `with` block."""

    def __init__(self, path: Path, *command: str) -> None:
        self._command = [sys.executable, "-m", "cdcbridge", "-c", str(path), *command]

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(self._command)
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def _configure(server: EmbeddedServer, database_name: str, folder: Path, cases: Sequence[Any], name: str) -> Path:
    """Write a file with a consumer for each run, which has a destination of its own."""
    path = folder / "cdcbridge.yaml"
    document = {
        "source": {"dsn": server.dsn(database_name), "slot": f"sink_{name}", "plugin": "pgoutput"},
        "store": {"partitions": PARTITIONS},
        "http": None,
        "log": {"level": "warning"},
        "consumers": [{"name": f"run{n}", "tables": ["public.t"], "sink": case.sink()} for n, case in enumerate(cases)],
    }
    path.write_text(yaml.safe_dump(document))
    return path


def _shaped(session: psycopg.Connection[Any], consumer: Consumer) -> list[Outgoing]:
    """Return every message of the log in the form in which the consumer's sink delivers it."""
    origin = Origin("1", "shop", "slot", [0], [1])
    wanted = Subscription.from_config(1, consumer.name, consumer.mode, stored_config(consumer))
    shaper = Shaper(consumer, Names("shop", "shop"), None)
    found: list[Outgoing] = []
    cursor = session.cursor(binary=True)
    read_integers(cursor)
    for row in cursor.execute(_LOG.encode()).fetchall():
        said = judge(LogRow(*row), wanted, origin, projected=False)
        shaped = shaper.shape(said) if isinstance(said, SinkMessage) else None
        if shaped is None or isinstance(shaped, Unshaped):
            raise RuntimeError(f"message {row[0]} cannot be shaped")
        found += shaped
    return found


def _in_a_process(path: Path, sink: dict[str, Any], dsn: str) -> float:
    """Feed the adapter in a process of its own, as the sink has one: some servers are threads of this process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_alone, path, sink, dsn).result()


def _alone(path: Path, sink: dict[str, Any], dsn: str) -> float:
    """Feed the adapter from memory, with as many lanes as the sink has. Return the seconds."""
    named = load(path).consumers[0]
    consumer = Consumer.model_validate({"name": named.name, "tables": list(named.tables), "sink": sink})
    with psycopg.connect(dsn) as session:
        messages = _shaped(session, consumer)
    return asyncio.run(_feed(consumer, messages))


async def _feed(consumer: Consumer, messages: Sequence[Outgoing]) -> float:
    sink = consumer.needed_sink
    adapter = target_class(sink)
    lanes = adapter.lanes(sink, PARTITIONS)
    targets = [adapter(sink, Lane("alone", f"1-{secrets.token_hex(4)}", n, lanes)) for n in range(lanes)]
    for target in targets:
        await target.open()
        await target.position()

    async def feed(target: Any, part: Sequence[Outgoing]) -> None:
        for first in range(0, len(part), BATCH):
            if await target.deliver(part[first : first + BATCH]):
                raise RuntimeError("a message was refused")

    parts = [[one for one in messages if one.partition % lanes == n] for n in range(lanes)]
    gc.collect()
    gc.freeze()  # the messages in memory must not slow the adapter down
    began = time.perf_counter()
    await asyncio.gather(*(feed(target, part) for target, part in zip(targets, parts, strict=True)))
    took = time.perf_counter() - began
    gc.unfreeze()
    for target in targets:
        await target.close()
    return took


def _sink(session: psycopg.Connection[Any], path: Path, run: int, rows: int) -> float:
    """Run the process of one sink until it has delivered everything. Return messages/s, without its start and its end."""
    done = (
        "select coalesce(s.delivered, 0) from cdcbridge.consumers c"
        " left join cdcbridge_internal.sinks s on s.consumer_id = c.id where c.name = %s"
    )
    notes: list[tuple[float, int]] = []
    with _Process(path, "sinks", "run", f"run{run}"):
        while not notes or notes[-1][1] < rows:
            row = session.execute(done.encode(), (f"run{run}",)).fetchone()
            if row and row[0] and (not notes or notes[-1][1] < row[0]):
                notes.append((time.perf_counter(), row[0]))
            time.sleep(0.005)
    # The process notes its counters once a second. The last note may come up to a second after the last message.
    (began, before), (ended, after) = notes[0], notes[-2 if len(notes) > _FEW_NOTES else -1]
    return (after - before) / (ended - began) if after > before else rows / 0.5
