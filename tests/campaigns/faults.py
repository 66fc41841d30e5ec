"""Everything that production does, at random, for a quarter of an hour, under pgbench: `make faults`.

Two bridges on hosts of their own, source and store on two servers, receivers, sinks with real targets; one fault after
another, each followed until a change that was committed after it is in the log and confirmed. In the end the log must have
what pgbench's own history table has, each row once; the ledger that receivers keep in the store must have each message once,
in order per key; and each target must have what tests.campaigns.sink_results says. Prints its seed, and the tables of
docs/RELIABILITY.md.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from tests.campaigns.arena import Arena, ask
from tests.campaigns.sink_arena import PROCESSES
from tests.campaigns.sink_faults import SINK_FAULTS
from tests.campaigns.sink_results import check_sinks, check_that_the_slot_does_not_wait
from tests.harness.hostile import own_environment
from tests.harness.world import eventually

PATIENCE = 90.0
LEDGER = "create table ledger (consumer text, seq bigint, key text, id bigserial, primary key (consumer, seq))"
DDL = (
    "alter table pgbench_history add column if not exists note text default 'x'",
    "alter table pgbench_history drop column if exists note",
    "alter table pgbench_accounts replica identity full",
    "alter table pgbench_accounts replica identity default",
    "create index if not exists later on pgbench_history (mtime); drop index later",
    "alter table pgbench_tellers alter column filler type text",
    "create table if not exists side (id int primary key, v text); insert into side values (1, 'x'); drop table side",
    "vacuum (freeze) pgbench_branches",
)


class Told(NamedTuple):
    """One fault: when it began, by the source's clock, and how long it took until changes went through again."""

    fault: str
    began: Any
    seconds: float
    confirmed: float  # after so many seconds more the slot had confirmed them


# faults: each takes the arena, and gives back what mends it, if it does not pass by itself


def kill_leader(arena: Arena) -> None:
    _kill(arena, arena.leader())


def kill_standby(arena: Arena) -> None:
    _kill(arena, 1 - arena.leader())


def _kill(arena: Arena, number: int) -> None:
    arena.bridges[number].kill()
    arena.bridges[number].wait()
    arena.kills += 1
    arena.start_bridge(number)


def kill_receiver(arena: Arena) -> None:
    process, consumer = arena.receivers.pop(arena.chance.randrange(len(arena.receivers)))
    process.kill()
    process.join()
    arena.kills += 1
    arena.start_receiver(consumer)


def kill_source_backend(arena: Arena) -> None:
    _kill_backend(arena, arena.in_source, "backend_type = 'walsender'")


def kill_store_backend(arena: Arena) -> None:
    _kill_backend(arena, arena.in_store, "application_name like 'cdcbridge %'")


def _kill_backend(arena: Arena, where: Callable[[str], list[tuple[Any, ...]]], which: str) -> None:
    """SIGKILL: the server takes itself for corrupted, ends everybody and recovers."""
    found = where(f"select pid from pg_stat_activity where {which} order by random() limit 1")
    if found:
        os.kill(found[0][0], signal.SIGKILL)
        arena.kills += 1


def crash_source(arena: Arena) -> None:
    _crash(arena, arena.source)


def crash_store(arena: Arena) -> None:
    _crash(arena, arena.store)


def _crash(arena: Arena, server: EmbeddedServer) -> None:
    server.stop("immediate")
    arena.kills += 1
    time.sleep(arena.chance.uniform(0, 1))
    server.start()


def stop_leader(arena: Arena) -> Callable[[], None]:
    bridge = arena.bridges[arena.leader()]
    bridge.send_signal(signal.SIGSTOP)
    return lambda: bridge.send_signal(signal.SIGCONT)


def cut_leader(arena: Arena) -> Callable[[], None]:
    host = arena.hosts[arena.leader()]
    lines = arena.chance.choice([(host.source,), (host.store,), (host.source, host.store)])
    host.cut(*lines)
    return lambda: host.heal(*lines)


def delay(arena: Arena) -> Callable[[], None]:
    for proxy in arena.proxies:
        proxy.delay = arena.chance.uniform(0.02, 0.3)

    def mend() -> None:
        for proxy in arena.proxies:
            proxy.delay = 0.0

    return mend


def fill_disk(arena: Arena) -> None:
    """The store's disk is full for a while; a server that gave up is started again."""
    filler = arena.disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    time.sleep(arena.chance.uniform(1, 4))
    filler.unlink()
    eventually(lambda: _up(arena.store), "the store is up again", PATIENCE)


def _up(server: EmbeddedServer) -> bool:
    with contextlib.suppress(psycopg.Error), psycopg.connect(server.dsn(), connect_timeout=2):
        return True
    with contextlib.suppress(Exception):
        server.start()
    return False


def jump_clock(arena: Arena) -> None:
    seconds = arena.chance.choice([-86400, -3600, -30, 30, 3600, 86400])
    arena.clock(arena.leader()).write_text(f"{seconds:+d}")


def change_schema(arena: Arena) -> None:
    session = " options='-c lock_timeout=5s'"
    with contextlib.suppress(psycopg.errors.LockNotAvailable, psycopg.OperationalError):
        for statement in arena.chance.choice(DDL).split("; "):
            ask(arena.dsn(arena.source) + session, statement)


FAULTS: dict[str, tuple[Callable[[Arena], Callable[[], None] | None], int]] = {
    "kill -9 of the bridge that leads": (kill_leader, 30),
    "kill -9 of the stand-by": (kill_standby, 8),
    "kill -9 of a receiver": (kill_receiver, 12),
    "kill -9 of a walsender: the source recovers": (kill_source_backend, 8),
    "kill -9 of a backend of the store: it recovers": (kill_store_backend, 8),
    "source stopped at once and started": (crash_source, 5),
    "store stopped at once and started": (crash_store, 5),
    "leader stopped (SIGSTOP), later woken": (stop_leader, 5),
    "leader's network cut: source, store or both": (cut_leader, 6),
    "network delay of 20 to 300 ms each way": (delay, 4),
    "store's disk full": (fill_disk, 3),
    "clock of the leader jumps": (jump_clock, 3),
    "DDL in mid-stream": (change_schema, 6),
    **SINK_FAULTS,
}


def run(folder: Path, seconds: float, seed: int) -> list[Told]:
    """All of it. Raises AssertionError where a promise is broken."""
    chance = random.Random(seed)
    with contextlib.ExitStack() as beside:
        arena = Arena(folder, chance, beside)
        prepare(arena)
        told: list[Told] = []
        end = time.monotonic() + seconds
        names, weights = list(FAULTS), [weight for _, weight in FAULTS.values()]
        while time.monotonic() < end:
            told.append(one_fault(arena, chance.choices(names, weights)[0]))
            time.sleep(chance.uniform(0, 0.5))
        while arena.mends:
            arena.mend(math.inf)
            time.sleep(0.1)
        for number in (0, 1):
            arena.clock(number).write_text("+0")  # Kafka takes nothing from tomorrow
        arena.sinks.finish()
        print(f"{len(told)} faults, {arena.kills} kills; plugin {arena.world.plugin}", flush=True)
        check(arena, told)
        return told


def prepare(arena: Arena) -> None:
    """Tables, consumers, bridges, receivers, processes of sinks, load."""
    world = arena.world
    init = ["-i", "-q", "-s", "1", "-h", "127.0.0.1", "-p", str(arena.source.port), "-U", "postgres", "postgres"]
    subprocess.run([arena.source.binaries / "pgbench", *init], check=True, capture_output=True, env=own_environment())
    arena.in_source("create table probe (id bigint primary key)")
    world.consumer("queue", ("public.pgbench_history", "public.probe"), operations=["insert"], visibility_timeout="5s",
                   max_deliveries=1000, max_in_flight=5000)  # fmt: skip
    world.consumer("fifo", ("public.pgbench_accounts",), mode="fifo", max_deliveries=1000, max_in_flight=5000)
    arena.write_files()
    for number in (0, 1):
        arena.start_bridge(number)
    eventually(lambda: "bridge.streaming" in (arena.folder / "bridge.log").read_text(), "a bridge streams", PATIENCE)
    arena.in_store(LEDGER)
    for consumer in ("queue", "queue", "fifo", "fifo"):
        arena.start_receiver(consumer)
    for number in range(PROCESSES):
        arena.sinks.start(number)
    threading.Thread(target=arena.sinks.watch, args=(arena.dsn(arena.store),), daemon=True).start()
    threading.Thread(target=arena.pgbench, daemon=True).start()


def one_fault(arena: Arena, name: str) -> Told:
    """Let it happen, and wait until a change that is committed after it has begun is in the log."""
    began = arena.in_source("select clock_timestamp()")[0][0]
    started = time.monotonic()
    mend = FAULTS[name][0](arena)
    if mend is not None:
        arena.mends.append((started + arena.chance.uniform(3.5, 8), mend))
    probe = time.monotonic_ns()
    insert = f"with i as (insert into probe values ({probe}) on conflict do nothing) select 1"
    there = f"select 1 from cdcbridge.messages where topic = 'public.probe' and key = '{probe}'"
    for where, query in ((arena.in_source, insert), (arena.in_store, there)):
        eventually(lambda: _answers(arena, where, query), f"it goes on after: {name}", PATIENCE)  # noqa: B023
    logged = time.monotonic()
    lsn = eventually(lambda: _answers(arena, arena.in_source, "select pg_current_wal_lsn()"), name, PATIENCE)[0][0]
    query = arena.is_confirmed(lsn)
    eventually(lambda: _answers(arena, arena.in_source, query), f"the slot is confirmed after: {name}", PATIENCE)
    return Told(name, began, logged - started, time.monotonic() - logged)


def _answers(arena: Arena, where: Callable[[str], list[tuple[Any, ...]]], query: str) -> list[tuple[Any, ...]]:
    """The rows, or none if the server is away."""
    arena.mend(time.monotonic())
    with contextlib.suppress(psycopg.OperationalError):
        return where(query)
    return []


def check(arena: Arena, told: list[Told]) -> None:
    """What pgbench's history has beside what the log has; what the receivers did."""
    arena.load_ends.set()
    subprocess.run(["pkill", "-f", f"pgbench.*-p {arena.source.port}"], check=False)
    ended = "select 1 where not exists (select from pg_stat_activity where application_name = 'pgbench')"
    eventually(lambda: _answers(arena, arena.in_source, ended), "pgbench has ended", PATIENCE)
    columns = "tid, bid, aid, delta, mtime"
    there = sorted(arena.in_source(f"select {columns} from pgbench_history"), key=str)
    record = "data -> 'record'"
    parts = [f"({record} ->> 'tid')::int", f"({record} ->> 'bid')::int", f"({record} ->> 'aid')::int",
             f"({record} ->> 'delta')::int", f"({record} ->> 'mtime')::timestamp"]  # fmt: skip
    logged = f"select {', '.join(parts)} from cdcbridge.messages where topic = 'public.pgbench_history'"
    eventually(lambda: len(arena.in_store(logged)) >= len(there), f"{len(there)} rows of history", PATIENCE)
    found = sorted(arena.in_store(logged), key=str)
    lost, repeated = _differences(there, found)
    _print(told, lost, repeated)
    assert not lost and not repeated, f"{len(lost)} lost, {len(repeated)} repeated: {lost[:3]} {repeated[:3]}"
    assert arena.in_store("select count(*) - count(distinct (commit_lsn, ordinal)) from cdcbridge.messages")[0][0] == 0
    for consumer, topics in (
        ("queue", "('public.pgbench_history', 'public.probe')"),
        ("fifo", "('public.pgbench_accounts')"),
    ):
        missing = f"""select count(*) from cdcbridge.messages m where topic in {topics} and not exists (
                      select from ledger l where l.consumer = '{consumer}' and l.seq = m.seq)"""
        eventually(lambda: arena.in_store(missing)[0][0] == 0, f"{consumer} has acked everything once", PATIENCE)  # noqa: B023
    out_of_order = """select count(*) from (select seq, lag(seq) over (partition by key order by id) as before from ledger
                      where consumer = 'fifo') l where seq < before"""
    assert arena.in_store(out_of_order)[0][0] == 0, "a key of the fifo consumer was out of order"
    balances = arena.in_source("select sum(abalance) from pgbench_accounts")
    newest = """select sum(balance) from (select distinct on (key) (data -> 'record' ->> 'abalance')::int as balance
                from cdcbridge.messages where topic = 'public.pgbench_accounts' order by key, seq desc) b"""
    assert arena.in_store(newest) == balances, "the newest message of each account is the account"
    seconds = sorted(one.confirmed for one in told)
    print(f"{len(there):,} rows of pgbench's history, {arena.in_store('select count(*) from ledger')[0][0]:,} acks: ok;"
          f" confirmed {seconds[len(seconds) // 2]:.1f} s after the log had it (median; longest {seconds[-1]:.1f} s)")  # fmt: skip
    check_that_the_slot_does_not_wait(arena)
    check_sinks(arena)


def _differences(there: list[Any], found: list[Any]) -> tuple[list[Any], list[Any]]:
    from collections import Counter

    left, right = Counter(there), Counter(found)
    return list((left - right).elements()), list((right - left).elements())


def _print(told: list[Told], lost: list[Any], repeated: list[Any]) -> None:
    """The table. A row that is missing or there twice counts for the fault that its commit was nearest behind."""
    print("\n| fault | times | lost | repeated | recovery p50 | p99 | longest |\n|---|---|---|---|---|---|---|")
    blamed = [[_blame(told, row[-1]) for row in rows] for rows in (lost, repeated)]
    for name in FAULTS:
        seconds = sorted(t.seconds for t in told if t.fault == name)
        if seconds:
            p50, p99 = (seconds[math.ceil(share * len(seconds)) - 1] for share in (0.5, 0.99))
            print(f"| {name} | {len(seconds)} | {blamed[0].count(name)} | {blamed[1].count(name)} | {p50:.1f} s |"
                  f" {p99:.1f} s | {seconds[-1]:.1f} s |")  # fmt: skip
    print(flush=True)


def _blame(told: list[Told], moment: Any) -> str:
    before = [t for t in told if t.began.replace(tzinfo=None) <= moment]
    return before[-1].fault if before else next(iter(FAULTS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.faults")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cdcbridge-faults-") as folder:
        Path(folder).chmod(0o755)
        try:
            run(Path(folder), options.seconds, options.seed)
        except BaseException:
            for log in (Path(folder) / "bridge.log", Path(folder) / "sinks.log"):
                print("".join(log.open().readlines()[-60:]) if log.exists() else "", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
