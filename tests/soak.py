"""Receivers that are killed, roll back, dawdle and give back, beside writers and a bridge that is killed: `make soak`.

In the end every message of the log is acked exactly once (the ledger's primary key would refuse a second time) or dead,
the order of each key is kept, and the queue's tables have not grown. Prints its seed.
"""

from __future__ import annotations

import argparse
import contextlib
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

from cdcbridge.embedded import EmbeddedServer
from tests.world import World, eventually, fresh_database

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
CONSUMERS = ("q", "f")
SETUP = """
    create table t (id int primary key, n int not null default 0);
    insert into t select generate_series(1, 300);
    create table ledger (consumer text, seq bigint, key text, id bigserial, primary key (consumer, seq));
"""
SIZES = """
    select c.relname, pg_total_relation_size(c.oid) from pg_class c
    where c.relnamespace = 'cdcbridge'::regnamespace and c.relkind = 'r'
      and c.relname ~ '^(leases|settled|delayed|hints|waiting_[0-9]+)$'
"""


def receive(dsn: str, consumer: str, seed: int) -> None:
    """A receiver, until it is killed: most of what it takes it acks together with its effect, a line in the ledger."""
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as session:
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
    """A writer, until it is killed: updates, published messages, now and then a truncate."""
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as session:
        while True:
            # Other writers may have locked the same rows in another order, or truncate as well.
            with contextlib.suppress(psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation):
                _write(session, chance)
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
        self._context = multiprocessing.get_context("spawn")
        self._chance = chance
        self._running: list[tuple[Any, Callable[..., None], tuple[Any, ...]]] = []

    def start(self, target: Callable[..., None], *arguments: Any) -> None:
        process = self._context.Process(target=target, args=(*arguments, self._chance.randrange(1 << 30)), daemon=True)
        process.start()
        self._running.append((process, target, arguments))

    def kill_one(self) -> None:
        process, target, arguments = self._running.pop(self._chance.randrange(len(self._running)))
        assert process.is_alive(), f"{target.__name__} ended by itself with {process.exitcode}"
        process.kill()
        process.join()
        self.start(target, *arguments)

    def stop(self) -> None:
        for process, target, _ in self._running:
            assert process.is_alive(), f"{target.__name__} ended by itself with {process.exitcode}"
            process.kill()
            process.join()


def soak(server: EmbeddedServer, folder: Path, seconds: float, seed: int) -> None:
    """All of it."""
    chance = random.Random(seed)
    with fresh_database(server) as database:
        world = World(server, database, "wal2json", folder)
        world.execute(SETUP)
        for name, mode in zip(CONSUMERS, ("queue", "fifo"), strict=True):
            world.consumer(name, ("public.t",), topics=["events"], mode=mode, max_deliveries=30, max_in_flight=300)
        bridge = world.start_process()
        eventually(world.active, "the bridge streams")
        receivers, writers = Processes(chance), Processes(chance)
        for number in range(6):
            receivers.start(receive, world.dsn, CONSUMERS[number % 2])
        for _ in range(2):
            writers.start(write, world.dsn, 15.0)
        early: dict[str, int] = {}
        end = time.monotonic() + seconds
        next_bridge = time.monotonic() + 5
        while time.monotonic() < end:
            threading.Event().wait(chance.uniform(0.2, 1))
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
        eventually(lambda: world.rows(f"{done}")[0][0] and not _behind(world), "all is acked or dead", 120)
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


def _compare(world: World) -> None:
    """The ledger with the log and the dead letters."""
    for consumer in CONSUMERS:
        (total, acked, dead), = world.rows(
            """select (select count(*) from messages where topic in ('public.t', 'events')),
                      (select count(*) from public.ledger where consumer = %s),
                      (select count(*) from dead_messages d join consumers c on c.id = d.consumer_id where c.name = %s)""",
            consumer, consumer,
        )  # fmt: skip
        print(f"{consumer}: {total:,} messages, {acked:,} acked once, {dead:,} dead")
        assert total == acked + dead > 100
        lost = """select m.seq from messages m
                  where not exists (select from public.ledger l where l.consumer = %s and l.seq = m.seq)
                    and not exists (select from dead_messages d join consumers c on c.id = d.consumer_id
                                    where c.name = %s and d.seq = m.seq)"""
        assert world.rows(lost, consumer, consumer) == []
    overtaken = """select * from (select key, seq, lag(seq) over (partition by key order by id) as before
                                  from public.ledger where consumer = 'f' and key is not null) o where seq < before"""
    found = world.rows(overtaken)
    assert not found, f"the order of a key (key, seq, seq acked before it): {found[:10]}"


def main(program: str, run: Callable[[EmbeddedServer, Path, float, int], None]) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.seconds:.0f} s", flush=True)
    with EmbeddedServer(DEBIAN_15) as server, tempfile.TemporaryDirectory() as folder:
        run(server, Path(folder), options.seconds, options.seed)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main("python -m tests.soak", soak))
