"""Every pair of what sessions do to a queue, done by two sessions each at once: nothing is lost, nothing is acked twice."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.harness.world import World
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts

SECONDS = 0.2
Session = psycopg.Connection[dict[str, Any]]


class Race:
    """A queue, and what has been acked."""

    def __init__(self, queue: StoreQueue, seed: int) -> None:
        self.queue = queue
        self.seed = seed
        self.acked: Counter[int] = Counter()
        self.failed: list[BaseException] = []
        self._lock = threading.Lock()

    def ack(self, session: Session, chance: random.Random) -> None:
        rows = self._receive(session, chance)
        for part in [[row] for row in rows] if chance.random() < 0.3 else [rows]:
            if part and session.execute(
                "select cdcbridge.ack('c', %s) as n", (receipts(part),)
            ).fetchone() == {"n": len(part)}:  # fmt: skip
                with self._lock:
                    self.acked.update(row["seq"] for row in part)

    def nack(self, session: Session, chance: random.Random) -> None:
        rows = receipts(self._receive(session, chance))
        session.execute("select cdcbridge.nack('c', %s, '0')", (chance.sample(rows, (len(rows) + 1) // 2),))
        session.execute("select cdcbridge.nack('c', %s, '0')", (rows,))

    def bury(self, session: Session, chance: random.Random) -> None:
        session.execute("select cdcbridge.nack('c', %s, dead => true)", (receipts(self._receive(session, chance)),))

    def extend(self, session: Session, chance: random.Random) -> None:
        rows = receipts(self._receive(session, chance))
        session.execute("select cdcbridge.extend('c', %s, '1 s')", (rows[:1],))
        session.execute("select cdcbridge.extend('c', %s, '0')", (rows,))

    def expire(self, session: Session, chance: random.Random) -> None:
        self._receive(session, chance, "0")

    def roll_back(self, session: Session, chance: random.Random) -> None:
        with session.transaction(force_rollback=True):
            self._receive(session, chance)

    def redrive(self, session: Session, _: random.Random) -> None:
        session.execute("select cdcbridge.redrive('c')")

    def publish(self, session: Session, chance: random.Random) -> None:
        session.execute("select cdcbridge.publish('t', %s, '{}')", (f"k{chance.randrange(5)}",))

    def keep_house(self, session: Session, _: random.Random) -> None:
        session.execute("select cdcbridge_internal.bury_expired()")
        session.execute("select cdcbridge_internal.merge_runs()")
        session.execute("select cdcbridge_internal.forget_hints()")

    def _receive(self, session: Session, chance: random.Random, timeout: str = "30 s") -> list[dict[str, Any]]:
        query = "select receipt, seq from cdcbridge.receive('c', %s, %s::interval)"
        return session.execute(query.encode(), (chance.choice((1, 2, 7, 40)), timeout)).fetchall()

    def run(self, *operations: Callable[[Session, random.Random], None]) -> None:
        """Two sessions of each, for a moment."""
        end = time.monotonic() + SECONDS

        def work(operation: Callable[[Session, random.Random], None], number: int) -> None:
            chance = random.Random(self.seed + number)
            try:
                with psycopg.connect(self.queue.dsn, autocommit=True, row_factory=psycopg.rows.dict_row) as session:
                    session.execute("set search_path = cdcbridge, cdcbridge_internal, public")
                    while time.monotonic() < end:
                        operation(session, chance)
            except BaseException as error:
                self.failed.append(error)

        threads = [threading.Thread(target=work, args=(o, n)) for n, o in enumerate([*operations, *operations])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def drain(self) -> None:
        """All that is left, dead letters too."""
        for _ in range(1000):
            self.queue.session.execute("select cdcbridge.redrive('c')")
            self.queue.expire()
            self.queue.due()
            rows = self.queue.receive(1000)
            if not rows:
                return
            assert self.queue.ack(*receipts(rows)) == len(rows)
            self.acked.update(row["seq"] for row in rows)
        raise AssertionError("messages are left that cannot be received")


OPERATIONS = ["ack", "nack", "bury", "extend", "expire", "roll_back", "redrive", "publish", "keep_house"]


@pytest.mark.parametrize("mode", ["queue", "fifo"])
@pytest.mark.parametrize("first", OPERATIONS)
def test_every_pair(world18: World, mode: str, first: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    queue = StoreQueue(world18.dsn)
    queue.declare(mode=mode, topics=("t",), max_deliveries=1000, max_in_flight=200)
    race = Race(queue, seed)
    for second in itertools.dropwhile(lambda name: name != first, OPERATIONS):
        queue.append_keys(*(f"k{n % 7}" for n in range(200))) if mode == "fifo" else queue.append(200)
        race.run(getattr(race, first), getattr(race, second))
        assert not race.failed, (second, race.failed)
    race.drain()
    everything = {row["seq"] for row in queue.all("select seq from cdcbridge.messages")}
    assert race.acked == Counter(everything)
    assert queue.all("select * from cdcbridge.consumer_messages") == []
    queue.close()
