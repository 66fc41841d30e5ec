"""Faults of mirrors at random, for a quarter of an hour, while both sides write: `make mirror-faults`.

Two servers mirror each other. One fault after another hits their bridges, mirrors, backends, servers and network, and one
writer has a clock that jumps by up to an hour. In the end both sides must be equal except for listed holds, no write may
have lost to one that it had seen, and each write that nobody saw must be a listed conflict. Beside it, the same writers
write to two servers with PostgreSQL's own subscriptions (`origin = none`). Prints its seed, and the tables of
docs/RELIABILITY.md.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.campaigns.mirror_arena import KINDS, PATIENCE, MirrorArena
from tests.campaigns.native_two_way import run_native
from tests.harness.world import eventually
from tests.mirrors.workload import examine

_LAST_CONFLICTS = (
    "select id, at, table_name, key, kind, winner, state, note, source_row ->> 'v', target_row ->> 'v', source_position,"
    " target_position from conflicts where table_name <> 'public.lines' order by id desc limit 300"
)
Mend = Callable[[], None]


class Told(NamedTuple):
    """One fault, and after how many seconds changes of both sides went through again."""

    fault: str
    seconds: float


def kill_mirror(arena: MirrorArena) -> None:
    arena.kill("mirror", arena.chance.randrange(2))


def kill_bridge(arena: MirrorArena) -> None:
    arena.kill("bridge", arena.chance.randrange(2))


def kill_everything(arena: MirrorArena) -> None:
    for kind in KINDS:
        for number in (0, 1):
            arena.kill(kind, number)


def kill_mirror_backend(arena: MirrorArena) -> None:
    arena.kill_backend(arena.chance.randrange(2), "application_name = 'cdcbridge mirror'")


def kill_walsender(arena: MirrorArena) -> None:
    arena.kill_backend(arena.chance.randrange(2), "backend_type = 'walsender'")


def end_sessions(arena: MirrorArena) -> None:
    arena.ask(arena.chance.randrange(2), "select pg_terminate_backend(pid) from pg_stat_activity"
                                         " where pid <> pg_backend_pid() and backend_type = 'client backend'")  # fmt: skip


def crash_server(arena: MirrorArena) -> None:
    arena.crash(arena.chance.randrange(2))


def stop_process(arena: MirrorArena) -> Mend:
    key = arena.chance.choice(KINDS), arena.chance.randrange(2)
    process = arena.processes[key]
    process.send_signal(signal.SIGSTOP)
    return lambda: process.send_signal(signal.SIGCONT)


def cut_one_direction(arena: MirrorArena) -> Mend:
    return _cut(arena, [arena.chance.randrange(2)])


def cut_both_directions(arena: MirrorArena) -> Mend:
    return _cut(arena, [0, 1])


def _cut(arena: MirrorArena, numbers: list[int]) -> Mend:
    how = arena.chance.choice(["silent", "away"])
    for number in numbers:
        setattr(arena.proxies[number], how, True)

    def mend() -> None:
        for number in numbers:
            setattr(arena.proxies[number], how, False)

    return mend


def delay(arena: MirrorArena) -> Mend:
    for proxy in arena.proxies:
        proxy.delay = 0.3

    def mend() -> None:
        for proxy in arena.proxies:
            proxy.delay = 0.0

    return mend


FAULTS: dict[str, tuple[Callable[[MirrorArena], Mend | None], int]] = {
    "kill -9 of a mirror": (kill_mirror, 30),
    "kill -9 of a bridge": (kill_bridge, 15),
    "kill -9 of both bridges and both mirrors": (kill_everything, 5),
    "kill -9 of a mirror's backend: the server recovers": (kill_mirror_backend, 8),
    "kill -9 of a walsender: the server recovers": (kill_walsender, 6),
    "all sessions of a side ended": (end_sessions, 6),
    "a side's server stopped at once and started": (crash_server, 6),
    "a bridge or mirror stopped (SIGSTOP), later woken": (stop_process, 8),
    "network cut in one direction": (cut_one_direction, 8),
    "network cut in both directions": (cut_both_directions, 6),
    "network delay of 300 ms each way": (delay, 4),
}


def run(folder: Path, seconds: float, seed: int, pause: float) -> None:
    """All of it. Raises AssertionError where a promise is broken."""
    with contextlib.ExitStack() as beside:
        chance = random.Random(seed)
        arena = MirrorArena(folder, chance, beside, seed)
        arena.write(pause)
        told: list[Told] = []
        names, weights = list(FAULTS), [weight for _, weight in FAULTS.values()]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name = chance.choices(names, weights)[0]
            mend = FAULTS[name][0](arena)
            if mend is not None:
                arena.mends.append((time.monotonic() + chance.uniform(2, 6), mend))
            told.append(Told(name, arena.passes()))
            print(f"{name}: {told[-1].seconds:.1f} s", flush=True)
        while arena.mends:
            arena.mend(math.inf)
        for writer in arena.writers:
            writer.stop()
        _report(arena, told)


def _report(arena: MirrorArena, told: list[Told]) -> None:
    """Wait until all is quiet, print the table, and judge."""
    for number in (0, 1):
        _drain(arena, number)
    print(f"\nplugins {' and '.join(arena.plugins)}; {len(told)} faults, {arena.kills} kills")
    print("\n| fault | times | recovery p50 | longest |\n|---|---|---|---|")
    for name in FAULTS:
        seconds = sorted(one.seconds for one in told if one.fault == name)
        if seconds:
            print(f"| {name} | {len(seconds)} | {seconds[len(seconds) // 2]:.1f} s | {seconds[-1]:.1f} s |")
    for side in arena.sides:
        side.leave()  # its sessions may be from before a crash
    found = examine([side.sql for side in arena.sides], arena.ledger)
    print(f"\n{found.writes:,} writes, {found.conflicts:,} conflicts, {found.held} rows on hold, of which"
          f" {found.differing} differ; {len(found.wrong)} promises broken", flush=True)  # fmt: skip
    for number in (0, 1) if found.wrong else ():
        print(f"conflicts of side {number}:", *arena.ask(number, _LAST_CONFLICTS), sep="\n", flush=True)
    assert not found.wrong, found.wrong[:10]
    before = _places(arena)
    time.sleep(5)  # nothing may happen, so there is nothing to wait for
    assert _places(arena) == before, "something loops"


def _drain(arena: MirrorArena, number: int) -> None:
    """Wait until the mirror of this side has applied everything that the side has committed."""
    lsn = arena.ask(number, "select pg_current_wal_insert_lsn()")[0][0]
    arena.ask(number, "select pg_logical_emit_message(true, 'cdcbridge.heartbeat', '')")
    end = f"select 1 from positions where end_lsn >= '{lsn}'"
    eventually(partial(arena.ask, number, end), "the log", PATIENCE)
    seq = arena.ask(number, "select coalesce(max(seq), 0) from messages")[0][0]
    done = f"select 1 from newest_offsets((select min(id) from consumers)) o having min(o.seq) >= {seq}"
    eventually(partial(arena.ask, number, done), f"everything of side {number} is applied", 4 * PATIENCE)


def _places(arena: MirrorArena) -> list[object]:
    query = "select (select max(seq) from messages), (select max(seq) from mirror_places)"
    return [arena.ask(number, query) for number in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.mirror_faults")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--pause", type=float, default=1.0, help="the longest pause of a writer, in seconds")
    parser.add_argument("--native", type=float, default=60, help="seconds of the same writes on subscriptions")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cdcbridge-mirror-faults-") as folder:
        Path(folder).chmod(0o755)
        try:
            if options.seconds:
                run(Path(folder), options.seconds, options.seed, options.pause)
        except BaseException:
            for log in sorted(Path(folder).glob("*/*.log")):
                print(f"--- {log.parent.name}/{log.name}\n{log.read_text()[-3000:]}", flush=True)
            raise
    if options.native:
        run_native(options.native, options.seed, options.pause)


if __name__ == "__main__":
    main()
