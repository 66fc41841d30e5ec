"""Measure how fast the members of a group read a stream, and compare that with COPY of the same rows in order.

Members call read_stream() and commit_offset() over libpq. Either both calls are in one transaction, as of a reader that
writes its results into the same database, or the member holds a lease. The log is like one that the bridge wrote, with
16 partitions.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import time
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import fan_out
from benchmarks.claims import DATA, snapshot
from benchmarks.common import database, median, workspace
from benchmarks.common import fill as fill_table
from cdcbridge.bridge.pacing import BATCH_ROWS
from cdcbridge.config import Consumer
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.store.consumers import apply
from cdcbridge.store.log import BridgeStore

PARTITIONS = 16
READ = "select receipt, partition, seq, topic, key, data from cdcbridge.read_stream('g0', $1, $2::interval)"
COMMIT = "select cdcbridge.commit_offset('g0', $1, $2, $3)"
COPY = "copy (select seq, partition, topic, key, data from cdcbridge.messages order by seq) to stdout"


def fill(session: psycopg.Connection[Any], dsn: str, messages: int, groups: int = 1) -> None:
    """Create a log, and groups that begin at its first message."""
    store = BridgeStore(dsn, "cdcbridge")
    store.migrate()
    apply(
        store.connection,
        [Consumer(name=f"g{n}", mode="stream", tables=("*.*",), start="earliest") for n in range(groups)],
    )
    store.close()
    session.execute("set search_path = cdcbridge, cdcbridge_internal")
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
    """Let all members read at the same time, until no message is left or the time is over.

    Returns:
        The messages/s in total, and in each sixth of the time.
    """
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
    """Return the messages/s of COPY. Its output is read over libpq and discarded."""
    started = time.perf_counter()
    with session.cursor() as cursor, cursor.copy(COPY) as copy:
        for _ in copy:
            pass
    return messages / (time.perf_counter() - started)


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Compare reading with COPY, and measure reading under an old snapshot.

    Then measure the cost of groups for the bridge, and the cost of the gap guard for publishers.
    """
    results = _reading(server, 100_000 if quick else 1_000_000, 1 if quick else 3)
    results += _held(server, 5 if quick else 60)
    results += _groups(server, 50_000 if quick else 500_000, 1 if quick else 3)
    return results + _guard(server, 1 if quick else 5)


def _reading(server: EmbeddedServer, messages: int, rounds: int) -> list[dict[str, Any]]:
    print(f"{messages:,} messages, {PARTITIONS} partitions; messages/s, medians of {rounds}\n")
    print("| batch | held by | members | COPY | read | ratio |\n|---|---|---|---|---|---|", flush=True)
    results = []
    with database(server, "streams") as session:
        dsn = server.dsn("streams")
        fill(session, dsn, messages)
        for batch, lease, members in (
            (5000, None, 1), (5000, None, 4), (1000, None, 1), (1000, None, 4), (1000, "30 s", 1), (100, None, 1),
        ):  # fmt: skip
            pairs = []
            for _ in range(rounds):
                session.execute("select seek('g0', 'earliest')")
                pairs.append((copied(session, messages), drain(dsn, members, batch, lease)[0]))
            ceiling, ours = (median(column) for column in zip(*pairs, strict=True))
            ratio = median([own / limit for limit, own in pairs])
            held = "transaction" if lease is None else "lease"
            print(f"| {batch} | {held} | {members} | {ceiling:,.0f} | {ours:,.0f} | {ratio:.2f} |", flush=True)
            results.append({"batch": batch, "lease": lease, "members": members, "pairs": pairs})
    return results


def _held(server: EmbeddedServer, seconds: int) -> list[dict[str, Any]]:
    """Measure batches of 100 with 2 members while an old snapshot is held open.

    Every commit leaves a dead row of `offsets`, which the snapshot keeps from being removed.
    """
    print(f"\nAn old snapshot is held open for {seconds} s, batches of 100, 2 members; messages/s\n")
    print("| fresh | first sixth | last sixth | last/fresh |\n|---|---|---|---|", flush=True)
    with database(server, "streams") as session:
        dsn = server.dsn("streams")
        fill(session, dsn, 120_000 * seconds)
        fresh = drain(dsn, 2, 100, None, seconds / 6)[0]
        with snapshot(dsn):
            sixths = drain(dsn, 2, 100, None, seconds)[1]
    print(f"| {fresh:,.0f} | {sixths[0]:,.0f} | {sixths[-1]:,.0f} | {sixths[-1] / fresh:.2f} |", flush=True)
    return [{"held": seconds, "fresh": fresh, "sixths": sixths}]


def _groups(server: EmbeddedServer, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Measure the bridge's rate into one queue consumer, alone and together with 20 groups.

    With groups, there is one more index on the log, and the bridge sorts the rows of a batch by partition.
    """
    print(f"\n{rows:,} changes through the bridge (pgoutput) to one queue consumer; changes/s\n")
    print("| without groups | with 20 groups | ratio |\n|---|---|---|", flush=True)
    with workspace() as folder, database(server, "streams") as session:
        session.execute("create publication cdcbridge for table t with (publish_via_partition_root = true)")
        session.execute("select pg_create_logical_replication_slot('origin', 'pgoutput')")
        target = fill_table(session, rows, 50)
        pairs = [
            tuple(
                fan_out.run_bridge(server, session, "pgoutput", 1, target, Path(folder), groups=groups).streaming
                for groups in (0, 20)
            )
            for _ in range(rounds)
        ]
    alone, beside = (median(column) for column in zip(*pairs, strict=True))
    ratio = median([b / a for a, b in pairs])
    print(f"| {alone:,.0f} | {beside:,.0f} | {ratio:.2f} |", flush=True)
    return [{"groups": 20, "pairs": pairs}]


def _guard(server: EmbeddedServer, seconds: int) -> list[dict[str, Any]]:
    """Measure transactions that insert a row with a number from a sequence.

    Compare them without and with register_sequence_transaction(), which is the gap guard.
    """
    print(f"\n4 sessions inserting a row a transaction for {seconds} s, durable; transactions/s, medians of 3\n")
    print("| without the guard | with it | ratio |\n|---|---|---|", flush=True)
    with database(server, "streams") as session:
        dsn = server.dsn("streams")
        store = BridgeStore(dsn, "cdcbridge")
        store.migrate()
        store.close()
        session.execute("create sequence own cache 1; create table outbox (seq bigint primary key, data json)")
        insert = f"insert into outbox select nextval('own'), {DATA} from generate_series(1, 1) g"
        guarded = f"begin; select cdcbridge.register_sequence_transaction('own'); {insert}; commit"
        pairs = [
            (_transactions(dsn, f"begin; select 1; {insert}; commit", seconds), _transactions(dsn, guarded, seconds))
            for _ in range(3)
        ]
    plain, ours = (median(column) for column in zip(*pairs, strict=True))
    ratio = median([b / a for a, b in pairs])
    print(f"| {plain:,.0f} | {ours:,.0f} | {ratio:.2f} |", flush=True)
    return [{"guard": pairs}]


def _transactions(dsn: str, text: str, seconds: float) -> float:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_publisher, args=(dsn, text, seconds, results)) for _ in range(4)]
    for process in processes:
        process.start()
    done = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return float(done / seconds)


def _publisher(dsn: str, text: str, seconds: float, results: Any) -> None:
    with psycopg.connect(dsn, autocommit=True) as session:
        deadline, done = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            session.pgconn.exec_(text.encode())
            done += 1
        results.put(done)
