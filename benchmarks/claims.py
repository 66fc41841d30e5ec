"""Measure claim and ack in messages/s, by batch, receivers and mode, and compare them with a plain queue table.

The plain design has a row per consumer and message, as most queue tables have. A claim is an index scan with FOR UPDATE
SKIP LOCKED, and an UPDATE that hides the row under a new token. An ack is a DELETE, if the token is still the same.

Both designs are called by the same loop over libpq. The loop receives the same columns and reads only the receipts. A
claim and its ack are two transactions. The pipeline mode of libpq sends an ack together with the next claim, so
that the pair needs one round trip. cdcbridge claims with synchronous_commit off, as its client does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg

from benchmarks.common import database, median
from cdcbridge.config import Consumer
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.routing.copy_format import CHUNK_SIZE
from cdcbridge.store.consumers import apply
from cdcbridge.store.log import BridgeStore

DATA = """json_build_object('op', 'insert', 'record', json_build_object('id', g, 'note', repeat('x', 200)),
                           'old', null, 'unchanged', '[]'::json)"""
CLAIM = {
    "cdcbridge": """
        select {columns}
        from cdcbridge.receive('c', $1, durable => false)
    """,
    "plain": """
        with picked as materialized (
            select seq from plain where consumer_id = 1 and visible_at <= (select clock_timestamp())
            order by seq limit $1 for update skip locked
        ), hidden as (
            update plain p set visible_at = clock_timestamp() + interval '30 s', deliver_count = deliver_count + 1,
                               last_delivered_at = clock_timestamp(), token = nextval('plain_tokens')
            from picked where p.consumer_id = 1 and p.seq = picked.seq returning p.*)
        select {columns}
        from (select h.seq || '-' || h.token as receipt, h.seq, h.deliver_count, l.topic, l.key, l.data
              from hidden h join plain_log l using (seq) order by h.seq) r
    """,
}
ACK = {
    "cdcbridge": "select cdcbridge.ack('c', $1)",
    "plain": """
        delete from plain p
        using (select split_part(r, '-', 1)::bigint as seq, split_part(r, '-', 2)::bigint as token
               from unnest($1::text[]) r) r
        where p.consumer_id = 1 and p.seq = r.seq and p.token = r.token
    """,
}


COLUMNS = "receipt, seq, deliver_count, topic, key, data"


class Loop(NamedTuple):
    """The statements that claim and ack messages.

    Attributes:
        claim: $1 is the number of messages.
        ack: $1 is the array of the first columns of the claimed rows.
        batch: The number of messages per claim.
    """

    claim: str
    ack: str
    batch: int


class Case(NamedTuple):
    """One measurement: the design, the batch and the receivers, and for cdcbridge the mode and the number of keys."""

    design: str
    mode: str
    keys: int
    batch: int
    receivers: int

    def loop(self, columns: str = COLUMNS) -> Loop:
        return Loop(CLAIM[self.design].format(columns=columns), ACK[self.design], self.batch)


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Measure batches of 1, 10 and 100 with 1, 2 and 4 receivers, in the modes queue and fifo, and print the tables.

    Then measure while an old snapshot is held open, and with many waiting messages.
    """
    messages = 20_000 if quick else 200_000
    rounds = 1 if quick else 3
    results: list[dict[str, Any]] = []
    print(f"{messages} messages (batches of 1: a twentieth; of 10: a quarter), medians of {rounds}; messages/s\n")
    print(
        "| batch | receivers | plain | queue | ratio | fifo, 1,000 keys | fifo, 100,000 keys | fifo/queue | WAL B/message |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for batch in (100, 10, 1):
        for receivers in (1, 2, 4):
            cases = [
                Case("plain", "", 0, batch, receivers),
                Case("cdcbridge", "queue", 100_000, batch, receivers),
                Case("cdcbridge", "fifo", 1_000, batch, receivers),
                Case("cdcbridge", "fifo", 100_000, batch, receivers),
            ]
            found = _alternating(server, cases, messages // {1: 20, 10: 4, 100: 1}[batch], rounds)
            rates = [median([run["rate"] for run in runs]) for runs in found]
            wal = median([run["wal"] for run in found[1]])
            print(
                f"| {batch} | {receivers} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[1] / rates[0]:.2f} | {rates[2]:,.0f}"
                f" | {rates[3]:,.0f} | {min(rates[2:]) / rates[1]:.2f} | {wal:.0f} |",
                flush=True,
            )
            results += [{**case._asdict(), "runs": runs} for case, runs in zip(cases, found, strict=True)]
    results += _held(server, seconds=10 if quick else 60)
    results += _deep(server, deep=200_000 if quick else 10_000_000)
    return results


def _alternating(
    server: EmbeddedServer, cases: Sequence[Case], messages: int, rounds: int
) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, runs in zip(cases, found, strict=True):
            with database(server, "claims") as session:
                fill(session, server.dsn("claims"), case, messages)
                runs.append(drain(session, server.dsn("claims"), case.loop(), case.receivers))
    return found


def _held(server: EmbeddedServer, seconds: int) -> list[dict[str, Any]]:
    """Measure batches of 100 with 2 receivers while an old snapshot is held open.

    The rate in the last sixth of that time is compared with the rate without a snapshot.
    """
    print(f"\nAn old snapshot is held open for {seconds} s; messages/s in the first and in the last sixth of it\n")
    print("| design | fresh | first | last | last/fresh |\n|---|---|---|---|---|", flush=True)
    results = []
    for design in ("plain", "cdcbridge"):
        case = Case(design, "queue", 100_000, 100, 2)
        messages = 1_500_000 if design == "plain" else 170_000 * seconds
        with database(server, "claims") as session:
            fill(session, server.dsn("claims"), case, 200_000)
            fresh = drain(session, server.dsn("claims"), case.loop(), 2)["rate"]
        with database(server, "claims") as session:
            fill(session, server.dsn("claims"), case, messages)
            with snapshot(server.dsn("claims")):
                run = drain(session, server.dsn("claims"), case.loop(), 2, seconds)
        first, last = run["sixths"][0], run["sixths"][-1]
        print(f"| {design} | {fresh:,.0f} | {first:,.0f} | {last:,.0f} | {last / fresh:.2f} |", flush=True)
        results.append({"held": design, "fresh": fresh, **run})
    return results


def _deep(server: EmbeddedServer, deep: int) -> list[dict[str, Any]]:
    """Measure the rate with few and with many waiting messages, which should make no difference."""
    print("\n| mode | 10,000 waiting |", f"{deep:,} waiting | ratio |\n|---|---|---|---|", flush=True)
    results = []
    for mode in ("queue", "fifo"):
        case = Case("cdcbridge", mode, 100_000, 100, 2)
        shallow = median([runs["rate"] for runs in _alternating(server, [case], 10_000, 5)[0]])
        with database(server, "claims") as session:
            fill(session, server.dsn("claims"), case, deep)
            run = drain(session, server.dsn("claims"), case.loop(), 2, seconds=3)
        print(f"| {mode} | {shallow:,.0f} | {run['rate']:,.0f} | {run['rate'] / shallow:.2f} |", flush=True)
        results.append({"deep": deep, "mode": mode, "shallow": shallow, **run})
    return results


def fill(session: psycopg.Connection[Any], dsn: str, case: Case, messages: int) -> None:
    """Fill the tables of a design with waiting messages.

    For cdcbridge they are as after large appends of the bridge, with CHUNK_SIZE messages in each fan-out row. The plain
    design has a row per message.
    """
    if case.design == "plain":
        session.execute(
            f"""create table plain_log (seq bigint primary key, topic text, key text, data json);
                create sequence plain_tokens cache 100;
                create table plain (consumer_id int, seq bigint, deliver_count int not null default 0, token bigint,
                                    visible_at timestamptz not null default '-infinity',
                                    last_delivered_at timestamptz, primary key (consumer_id, seq));
                insert into plain_log select g, 'public.t', (g % 1000)::text, {DATA} from generate_series(1, {messages}) g;
                insert into plain (consumer_id, seq) select 1, seq from plain_log""".encode()
        )
    else:
        store = BridgeStore(dsn, "cdcbridge")
        store.migrate()
        apply(store.connection, [Consumer(name="c", tables=("public.t",), mode=case.mode, max_in_flight=10_000)])  # type: ignore[arg-type]
        store.close()
        session.execute("set search_path = cdcbridge, cdcbridge_internal")
        for start in range(0, messages, 1_000_000):
            session.execute(f"select setval('messages_seq', {min(messages, start + 1_000_000)})".encode())
            session.execute("select create_segments()")
        keys = "array_agg(key order by seq)" if case.mode == "fifo" else "null"
        session.execute(
            f"""insert into messages (seq, topic, key, partition, data)
                select g, 'public.t', ((g::bigint * 7919) % {case.keys})::text, 1, {DATA} from generate_series(1, {messages}) g;
                insert into waiting (consumer_id, ord, seqs, keys)
                select 1, min(seq), array_agg(seq order by seq), {keys} from messages group by (seq - 1) / {CHUNK_SIZE}""".encode()
        )
    session.execute("checkpoint")


@contextmanager
def snapshot(dsn: str) -> Iterator[None]:
    """Hold a snapshot: a repeatable read transaction that is open as long as the `with` block runs."""
    with psycopg.connect(dsn) as old:
        old.execute("set transaction isolation level repeatable read")
        old.execute("select pg_current_xact_id()")
        yield


def drain(
    session: psycopg.Connection[Any], dsn: str, loop: Loop, receivers: int, seconds: float = 3600
) -> dict[str, Any]:
    """Let all receivers claim and ack at the same time, until the queue is empty or the time is over.

    Returns:
        The messages/s in total and in each sixth of the time, the bytes of WAL per message, and the number of messages.
    """
    context = multiprocessing.get_context("spawn")
    ready, go = context.Barrier(receivers + 1), context.Event()
    results = context.Queue()
    arguments = (dsn, loop, seconds, ready, go, results)
    processes = [context.Process(target=_receiver, args=arguments) for _ in range(receivers)]
    for process in processes:
        process.start()
    ready.wait()
    start_lsn = _wal(session)
    started = time.monotonic()
    go.set()
    acked = [batch for _ in processes for batch in results.get()]
    for process in processes:
        process.join()
    wal = _wal(session) - start_lsn
    elapsed = max(at for at, _ in acked) - started
    total = sum(count for _, count in acked)
    sixth = elapsed / 6
    sixths = [
        sum(count for at, count in acked if n * sixth < at - started <= (n + 1) * sixth) / sixth for n in range(6)
    ]
    return {"rate": total / elapsed, "wal": wal / total, "messages": total, "sixths": sixths}


def _wal(session: psycopg.Connection[Any]) -> int:
    row = session.execute("select pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
    return int(row[0]) if row else 0


def _receiver(
    dsn: str, loop: Loop, seconds: float, ready: Any, go: multiprocessing.synchronize.Event, results: Any
) -> None:
    """Claim and ack as one receiver. Put the (moment, number of messages) of each batch into `results`."""
    with psycopg.connect(dsn, autocommit=True) as session:
        connection = session.pgconn
        for name, statement in ((b"claim", loop.claim), (b"ack", loop.ack)):
            connection.prepare(name, statement.encode())
        acked: list[tuple[float, int]] = []
        size = str(loop.batch).encode()
        ready.wait()
        go.wait()
        deadline = time.monotonic() + seconds
        # An ack and the next claim are sent together, each as its own transaction. Both together need one round trip.
        connection.enter_pipeline_mode()
        _send(connection, b"claim", size)
        empty = 0
        while empty < 3 and time.monotonic() < deadline:
            claimed = _result(connection)
            receipts = [claimed.get_value(row, 0) or b"" for row in range(claimed.ntuples)]
            if receipts:
                _send(connection, b"ack", b"{" + b",".join(receipts) + b"}")
            _send(connection, b"claim", size)
            if receipts:
                _result(connection)
                acked.append((time.monotonic(), len(receipts)))
            empty = 0 if receipts else empty + 1
        _result(connection)
        connection.exit_pipeline_mode()
        results.put(acked)


def _send(connection: psycopg.pq.abc.PGconn, name: bytes, value: bytes) -> None:
    """Send a prepared statement as its own transaction."""
    connection.send_query_prepared(name, [value])
    connection.pipeline_sync()


def _result(connection: psycopg.pq.abc.PGconn) -> psycopg.pq.abc.PGresult:
    """Return the result of the next statement. The end of that result and its synchronization are read as well."""
    result = connection.get_result()
    assert result is not None
    if result.status != psycopg.pq.ExecStatus.TUPLES_OK and result.status != psycopg.pq.ExecStatus.COMMAND_OK:
        raise RuntimeError(result.error_message.decode())
    while (after := connection.get_result()) is None or after.status != psycopg.pq.ExecStatus.PIPELINE_SYNC:
        pass
    return result
