"""Common parts of the benchmarks: a database and its WAL, the bridge as a process, and waiting for its progress."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
import yaml

from cdcbridge.demo.embedded import EmbeddedServer

TABLE = "id bigint primary key, customer int, status text, amount numeric(12, 2), note text, at timestamptz"
ROW = "{first} + g, g, 'paid', g * 1.25, repeat('x', 150), now()"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@contextlib.contextmanager
def database(server: EmbeddedServer, name: str) -> Iterator[psycopg.Connection[Any]]:
    """Create a database and open an autocommit session on it. Afterwards, drop the database and its slots."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"drop database if exists {name} with (force)".encode())
        admin.execute(f"create database {name}".encode())
        with psycopg.connect(server.dsn(name), autocommit=True) as session:
            session.execute(f"create table t ({TABLE})".encode())
            yield session
        slots = (
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = %s and not active"
        )
        wait_until(admin, "select count(*) = 0 from pg_replication_slots where database = %s and active", name)
        admin.execute(slots, (name,))
        admin.execute(f"drop database {name} with (force)".encode())


def configuration(
    server: EmbeddedServer,
    name: str,
    plugin: str,
    consumers: int,
    folder: Path,
    slot: str,
    *,
    groups: int = 0,
    sink: Mapping[str, Any] | None = None,
) -> Path:
    """Write a configuration file with this number of queue consumers and of groups, each of all changes of t.

    A consumer with the sink is added if there is one. The source is read over TCP, as from another host.
    """
    path = folder / f"{slot}.yaml"
    document = {
        "source": {"dsn": server.dsn(name, tcp=True), "plugin": plugin, "slot": slot},
        "log": {"level": "warning"},
        "consumers": [{"name": f"c{n}", "tables": ["public.t"]} for n in range(consumers)]
        + [{"name": f"g{n}", "tables": ["public.t"], "mode": "stream"} for n in range(groups)]
        + ([] if sink is None else [{"name": "s", "tables": ["public.t"], "sink": sink}]),
    }
    path.write_text(yaml.safe_dump(document))
    return path


def fill(session: psycopg.Connection[Any], rows: int, per_transaction: int) -> str:
    """Insert rows into t, `per_transaction` at a time. Return the WAL position after the last commit."""
    loop = f"""
        do $$ begin
            for i in 0 .. {rows // per_transaction - 1} loop
                insert into t select {ROW.format(first=f"i * {per_transaction}::bigint")}
                from generate_series(1, {per_transaction}) g;
                commit;
            end loop;
        end $$
    """
    session.execute(loop.encode())
    row = session.execute("select pg_current_wal_lsn()::text").fetchone()
    assert row is not None
    session.execute("checkpoint")
    return str(row[0])


@contextlib.contextmanager
def bridge(config: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `cdcbridge run` as a process for the duration of a `with` block."""
    process = subprocess.Popen([sys.executable, "-m", "cdcbridge", "-c", str(config), "run", *options])
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_until(session: psycopg.Connection[Any], query: str, *args: Any, patience: float = 900) -> None:
    """Repeat the query until it returns true.

    Raise TimeoutError if it does not do so within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        row = session.execute(query.encode(), args).fetchone()
        if row and row[0]:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(query)
        time.sleep(0.02)


def workspace() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cdcbridge-bench-")
