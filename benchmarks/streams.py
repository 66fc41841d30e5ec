"""Streams: a group's members reading the log, beside COPY of the same rows in order.

Members drive read_stream() and commit_offset() over libpq, in one transaction each, as a reader does whose effect is in the same
database; and under a lease. The rows are of a log as the bridge writes it, over 16 partitions.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import time
from typing import Any

import psycopg

from benchmarks.claims import DATA
from cdcbridge.bridge import BATCH_ROWS
from cdcbridge.config import Consumer
from cdcbridge.consumers import apply
from cdcbridge.store import Store

PARTITIONS = 16
READ = "select receipt, partition, seq, topic, key, data from cdcbridge.read_stream('g0', $1, $2::interval)"
COMMIT = "select cdcbridge.commit_offset('g0', $1, $2, $3)"
COPY = "copy (select seq, partition, topic, key, data from cdcbridge.messages order by seq) to stdout"


def fill(session: psycopg.Connection[Any], dsn: str, messages: int, groups: int = 1) -> None:
    """A log, and groups that begin at its first message."""
    store = Store(dsn, "cdcbridge")
    store.migrate()
    apply(
        store.connection,
        [Consumer(name=f"g{n}", mode="stream", tables=("*.*",), start="earliest") for n in range(groups)],
    )
    store.close()
    session.execute("set search_path = cdcbridge")
    for start in range(0, messages, 1_000_000):
        session.execute(f"select setval('messages_seq', {min(messages, start + 1_000_000)})".encode())
        session.execute("select create_segments()")
    session.execute(
        f"""insert into messages (seq, topic, key, partition, data, commit_lsn, ordinal, xid, commit_time)
            select g, 'public.t', ((g::bigint * 7919) % 100000)::text, (g::bigint * 7919) % 100000 % {PARTITIONS}, {DATA},
                   '0/0'::pg_lsn + g, 0, g, now()
            from generate_series(1, {messages}) g
            order by (g - 1) / {BATCH_ROWS}, (g::bigint * 7919) % 100000 % {PARTITIONS}, g""".encode()
    )
    session.execute("vacuum analyze messages")
    session.execute("checkpoint")


def drain(dsn: str, members: int, batch: int, lease: str | None, seconds: float = 3600) -> tuple[float, list[float]]:
    """All members together until nothing is left or the time is over: messages/s, and in each sixth of the time."""
    context = multiprocessing.get_context("spawn")
    ready, go, results = context.Barrier(members + 1), context.Event(), context.Queue()
    arguments = (dsn, batch, lease, seconds, ready, go, results)
    processes = [context.Process(target=_member, args=arguments) for _ in range(members)]
    for process in processes:
        process.start()
    ready.wait()
    started = time.monotonic()
    go.set()
    reads = [read for _ in processes for read in results.get()]
    for process in processes:
        process.join()
    elapsed = max(at for at, _ in reads) - started
    sixth = elapsed / 6
    sixths = [sum(n for at, n in reads if i * sixth < at - started <= (i + 1) * sixth) / sixth for i in range(6)]
    return sum(n for _, n in reads) / elapsed, sixths


def _member(
    dsn: str,
    batch: int,
    lease: str | None,
    seconds: float,
    ready: Any,
    go: multiprocessing.synchronize.Event,
    results: Any,
) -> None:
    with psycopg.connect(dsn, autocommit=True) as session:
        connection = session.pgconn
        for name, statement in ((b"read", READ), (b"commit", COMMIT)):
            connection.prepare(name, statement.encode())
        size, term = str(batch).encode(), None if lease is None else lease.encode()
        reads: list[tuple[float, int]] = []
        ready.wait()
        go.wait()
        deadline = time.monotonic() + seconds
        empty = 0
        while empty < 3 and time.monotonic() < deadline:
            if lease is None:
                connection.exec_(b"begin")
            arguments: list[Any] = [size, term]
            rows = connection.exec_prepared(b"read", arguments)
            if rows.ntuples:
                last = rows.ntuples - 1
                arguments = [rows.get_value(last, column) for column in (1, 2, 0)]
                connection.exec_prepared(b"commit", arguments)
            if lease is None:
                connection.exec_(b"commit")
            empty = 0 if rows.ntuples else empty + 1
            reads.append((time.monotonic(), rows.ntuples))
        results.put(reads)


def copied(session: psycopg.Connection[Any], messages: int) -> float:
    """Messages/s of COPY, read over libpq and thrown away."""
    started = time.perf_counter()
    with session.cursor() as cursor, cursor.copy(COPY) as copy:
        for _ in copy:
            pass
    return messages / (time.perf_counter() - started)
