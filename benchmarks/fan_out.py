"""Measure `cdcbridge run` from the slot's start until all changes are durable and confirmed.

The comparison is pg_recvlogical, which writes to /dev/null. Both use the same plugin and the same options, except
`numeric-data-types-as-string`. Both read copies of one slot over TCP, in turn. The bridge's time includes the start of
its process.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from benchmarks.common import bridge, configuration, database, fill, median, wait_until, workspace
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.source.plugins import plugin_options

AIMS = {"wal2json": {1: 0.5, 5: 0.3, 20: 0.12}, "pgoutput": {1: 0.4, 5: 0.25}}
CONFIRMED = "select confirmed_flush_lsn >= %s::pg_lsn from pg_replication_slots where slot_name = %s"


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Print and return a row per plugin and number of consumers."""
    rows, runs = (50_000, 1) if quick else (1_000_000, 3)
    results = []
    print(f"{rows} rows in {rows // 50} transactions, medians of {runs}; rows/s")
    print("\n| plugin | consumers | pg_recvlogical | cdcbridge | ratio | aim |\n|---|---|---|---|---|---|", flush=True)
    for plugin, aims in AIMS.items():
        with workspace() as folder, database(server, f"bench_{plugin}") as session:
            session.execute("create publication cdcbridge for table t with (publish_via_partition_root = true)")
            session.execute("select pg_create_logical_replication_slot('origin', %s)", (plugin,))
            target = fill(session, rows, 50)
            for consumers, aim in aims.items():
                pairs = [
                    (
                        _ceiling(server, session, plugin, target),
                        run_bridge(server, session, plugin, consumers, target, Path(folder)).seconds,
                    )
                    for _ in range(runs)
                ]
                ceiling, ours = (rows / median(seconds) for seconds in zip(*pairs, strict=True))
                # Each ratio is that of a pair, which ran within the same seconds: the speed of the machine varies.
                ratio = median([theirs / own for theirs, own in pairs])
                results.append({"plugin": plugin, "consumers": consumers, "ceiling": ceiling, "rows_per_s": ours,
                                "ratio": ratio, "aim": aim, "seconds": pairs})  # fmt: skip
                print(f"| {plugin} | {consumers} | {ceiling:,.0f} | {ours:,.0f} | {ratio:.2f} | {aim} |", flush=True)
    return results


def copy_slot(session: psycopg.Connection[Any], name: str) -> None:
    session.execute("select pg_copy_logical_replication_slot('origin', %s)", (name,))


def drop_slot(session: psycopg.Connection[Any], name: str) -> None:
    wait_until(session, "select not active from pg_replication_slots where slot_name = %s", name)
    session.execute("select pg_drop_replication_slot(%s)", (name,))


def _ceiling(server: EmbeddedServer, session: psycopg.Connection[Any], plugin: str, target: str) -> float:
    copy_slot(session, "ceiling")
    options = plugin_options(plugin, ["cdcbridge"], "cdcbridge")
    options.pop("numeric-data-types-as-string", None)
    flags = [flag for name, value in options.items() for flag in ("-o", f"{name}={value}")]
    started = time.perf_counter()
    subprocess.run(
        [server.binaries / "pg_recvlogical", "-d", server.dsn(session.info.dbname, tcp=True), "--slot=ceiling", "--start",
         "-f", "/dev/null", f"--endpos={target}", "--no-loop", *flags],
        check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    drop_slot(session, "ceiling")
    return seconds


class Run(NamedTuple):
    """The speed of the bridge in one run.

    Attributes:
        seconds: The time from the start of the process.
        streaming: The rows/s from the first append on, or from the seq `warm` on.
    """

    seconds: float
    streaming: float


def run_bridge(
    server: EmbeddedServer,
    session: psycopg.Connection[Any],
    plugin: str,
    consumers: int,
    target: str,
    folder: Path,
    *,
    groups: int = 0,
    sink: Mapping[str, Any] | None = None,
    warm: int = 0,
) -> Run:
    copy_slot(session, "ours")
    config = configuration(server, session.info.dbname, plugin, consumers, folder, "ours", groups=groups, sink=sink)
    started = time.perf_counter()
    with bridge(config):
        wait_until(session, "select to_regclass('cdcbridge.messages') is not null")
        wait_until(session, "select exists (select from cdcbridge.messages where seq > %s)", warm)
        early, streaming = _appended(session), time.perf_counter()
        wait_until(session, CONFIRMED, target, "ours")
        ended = time.perf_counter()
    rows = _appended(session)
    assert session.execute("select count(*) from t").fetchone() == (rows,), "every row is in the log once"
    session.execute("drop schema cdcbridge, cdcbridge_internal cascade")
    drop_slot(session, "ours")
    session.execute("checkpoint")
    return Run(ended - started, (rows - early) / (ended - streaming))


def _appended(session: psycopg.Connection[Any]) -> int:
    row = session.execute("select count(*) from cdcbridge.messages").fetchone()
    assert row is not None
    return int(row[0])
