"""Random writes on both sides of a pair, a ledger of what each write saw, and what must hold when all is quiet.

Each write has a number that no other write has, in the column `v`. The ledger has, for each committed write, the number
that it read under the row's lock before it wrote.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg

SCHEMA = (
    "create table hot (id int primary key, v bigint not null, n int not null default 0, big text)",
    "alter table hot alter big set storage external",
    "create table wide (a int, b text, v bigint not null, primary key (a, b))",
    "create table uniq (id int primary key, code int not null unique, v bigint not null)",
    "create table lines (v bigint)",
    "alter table lines replica identity full",
    "create schema local",
    "create table local.done (tx bigint primary key)",
)
KEYS = {"hot": ("id",), "wide": ("a", "b"), "uniq": ("id",), "lines": ("v",)}
ROWS = (1, 1, 1, 1, 2, 3, 8)


class Entry(NamedTuple):
    """One write: `saw` and `wrote` are numbers. None: there was no row, or the row was deleted."""

    tx: int
    table: str
    saw: int | None
    wrote: int | None


@dataclass
class Ledger:
    """What was written. Transactions whose commit nobody answered count if `local.done` has them."""

    entries: list[Entry] = field(default_factory=list)
    refused: int = 0  # transactions that a server refused, for example after a deadlock
    lock: threading.Lock = field(default_factory=threading.Lock)

    def committed(self, sides: Iterable[psycopg.Connection[Any]]) -> list[Entry]:
        done = {tx for side in sides for (tx,) in side.execute("select tx from local.done").fetchall()}
        return [one for one in self.entries if one.tx in done]


def seed_of(given: int | None = None) -> int:
    """The seed of a run, printed. CDCBRIDGE_TEST_SEED repeats one."""
    seed = given if given is not None else int(os.environ.get("CDCBRIDGE_TEST_SEED") or random.randrange(1 << 32))
    print(f"seed {seed}", flush=True)
    return seed


class Writer(threading.Thread):
    """One session that writes, transaction after transaction. A server that is away is waited for.

    Args:
        number: The number of the writer, which no other one has.
        dsn: Returns the database, as it may be another server after a failover.
        seed: The seed of the run.
        transactions: After how many transactions the writer ends by itself. None: at stop().
        pause: The longest pause between two transactions, in seconds.
        tables: The tables to write to.
        skew: Commits claim times that are wrong by up to so many seconds, forwards and backwards. 0: the server's time.
    """

    def __init__(
        self,
        number: int,
        dsn: Callable[[], str],
        ledger: Ledger,
        seed: int,
        *,
        transactions: int | None = None,
        pause: float = 0.02,
        tables: Sequence[str] = ("hot", "hot", "wide", "uniq", "lines"),
        skew: float = 0.0,
    ) -> None:
        super().__init__(name=f"writer {number}", daemon=True)
        self._dsn, self._ledger, self._tables = dsn, ledger, tables
        self._chance = random.Random(f"{seed} {number}")
        self._numbers = itertools.count(number * 1_000_000_000 + 1)
        self._left, self._pause, self.skew = transactions, pause, skew
        self._ended = threading.Event()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._over():
                with (
                    contextlib.suppress(psycopg.OperationalError),
                    psycopg.connect(self._dsn(), connect_timeout=3, autocommit=True) as session,
                ):
                    self._session(session)
                self._ended.wait(0.1)
        except BaseException as error:
            self.error = error

    def _over(self) -> bool:
        return self._ended.is_set() or self._left == 0

    def _session(self, session: psycopg.Connection[Any]) -> None:
        if self.skew:
            take_origin(session, f"clock of {self.name}")
        while not self._over():
            tx = next(self._numbers)
            entries: list[Entry] = []
            try:
                with session.transaction():
                    session.execute("insert into local.done values (%s)", (tx,))
                    for _ in range(self._chance.choice(ROWS)):
                        self._write(session, tx, entries)
                    if self.skew:
                        pin_time(session, self._chance.uniform(-self.skew, self.skew))
                    with self._ledger.lock:
                        self._ledger.entries += entries
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                self._ledger.refused += 1
            if self._left is not None:
                self._left -= 1
            self._ended.wait(self._chance.uniform(0, self._pause))

    def _write(self, session: psycopg.Connection[Any], tx: int, entries: list[Entry]) -> None:
        table = self._chance.choice(self._tables)
        if table == "wide" and self._chance.random() < 0.004:
            session.execute("lock table wide in access exclusive mode")
            seen = session.execute("select v from wide").fetchall()
            session.execute("truncate wide")
            entries.extend(Entry(tx, table, v, None) for (v,) in seen)
            return
        for saw, wrote in getattr(self, f"_{table}")(session, next(self._numbers)):
            entries.append(Entry(tx, table, saw, wrote))

    def _hot(self, session: psycopg.Connection[Any], v: int) -> list[tuple[int | None, int | None]]:
        key, roll = self._chance.randint(1, 6), self._chance.random()
        big = self._chance.randbytes(1500).hex()
        saw = _one(session, "select v from hot where id = %s for update", key)
        if saw is None:
            session.execute("insert into hot (id, v, big) values (%s, %s, %s)", (key, v, big))
        elif roll < 0.25:
            session.execute("delete from hot where id = %s", (key,))
            return [(saw, None)]
        elif roll < 0.4:
            session.execute("update hot set v = %s, big = %s where id = %s", (v, big, key))
        else:
            session.execute("update hot set v = %s, n = n + 1 where id = %s", (v, key))
        return [(saw, v)]

    def _wide(self, session: psycopg.Connection[Any], v: int) -> list[tuple[int | None, int | None]]:
        a, b, roll = self._chance.randint(1, 8), self._chance.choice("xy"), self._chance.random()
        saw = _one(session, "select v from wide where (a, b) = (%s, %s) for update", a, b)
        if saw is None:
            session.execute("insert into wide values (%s, %s, %s)", (a, b, v))
        elif roll < 0.2:
            session.execute("delete from wide where (a, b) = (%s, %s)", (a, b))
            return [(saw, None)]
        elif roll < 0.4:
            to = self._chance.randint(1, 8)
            free = _one(session, "select v from wide where (a, b) = (%s, %s)", to, b) is None or to == a
            session.execute("update wide set a = %s, v = %s where (a, b) = (%s, %s)", (to if free else a, v, a, b))
        else:
            session.execute("update wide set v = %s where (a, b) = (%s, %s)", (v, a, b))
        return [(saw, v)]

    def _uniq(self, session: psycopg.Connection[Any], v: int) -> list[tuple[int | None, int | None]]:
        key, code, roll = self._chance.randint(1, 12), self._chance.randint(1, 40), self._chance.random()
        saw = _one(session, "select v from uniq where id = %s for update", key)
        taken = _one(session, "select v from uniq where code = %s and id <> %s", code, key)
        if saw is None:
            if taken is not None:
                return []
            session.execute("insert into uniq values (%s, %s, %s)", (key, code, v))
        elif roll < 0.2:
            session.execute("delete from uniq where id = %s", (key,))
            return [(saw, None)]
        elif roll < 0.5 and taken is None:
            session.execute("update uniq set v = %s, code = %s where id = %s", (v, code, key))
        else:
            session.execute("update uniq set v = %s where id = %s", (v, key))
        return [(saw, v)]

    def _lines(self, session: psycopg.Connection[Any], v: int) -> list[tuple[int | None, int | None]]:
        session.execute("insert into lines values (%s)", (v,))
        return [(None, v)]

    def end(self) -> None:
        """Let the writer end after its transaction."""
        self._ended.set()

    def stop(self) -> None:
        """End, and raise what the writer raised."""
        self.end()
        self.finish()

    def finish(self, patience: float = 60) -> None:
        """Wait for the end, and raise what the writer raised."""
        self.join(patience)
        assert not self.is_alive(), f"{self.name} still writes"
        if self.error is not None:
            raise self.error


def take_origin(session: psycopg.Connection[Any], name: str) -> None:
    """Let a session claim commit times. It is still a session of its own side: no mirror wrote what it writes."""
    session.execute("select pg_replication_origin_create(%s) where pg_replication_origin_oid(%s) is null", (name, name))
    session.execute("select pg_replication_origin_session_setup(%s)", (name,))


def pin_time(session: psycopg.Connection[Any], seconds: float) -> None:
    """Let the open transaction commit at a time that is wrong by so many seconds."""
    session.execute(
        "select pg_replication_origin_xact_setup(pg_current_wal_insert_lsn(), clock_timestamp() + %s * interval '1 s')",
        (seconds,),
    )


def _one(session: psycopg.Connection[Any], query: str, *values: Any) -> Any:
    row = session.execute(query.encode(), values).fetchone()
    return row[0] if row else None


# what must hold


@dataclass
class Findings:
    """What is wrong, and what was counted. `wrong` is empty if all promises were kept."""

    wrong: list[str] = field(default_factory=list)
    writes: int = 0
    conflicts: int = 0
    held: int = 0
    differing: int = 0  # rows that differ and are on hold


def examine(sides: Sequence[psycopg.Connection[Any]], ledger: Ledger, tables: Sequence[str] = tuple(KEYS)) -> Findings:
    """Compare both sides, and judge the ledger and the conflicts."""
    found = Findings()
    entries = ledger.committed(sides)
    conflicts = [row for side in sides for row in _conflicts(side)]
    held = {(table, _key(table, row)) for table, state, _, *rows in conflicts if state == "held" for row in rows if row}
    kept: set[int] = set()
    replaced = {one.saw for one in entries if one.saw is not None}
    for table in tables:
        rows = [_rows(side, table) for side in sides]
        for key in rows[0].keys() | rows[1].keys():
            first, second = rows[0].get(key), rows[1].get(key)
            kept |= {row["v"] for row in (first, second) if row is not None}
            if (table, key) in held:
                found.differing += first != second
                continue
            if first != second:
                found.wrong.append(f"{table} {key} differs: {_short(first)} and {_short(second)}")
            for row in (first, second):
                if row is not None and row["v"] in replaced:
                    found.wrong.append(f"{table} {key}: {row['v']} is there, and a write that saw it is not")
    parents = {one.wrote: one.saw for one in entries if one.wrote is not None}
    listed = {row["v"] for _, _, _, *rows in conflicts for row in rows if row}
    for table, state, winner, source, target in conflicts:
        if state != "held" and source and target:
            best, loser = (source["v"], target["v"]) if winner == "source" else (target["v"], source["v"])
            if best in _ancestors(parents, loser):
                found.wrong.append(f"{table}: {loser} had seen {best}, and lost to it")
    for one in entries:
        if one.wrote is not None and one.wrote not in replaced | kept | listed:
            found.wrong.append(f"{one.table}: {one.wrote} is lost, and neither seen nor listed")
    found.writes, found.conflicts = len(entries), len(conflicts)
    found.held = len(held)
    return found


def examine_without_conflicts(sides: Sequence[psycopg.Connection[Any]], ledger: Ledger) -> Findings:
    """Count the rows that differ, and the writes that are lost and that nobody saw."""
    found = Findings()
    entries = ledger.committed(sides)
    kept = {one.saw for one in entries}
    for table in KEYS:
        rows = [_rows(side, table) for side in sides]
        kept |= {row["v"] for one in rows for row in one.values()}
        found.differing += sum(rows[0].get(key) != rows[1].get(key) for key in rows[0].keys() | rows[1].keys())
    found.wrong = [str(one.wrote) for one in entries if one.wrote is not None and one.wrote not in kept]
    found.writes = len(entries)
    return found


def _conflicts(side: psycopg.Connection[Any]) -> list[Any]:
    rows = side.execute(
        "select table_name, state, winner, source_row, target_row from cdcbridge.conflicts order by id"
    ).fetchall()
    return [(table.removeprefix("public."), *rest) for table, *rest in rows]


def _rows(side: psycopg.Connection[Any], table: str) -> dict[Any, dict[str, Any]]:
    columns = "id, v, n, md5(big) as big" if table == "hot" else "*"
    rows = [
        row for (row,) in side.execute(f"select to_json(x) from (select {columns} from {table}) x".encode()).fetchall()
    ]
    found = {_key(table, row): row for row in rows}
    assert len(found) == len(rows), f"{table} has a row twice"
    return found


def _key(table: str, row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEYS[table])


def _short(row: dict[str, Any] | None) -> str:
    return "no row" if row is None else str({name: str(value)[:12] for name, value in row.items()})


def _ancestors(parents: dict[int, int | None], write: int) -> set[int]:
    found: set[int] = set()
    before = parents.get(write)
    while before is not None:
        found.add(before)
        before = parents.get(before)
    return found
