"""Compare cdcbridge with other queues in PostgreSQL and with the Debezium engine, in the same run: `make bench-peers`.

Each queue is installed according to its own documentation. One loop calls the SQL functions of all queues and those of
cdcbridge. Each returns the same columns: the value to ack by, the number of deliveries, and the data.

The queues differ in these points:
- PgQ has one consumer at a time and cannot ack a single message. A batch has the messages inserted between two ticks.
- procrastinate fetches one job at a time.
- pgqueuer keeps a log of every step of a job.
- pgmq rewrites the whole message at each read, and PgQ never does.
- The handler of Debezium does nothing and stores nothing. The messages of cdcbridge are durable when the clock stops.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from benchmarks import fan_out
from benchmarks.__main__ import DEBIAN_15, SETTINGS
from benchmarks.claims import DATA, Case, Loop, drain, fill, snapshot
from benchmarks.common import database, median, workspace
from benchmarks.common import fill as fill_table
from cdcbridge.demo.embedded import EmbeddedServer

HERE = Path(__file__).parent
COLUMNS = "receipt, deliver_count, data"  # the columns that every queue can return
PGMQ = ("select msg_id, read_ct, message from pgmq.read('q', 30, $1)", "select pgmq.delete('q', $1::bigint[])")
PGQ = (
    """select b.id, e.ev_retry, e.ev_data from (select pgq.next_batch('q', 'c') as id, $1::int) b
       cross join lateral pgq.get_batch_events(b.id) e""",
    "select pgq.finish_batch(($1::bigint[])[1])",
)
PROCRASTINATE = (
    "select j.id, j.attempts, j.args from procrastinate_fetch_job_v2(null, $1::int) j where j.id is not null",
    "select procrastinate_finish_job_v1(($1::bigint[])[1], 'succeeded', true)",
)


class Packages(NamedTuple):
    """The packages of the other queues, which are installed in a separate Python."""

    python: Path
    folder: Path
    pgqueuer: dict[str, str]

    @classmethod
    def of(cls, python: Path) -> Packages:
        """Find the packages of that Python."""
        folder = _output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        return cls(python, Path(folder), json.loads(_output(python, str(HERE / "pgqueuer_sql.py"))))

    def pgqueuer_loop(self, batch: int) -> Loop:
        """Return pgqueuer's own statements.

        Parameters are replaced by the values that its own program passes, except $1, which changes from call to call.
        """
        dequeue, _, _ = self.pgqueuer["dequeue"].rpartition("SELECT *")
        for number, value in ((2, "array['q']"), (3, "'00000000-0000-0000-0000-000000000001'"), (4, "'30 s'")):
            dequeue = dequeue.replace(f"${number}", value)
        log = self.pgqueuer["log_job"]
        for number, value in ((2, "'successful'::pgqueuer_status"), (3, "null::jsonb")):
            log = log.replace(f"${number}", f"array_fill({value}, array[cardinality($1)])")
        return Loop(f"{dequeue} select id, attempts, payload from claimed order by priority desc, id", log, batch)


class Peer(NamedTuple):
    """A queue, the function that fills it, and the loop that empties it."""

    name: str
    fill: Callable[[psycopg.Connection[Any], str, int], None]
    loop: Loop
    receivers: int


def peers(packages: Packages, batch: int, receivers: int) -> list[Peer]:
    """Return the queues that can deliver batches of this size to this number of receivers."""

    def ours(mode: str) -> Peer:
        case = Case("cdcbridge", mode, 100_000, batch, receivers)
        return Peer(f"cdcbridge, {mode}", lambda s, dsn, n: fill(s, dsn, case, n), case.loop(COLUMNS), receivers)

    def pgmq(session: psycopg.Connection[Any], _: str, messages: int) -> None:
        session.execute((packages.folder / "pgmq" / "sql" / "pgmq.sql").read_bytes())
        session.execute("select pgmq.create('q')")
        for _n in range(messages // 1000):
            query = f"select pgmq.send_batch('q', array_agg({DATA}::jsonb)) from generate_series(1, 1000) g"
            session.execute(query.encode())

    def pgq(session: psycopg.Connection[Any], _: str, messages: int) -> None:
        session.execute("create extension pgq")
        session.execute("select pgq.create_queue('q'), pgq.register_consumer('q', 'c')")
        session.execute("select pgq.set_queue_config('q', 'ticker_max_count', '1')")
        for _n in range(messages // batch):
            query = f"select pgq.insert_event('q', 'insert', {DATA}::text) from generate_series(1, {batch}) g"
            session.execute(query.encode())
            session.execute("select pgq.ticker('q')")

    def procrastinate(session: psycopg.Connection[Any], _: str, messages: int) -> None:
        session.execute((packages.folder / "procrastinate" / "sql" / "schema.sql").read_bytes())
        session.execute("insert into procrastinate_workers default values")
        query = f"""insert into procrastinate_jobs (queue_name, task_name, priority, args)
                    select 'q', 'insert', 0, {DATA}::jsonb from generate_series(1, {messages}) g"""
        session.execute(query.encode())

    def pgqueuer(session: psycopg.Connection[Any], _: str, messages: int) -> None:
        session.execute(packages.pgqueuer["install"].encode())
        query = f"""insert into pgqueuer (priority, entrypoint, payload, status)
                    select 0, 'q', convert_to({DATA}::text, 'utf8'), 'queued' from generate_series(1, {messages}) g"""
        session.execute(query.encode())

    case = Case("plain", "", 0, batch, receivers)
    found = [
        ours("queue"),
        ours("fifo"),
        Peer("plain design", lambda s, dsn, n: fill(s, dsn, case, n), case.loop(COLUMNS), receivers),
        Peer("pgmq", pgmq, Loop(*PGMQ, batch), receivers),
        Peer("pgqueuer", pgqueuer, packages.pgqueuer_loop(batch), receivers),
    ]
    if batch == 1:
        found.append(Peer("procrastinate", procrastinate, Loop(*PROCRASTINATE, 1), receivers))
    else:
        found.append(Peer("PgQ, one consumer", pgq, Loop(*PGQ, batch), 1))
    return found


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--python", type=Path, required=True, help="a Python that has the peers' packages")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    packages = Packages.of(options.python)
    with EmbeddedServer(DEBIAN_15, settings=SETTINGS) as server:
        for batch, messages in ((100, 200_000), (10, 50_000), (1, 10_000)):
            print(
                f"\n{messages:,} messages, batches of {batch}, 2 receivers; messages/s, medians of {options.rounds}\n"
            )
            print("| queue | messages/s | cdcbridge / it | WAL B/message |\n|---|---|---|---|", flush=True)
            _table(server, peers(packages, batch, 2), messages, options.rounds)
        print(
            "\nAn old snapshot is held open, batches of 100, 2 receivers: messages/s in the first and last sixth of 20 s\n"
        )
        print("| queue | first sixth | last sixth | cdcbridge / it |\n|---|---|---|---|", flush=True)
        _held(server, peers(packages, 100, 2), 20)
        debezium(server, packages, 1_000_000, options.rounds)


def _table(server: EmbeddedServer, queues: list[Peer], messages: int, rounds: int) -> None:
    """Measure all queues in turn, several times, and print the medians."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for queue in queues:
            with database(server, "peers") as session:
                queue.fill(session, server.dsn("peers"), messages)
                session.execute("checkpoint")
                found.setdefault(queue.name, []).append(
                    drain(session, server.dsn("peers"), queue.loop, queue.receivers)
                )
    first = median([run["rate"] for run in found[queues[0].name]])
    for name, runs in found.items():
        rate = median([run["rate"] for run in runs])
        print(
            f"| {name} | {rate:,.0f} | {first / rate:.1f} | {median([run['wal'] for run in runs]):,.0f} |", flush=True
        )


def _held(server: EmbeddedServer, queues: list[Peer], seconds: int) -> None:
    """Measure the comparable queues while an old snapshot is held open.

    PgQ is not comparable, because its batches are made when it is filled. pgqueuer and fifo are omitted, too.
    """
    first = 0.0
    for queue in queues:
        if queue.name.startswith(("PgQ", "pgqueuer")) or queue.name.endswith("fifo"):
            continue
        messages = 170_000 * seconds if queue.name.startswith("cdcbridge") else 1_000_000
        with database(server, "peers") as session:
            queue.fill(session, server.dsn("peers"), messages)
            session.execute("checkpoint")
            with snapshot(server.dsn("peers")):
                run = drain(session, server.dsn("peers"), queue.loop, queue.receivers, seconds)
        begin, last = run["sixths"][0], run["sixths"][-1]
        first = first or last
        print(f"| {queue.name} | {begin:,.0f} | {last:,.0f} | {first / last:.1f} |", flush=True)


def debezium(server: EmbeddedServer, packages: Packages, rows: int, rounds: int) -> None:
    """Compare the changes/s of the bridge and of the Debezium engine on the same WAL, by pgoutput and over TCP.

    The time is that from the first change that was handled or appended to the last.
    """
    with workspace() as folder, database(server, "peers") as session:
        session.execute("create publication cdcbridge for table t with (publish_via_partition_root = true)")
        session.execute("select pg_create_logical_replication_slot('origin', 'pgoutput')")
        target = fill_table(session, rows, 50)
        rates: dict[str, list[float]] = {}
        for _ in range(rounds):
            ours = fan_out.run_bridge(server, session, "pgoutput", 1, target, Path(folder))
            rates.setdefault("cdcbridge, 1 consumer, durable", []).append(ours.streaming)
            rates.setdefault("the same with its process's start", []).append(rows / ours.seconds)
            for mark in ("record", "batch"):
                fan_out.copy_slot(session, "debezium")
                place = ("127.0.0.1", str(server.port), session.info.dbname, "debezium", "cdcbridge", str(rows), mark)
                elapsed = float(_output(packages.python, str(HERE / "debezium_engine.py"), *place))
                rates.setdefault(f"Debezium engine, marking each {mark}", []).append(rows / elapsed)
                fan_out.drop_slot(session, "debezium")
    first = next(iter(rates.values()))
    print(
        f"\n{rows:,} changes, medians of {rounds}, the ratios of the pairs\n\n| | changes/s | cdcbridge / it |\n|---|---|---|"
    )
    for name, found in rates.items():
        ratio = median([mine / its for mine, its in zip(first, found, strict=True)])
        print(f"| {name} | {median(found):,.0f} | {ratio:.2f} |", flush=True)


def _output(*command: str | Path) -> str:
    """Return the last line that the command prints."""
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout.strip().rpartition("\n")[2]


if __name__ == "__main__":
    main()
