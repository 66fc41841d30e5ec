"""Measure the latency from a commit until a waiting reader has received and acked the message, at 1,000 changes/s.

The comparison is a bare INSERT with NOTIFY, after which a reader selects the row. Also measures the time from publish()
until the Python client returns the message, at 100 messages/s.

One clock measures all times. Each begins just before the statement is sent, and ends just after the ack is committed.
There are two exceptions: the bare path ends when the row has been selected, and publish() ends before the ack.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.common import bridge, configuration, database, wait_until, workspace
from cdcbridge import Queue
from cdcbridge.config import Consumer
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.store.consumers import apply
from cdcbridge.store.log import BridgeStore

RATE = 1000
PUBLISHED = 100
AIM = {"p50": 0.010, "p99": 0.050}


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Print and return a row for the bare path, one per plugin and one for publish()."""
    seconds = 3 if quick else 20
    results = []
    print(
        f"{RATE} changes/s for {seconds} s; milliseconds (aim: p50 {AIM['p50'] * 1000:.0f}, p99 {AIM['p99'] * 1000:.0f})"
    )
    print("\n| path | p50 | p99 | max |\n|---|---|---|---|", flush=True)
    for path in ("bare", "pgoutput", "wal2json", "publish() → handler"):
        with workspace() as folder, database(server, f"latency_{path[:7]}") as session:
            if path.startswith("publish"):
                found = _published(server, session.info.dbname, seconds)
            elif path == "bare":
                found = _bare(server, session, seconds)
            else:
                config = configuration(server, session.info.dbname, path, 1, Path(folder), f"latency_{path}")
                with bridge(config):
                    wait_until(session, "select count(*) > 0 from pg_stat_replication where state = 'streaming'")
                    found = _queue(server, session, seconds)
        found.sort()
        row = {"path": path, "p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100], "max": found[-1]}
        results.append(row | {"messages": len(found)})
        print(f"| {path} | {row['p50'] * 1000:.1f} | {row['p99'] * 1000:.1f} | {row['max'] * 1000:.1f} |", flush=True)
    return results


INSERT = "insert into t values (%s, 1, 'paid', 1, 'x', now())"
INSERT_AND_NOTIFY = f"with i as ({INSERT} returning id) select pg_notify('n', id::text) from i"


def _write(server: EmbeddedServer, name: str, seconds: int, sent: dict[int, float], statement: str) -> None:
    """Execute RATE statements per second, each with its number as the parameter.

    The moment just before each statement is stored in `sent`.
    """
    with psycopg.connect(server.dsn(name), autocommit=True) as session:
        started = time.perf_counter()
        for number in range(seconds * RATE):
            delay = started + number / RATE - time.perf_counter()
            if delay > 0:
                time.sleep(delay)
            sent[number] = time.perf_counter()
            session.execute(statement.encode(), (number,))


def _bare(server: EmbeddedServer, session: psycopg.Connection[Any], seconds: int) -> list[float]:
    name = session.info.dbname
    sent: dict[int, float] = {}
    took: list[float] = []
    session.execute("listen n")
    writer = threading.Thread(target=_write, args=(server, name, seconds, sent, INSERT_AND_NOTIFY))
    writer.start()
    with psycopg.connect(server.dsn(name), autocommit=True) as reader:
        for notification in session.notifies(timeout=30):
            number = int(notification.payload)
            reader.execute("select * from t where id = %s", (number,)).fetchall()
            took.append(time.perf_counter() - sent[number])
            if len(took) == seconds * RATE:
                break
    writer.join()
    return took


def _queue(server: EmbeddedServer, session: psycopg.Connection[Any], seconds: int) -> list[float]:
    name = session.info.dbname
    sent: dict[int, float] = {}
    took: list[float] = []
    writer = threading.Thread(target=_write, args=(server, name, seconds, sent, INSERT))
    with psycopg.connect(server.dsn(name), autocommit=True) as reader:
        reader.execute("listen cdcbridge")
        writer.start()
        while len(took) < seconds * RATE:
            rows = reader.execute("select receipt, key from cdcbridge.receive('c0', 100)").fetchall()
            if not rows:
                for _ in reader.notifies(timeout=1, stop_after=1):
                    pass
                continue
            reader.execute("select cdcbridge.ack('c0', %s)", ([receipt for receipt, _ in rows],))
            now = time.perf_counter()
            took += [now - sent[int(key)] for _, key in rows]
    writer.join()
    return took


def _published(server: EmbeddedServer, name: str, seconds: int) -> list[float]:
    dsn = server.dsn(name)
    store = BridgeStore(dsn, "cdcbridge")
    store.migrate()
    apply(store.connection, [Consumer(name="c", topics=("events",))])
    store.close()
    sent: dict[int, float] = {}
    took: list[float] = []

    def write() -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            for number in range(seconds * PUBLISHED):
                sent[number] = time.perf_counter()
                session.execute("select cdcbridge.publish('events', %s, '{}')", (str(number),))
                time.sleep(1 / PUBLISHED)

    with Queue.connect(dsn, consumer="c") as queue:
        writer = threading.Thread(target=write)
        writer.start()
        for message in queue.messages(wait=20):
            took.append(time.perf_counter() - sent[int(message.key or 0)])
            message.ack()
            if len(took) == seconds * PUBLISHED:
                break
        writer.join()
    return took
