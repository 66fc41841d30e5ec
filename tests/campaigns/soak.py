"""Receivers that are killed, roll back, dawdle and give back, workers whose handlers misbehave in every way, writers, and a
bridge that is killed, on a database whose default isolation level is serializable: `make soak`.

In the end every message of the log was handled or is dead. A strict ack happens exactly once (the ledger's primary key would
refuse a second time), and not to a dead one. The order of each key is kept, and the queue's tables have not grown. Prints its seed. `--without NAME` switches
one way of a handler's end off: see misbehaving.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.misbehaving import LEASE, MISBEHAVIOURS, handle
from tests.harness.world import World, eventually, fresh_database

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
CONSUMERS = ("q", "f")
SETUP = """
    create table t (id int primary key, n int not null default 0);
    insert into t select generate_series(1, 300);
    create sequence line;  -- of both tables, so that their lines have one order
    create table ledger (consumer text, seq bigint, key text, id bigint default nextval('line'), primary key (consumer, seq));
    create table handled (consumer text, seq bigint, key text, id bigint default nextval('line'));
    create index on handled (consumer, seq);
"""
SIZES = """
    select c.relname, pg_total_relation_size(c.oid) from pg_class c
    where c.relnamespace in ('cdcbridge'::regnamespace, 'cdcbridge_internal'::regnamespace) and c.relkind = 'r'
      and c.relname ~ '^(leases|settled|delayed|hints|waiting_[0-9]+)$'
"""


def receive(dsn: str, consumer: str, seed: int) -> None:
    """A receiver, until it is killed: most of what it takes it acks together with its effect, a line in the ledger."""
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute("set default_transaction_isolation = 'read committed'")  # receive() refuses the database's
        while True:
            with session.transaction(force_rollback=chance.random() < 0.02):
                rows = session.execute(
                    "select receipt, seq, key from cdcbridge.receive(%s, %s, make_interval(secs => %s))",
                    (consumer, chance.choice((1, 3, 10, 50)), chance.uniform(0.5, 3)),
                ).fetchall()
            try:
                _settle(session, consumer, rows, chance)
            except psycopg.Error as error:
                if error.sqlstate != "CB006":
                    raise
            if not rows:
                time.sleep(0.05)


def _settle(session: psycopg.Connection[Any], consumer: str, rows: list[Any], chance: random.Random) -> None:
    """One of the things that receivers do. Raises CB006 where it was too late."""
    receipts = [row[0] for row in rows]
    what = chance.random()
    if what < 0.02:
        return  # as if it had died
    if what < 0.05:
        session.execute("select cdcbridge.nack(%s, %s, make_interval(secs => %s))",
                        (consumer, receipts, chance.uniform(0, 0.5)))  # fmt: skip
        return
    if what < 0.07:
        time.sleep(chance.uniform(0, 3))
    elif what < 0.1:
        session.execute("select cdcbridge.extend(%s, %s, '2 s')", (consumer, receipts))
    for part in [[row] for row in rows] if what > 0.9 else [rows]:
        with session.transaction():
            # First, since a stale one may stand in the ledger already.
            session.execute("select cdcbridge.ack(%s, %s, true)", (consumer, [row[0] for row in part]))
            session.cursor().executemany(
                "insert into ledger (consumer, seq, key) values (%s, %s, %s)", [(consumer, *row[1:]) for row in part]
            )


def write(dsn: str, rate: float, seed: int) -> None:
    """A writer, until it is killed: updates, published messages, now and then a truncate.

    Half of its transactions are serializable, as the database says. A publish() may be refused there (CB005).
    """
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as session:
        while True:
            session.isolation_level = chance.choice((None, psycopg.IsolationLevel.READ_COMMITTED))
            try:
                _write(session, chance)
            except psycopg.Error as error:
                # Other writers may have locked the same rows in another order, or truncate as well.
                if error.sqlstate not in ("40001", "40P01", "23505", "CB005"):
                    raise
            time.sleep(chance.expovariate(rate))


def _write(session: psycopg.Connection[Any], chance: random.Random) -> None:
    with session.transaction(force_rollback=chance.random() < 0.05):
        for _ in range(chance.choice((1, 1, 5, 40))):
            session.execute("update t set n = n + 1 where id = %s", (chance.randint(1, 300),))
        for _ in range(chance.choice((0, 1, 10))):
            session.execute("select cdcbridge.publish('events', %s, '{}')", (f"k{chance.randint(1, 40)}",))
    if chance.random() < 0.002:
        session.execute("truncate t; insert into t select generate_series(1, 300)")


class Processes:
    """Receivers and writers, some of them killed and made anew again and again."""

    def __init__(self, chance: random.Random) -> None:
        self._context = multiprocessing.get_context("fork")  # a spawned one takes seconds until it has imported all
        self._chance = chance
        self._running: list[tuple[Any, Callable[..., None], tuple[Any, ...]]] = []

    def start(self, target: Callable[..., None], *arguments: Any) -> None:
        process = self._context.Process(target=target, args=(*arguments, self._chance.randrange(1 << 30)), daemon=True)
        process.start()
        self._running.append((process, target, arguments))

    def kill_one(self) -> None:
        self._again(self._chance.randrange(len(self._running)))

    def restart_ended(self) -> None:
        """Start those anew that have ended by themselves, as a supervisor does."""
        for number in reversed(range(len(self._running))):
            if not self._running[number][0].is_alive():
                self._again(number)

    def _again(self, number: int) -> None:
        process, target, arguments = self._running.pop(number)
        self._end(process, target)
        self.start(target, *arguments)

    def stop(self) -> None:
        for process, target, _ in self._running:
            self._end(process, target)

    def _end(self, process: Any, target: Callable[..., None]) -> None:
        assert process.is_alive() or target is handle, f"{target.__name__} ended by itself with {process.exitcode}"
        process.kill()
        process.join()


def soak(
    server: EmbeddedServer, folder: Path, seconds: float, seed: int, misbehaviours: tuple[str, ...] = MISBEHAVIOURS
) -> None:
    """All of it."""
    chance = random.Random(seed)
    with fresh_database(server) as database:
        plugin = "wal2json" if server.binaries == DEBIAN_15 else "pgoutput"
        world = World(server, database, plugin, folder)
        world.execute(*SETUP.split(";")[:-1])
        world.execute(f"alter database {database} set default_transaction_isolation = 'serializable'")
        for name, mode in zip(CONSUMERS, ("queue", "fifo"), strict=True):
            world.consumer(name, ("public.t",), topics=["events"], mode=mode, max_deliveries=30, max_in_flight=300,
                           visibility_timeout=f"{LEASE}s", retry_delay={"initial": "50ms", "max": "1s"})  # fmt: skip
        bridge = world.start_process()
        eventually(world.active, "the bridge streams")
        receivers, writers = Processes(chance), Processes(chance)
        for consumer in CONSUMERS:
            receivers.start(receive, world.dsn, consumer)
            for _ in range(3):
                receivers.start(handle, world.dsn, consumer, misbehaviours)
        for _ in range(2):
            writers.start(write, world.dsn, 15.0)
        early: dict[str, int] = {}
        end = time.monotonic() + seconds
        next_bridge = time.monotonic() + 5
        while time.monotonic() < end:
            threading.Event().wait(chance.uniform(0.2, 1))
            receivers.restart_ended()
            receivers.kill_one()
            if time.monotonic() > next_bridge:
                bridge.kill()
                bridge.wait()
                bridge = world.start_process()
                next_bridge = time.monotonic() + chance.uniform(5, 20)
            if not early and time.monotonic() > end - 0.7 * seconds:
                early = dict(world.rows(SIZES))
        writers.stop()
        done = "select sum(pending + in_flight) = 0 from consumer_lag()"

        def all_is_done() -> bool:
            receivers.restart_ended()
            return bool(world.value(done)) and not _behind(world)

        eventually(all_is_done, "all is acked or dead", 120)
        receivers.stop()
        _compare(world)
        late = dict(world.rows(SIZES))
        grown = {name: (early[name], size) for name, size in late.items() if size > 2 * early[name] + (4 << 20)}
        assert not grown, f"these have grown: {grown}"
        print("bytes of each table at 30 % of the time and in the end:")
        for name, size in sorted(late.items()):
            print(f"  {name:<12} {early[name]:>12,} {size:>12,}")
        world.close()


def _behind(world: World) -> bool:
    """Whether the bridge has commits to come to."""
    slot = world.json("lag", "--json")["slots"][0]
    return not slot["active"] or slot["lag_seconds"] != 0


LINES = (
    """(select consumer, seq, key, id from public.ledger union all select consumer, seq, key, id from public.handled)"""
)
DEAD = "(select c.name as consumer, d.seq from dead_messages d join consumers c on c.id = d.consumer_id)"


def _compare(world: World) -> None:
    """The lines of handlers with the log and the dead letters."""
    for consumer in CONSUMERS:
        (total, acked, handled, dead), = world.rows(
            f"""select (select count(*) from messages where topic in ('public.t', 'events')),
                       (select count(*) from public.ledger where consumer = %s),
                       (select count(distinct seq) from public.handled where consumer = %s),
                       (select count(*) from {DEAD} d where consumer = %s)""",
            consumer, consumer, consumer,
        )  # fmt: skip
        print(f"{consumer}: {total:,} messages, {acked:,} strictly acked once, {handled:,} handled, {dead:,} dead")
        assert acked > 100
        lost = f"""select m.seq from messages m where m.topic in ('public.t', 'events')
                   and not exists (select from {LINES} l where l.consumer = %s and l.seq = m.seq)
                   and not exists (select from {DEAD} d where d.consumer = %s and d.seq = m.seq)"""
        assert world.rows(lost, consumer, consumer) == [], "nobody handled these, and they are gone"
        both = f"select d.seq from {DEAD} d join public.ledger l using (consumer, seq) where consumer = %s"
        assert world.rows(both, consumer) == [], "strictly acked, and dead"
    # A message may be handled again, but each key's messages were handled for the first time in their order.
    overtaken = f"""
        select * from (select key, seq, lag(seq) over (partition by key order by first) as before
                       from (select key, seq, min(id) as first from {LINES} l
                             where consumer = 'f' and key is not null group by key, seq) f) o where seq < before"""
    found = world.rows(overtaken)
    assert not found, f"the order of a key (key, seq, seq handled before it): {found[:10]}"


def main(program: str, run: Callable[..., None], switches: tuple[str, ...] = ()) -> int:
    """From the command line. `switches`: names that can be switched off one by one; the others are given to `run`."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    if switches:
        parser.add_argument("--without", action="append", default=[], choices=switches)
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.seconds:.0f} s", flush=True)
    kept = [tuple(name for name in switches if name not in options.without)] if switches else []
    with EmbeddedServer(DEBIAN_15) as server, tempfile.TemporaryDirectory() as folder:
        run(server, Path(folder), options.seconds, options.seed, *kept)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main("python -m tests.campaigns.soak", soak, MISBEHAVIOURS))
