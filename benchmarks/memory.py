"""Measure the peak resident memory of the bridge.

One load is a transaction of 2,000,000 rows, the other one a backlog of 2 GB of WAL.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.common import configuration, database, fill, wait_until, workspace
from benchmarks.fan_out import CONFIRMED
from cdcbridge.demo.embedded import EmbeddedServer

AIM = 150  # MB


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Print and return a row per plugin and load."""
    results = []
    print(f"aim: under {AIM} MB\n\n| plugin | load | peak RSS | seconds |\n|---|---|---|---|", flush=True)
    loads = {"one transaction of 2,000,000 rows": (2_000_000, 2_000_000), "a backlog of 2 GB": (5_000_000, 500)}
    if quick:
        loads = {"one transaction of 50,000 rows": (50_000, 50_000)}
    for plugin in ("pgoutput", "wal2json"):
        for load, (rows, per_transaction) in loads.items():
            with workspace() as folder, database(server, "bench_memory") as session:
                session.execute("create publication cdcbridge for table t with (publish_via_partition_root = true)")
                session.execute("select pg_create_logical_replication_slot('bench_memory', %s)", (plugin,))
                target = fill(session, rows, per_transaction)
                config = configuration(server, session.info.dbname, plugin, 1, Path(folder), "bench_memory")
                started = time.perf_counter()
                pid = os.spawnlp(os.P_NOWAIT, _python(), _python(), "-m", "cdcbridge", "-c", str(config), "run")
                wait_until(session, CONFIRMED, target, "bench_memory")
                seconds = time.perf_counter() - started
                os.kill(pid, 15)
                _, _, usage = os.wait4(pid, 0)
                peak = usage.ru_maxrss / 1024
                results.append({"plugin": plugin, "load": load, "peak_mb": peak, "seconds": seconds})
                print(f"| {plugin} | {load} | {peak:.0f} MB | {seconds:.0f} |", flush=True)
    return results


def _python() -> str:
    import sys

    return sys.executable
