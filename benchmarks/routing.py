"""Measure the cost of many consumers.

The same rows of 500 tables are sent to one consumer of all tables, and to 500 consumers of one table each.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psycopg
import yaml

from benchmarks.common import TABLE, bridge, database, median, wait_until, workspace
from benchmarks.fan_out import CONFIRMED
from cdcbridge.demo.embedded import EmbeddedServer

TABLES = 500
FILL = """
    do $$ begin
        for i in 1 .. {transactions} loop
            execute format('insert into many.t%s select %s::bigint * 50 + g, g, ''paid'', g * 1.25, repeat(''x'', 150), now()
                            from generate_series(1, 50) g', i % {tables}, i);
            commit;
        end loop;
    end $$
"""


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Print and return a row per plugin."""
    rows, runs = (25_000, 1) if quick else (250_000, 3)
    print(f"{rows} rows of {TABLES} tables, from the first transaction streamed; medians of {runs}; rows/s")
    print(f"\n| plugin | 1 consumer of all | {TABLES} of one table each | ratio |\n|---|---|---|---|", flush=True)
    results = []
    for plugin in ("wal2json", "pgoutput"):
        with workspace() as folder, database(server, f"routing_{plugin}") as session:
            session.execute("create schema many")
            for n in range(TABLES):
                session.execute(f"create table many.t{n} ({TABLE})".encode())
            seconds: dict[int, list[float]] = {1: [], TABLES: []}
            for _ in range(runs):
                for consumers, measured in seconds.items():
                    measured.append(_run(server, session, plugin, consumers, rows, Path(folder)))
        one, many = (rows / median(measured) for measured in seconds.values())
        results.append({"plugin": plugin, "one": one, "many": many, "seconds": seconds})
        print(f"| {plugin} | {one:,.0f} | {many:,.0f} | {many / one:.2f} |", flush=True)
    return results


def _run(
    server: EmbeddedServer, session: psycopg.Connection[Any], plugin: str, consumers: int, rows: int, folder: Path
) -> float:
    patterns = ["many.*"] if consumers == 1 else [f"many.t{n}" for n in range(consumers)]
    path = folder / "routing.yaml"
    document = {
        "source": {"dsn": server.dsn(session.info.dbname), "plugin": plugin, "slot": "routing"},
        "log": {"level": "warning"},
        "consumers": [{"name": f"c{n}", "tables": [pattern]} for n, pattern in enumerate(patterns)],
    }
    path.write_text(yaml.safe_dump(document))
    # The first start creates slot, publication and consumers. The second start is measured: it reads the backlog.
    with bridge(path):
        wait_until(session, "select count(*) > 0 from pg_stat_replication where application_name like 'cdcbridge%%'")
    wait_until(session, "select not active from pg_replication_slots where slot_name = %s", "routing")
    session.execute(FILL.format(transactions=rows // 50, tables=TABLES).encode())
    target = session.execute("select pg_current_wal_lsn()::text").fetchone()
    session.execute("checkpoint")
    with bridge(path):
        wait_until(session, "select count(*) > 0 from cdcbridge.messages")
        started = time.perf_counter()
        wait_until(session, CONFIRMED, *(target or ()), "routing")
        seconds = time.perf_counter() - started
    wait_until(session, "select not active from pg_replication_slots where slot_name = %s", "routing")
    session.execute("select pg_drop_replication_slot('routing')")
    session.execute("drop schema cdcbridge, cdcbridge_internal cascade")
    session.execute("drop publication if exists cdcbridge, cdcbridge_inserts")
    session.execute("do $$ begin for i in 0 .. 499 loop execute format('truncate many.t%s', i); end loop; end $$")
    return seconds
