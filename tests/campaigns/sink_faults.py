"""The faults of sinks in the faults campaign: their processes die and stop, their targets are away, slow and refusing.

Each fault takes the arena, and gives back what mends it, if it does not pass by itself. Never breaks what a target has
acknowledged: it kills no target that would lose its data.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import redis

from cdcbridge.instants import SINK_INSTANTS
from tests.campaigns.sink_arena import PROCESSES, Webhook
from tests.harness.brokers.http import Answer
from tests.harness.brokers.redis import Redis

if TYPE_CHECKING:
    from tests.campaigns.arena import Arena

# Kafka answers a commit before it has written the markers of the transaction. One node that is killed in between may
# never write them, and then nothing after them is ever readable.
ENDS_IN_GOOD_ORDER = ("kafka",)
DYING = 20.0  # seconds for a process to reach its instant: it starts, and gets lanes


def kill_process(arena: Arena) -> None:
    number = arena.chance.randrange(PROCESSES)
    arena.sinks.kill(number)
    arena.kills += 1
    arena.sinks.start(number)


def kill_child(arena: Arena) -> None:
    """The bridge starts another one."""
    for pid in _children(arena, arena.chance.randrange(2)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            arena.kills += 1


def _children(arena: Arena, bridge: int) -> list[int]:
    """The processes that a bridge has started, of which there is one or none."""
    pid = arena.bridges[bridge].pid
    with contextlib.suppress(FileNotFoundError):
        return [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    return []


def die_at_an_instant(arena: Arena) -> Callable[[], None]:
    number, sinks = arena.chance.randrange(PROCESSES), arena.sinks
    sinks.kill(number)
    sinks.start(number, (arena.chance.choice(SINK_INSTANTS), arena.chance.randint(1, 6)))
    dying = sinks.processes[number]
    patience = time.monotonic() + DYING

    def mend() -> None:
        if sinks.processes[number] is not dying:
            return  # a later fault has replaced it
        if dying.poll() is None and time.monotonic() < patience:
            arena.mends.append((time.monotonic() + 0.5, mend))
            return
        sinks.deaths += dying.poll() is not None
        sinks.kill(number)
        arena.kills += 1
        sinks.start(number)

    return mend


def stop_process(arena: Arena) -> Callable[[], None]:
    """For longer than the lease of its lanes."""
    number = arena.chance.randrange(PROCESSES + 2)
    pids = [arena.sinks.processes[number].pid] if number < PROCESSES else _children(arena, number - PROCESSES)

    def send(what: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    send(signal.SIGSTOP)
    return lambda: send(signal.SIGCONT)


def kill_target(arena: Arena) -> Callable[[], None] | None:
    sinks = arena.sinks
    name = _target(arena)
    if name is None:
        return None
    sinks.down.add(name)
    if name in ENDS_IN_GOOD_ORDER:
        sinks.servers[name].stop()
    else:
        sinks.servers[name].kill()
        arena.kills += 1
    return lambda: sinks.later(lambda: sinks.restart(name))


def _target(arena: Arena) -> str | None:
    """One of the targets that are up and keep their messages."""
    up = sorted(arena.sinks.servers.keys() - arena.sinks.down - arena.sinks.forgetful)
    return arena.chance.choice(up) if up else None


def cut_target(arena: Arena) -> Callable[[], None]:
    """In the middle of a batch, most probably, because each piece of it is late."""
    proxy = arena.sinks.proxies[arena.chance.choice(sorted(arena.sinks.proxies))]
    proxy.delay = 0.1
    for _ in range(arena.chance.randint(1, 4)):
        time.sleep(arena.chance.uniform(0.05, 0.4))
        proxy.away = True
        time.sleep(arena.chance.uniform(0, 0.1))
        proxy.away = False
    proxy.away = True

    def mend() -> None:
        proxy.away, proxy.delay = False, 0.0

    return mend


def silence_target(arena: Arena) -> Callable[[], None]:
    proxy = arena.sinks.proxies[arena.chance.choice(sorted(arena.sinks.proxies))]
    proxy.silent = True

    def mend() -> None:
        proxy.silent = False

    return mend


def slow_target(arena: Arena) -> Callable[[], None]:
    proxy = arena.sinks.proxies[arena.chance.choice(sorted(arena.sinks.proxies))]
    proxy.delay = arena.chance.uniform(0.02, 0.5)

    def mend() -> None:
        proxy.delay = 0.0

    return mend


def refuse(arena: Arena) -> Callable[[], None]:
    return arena.chance.choice([_refusing_webhook, _refusing_redis])(arena)


def _refusing_webhook(arena: Arena) -> Callable[[], None]:
    webhook = next(sink.case for sink in arena.sinks.all if isinstance(sink.case, Webhook))
    later = {"Retry-After": str(arena.chance.randint(1, 3))}
    moods: list[Answer | str] = [Answer(503), Answer(503, headers=later), Answer(429, headers=later),
                                 Answer(500), Answer(cut="before"), "picky"]  # fmt: skip
    webhook.mood = arena.chance.choice(moods)

    def mend() -> None:
        webhook.mood = "good"

    return mend


def _refusing_redis(arena: Arena) -> Callable[[], None]:
    server = cast("Redis", arena.sinks.servers["redis"])
    begin, end = arena.chance.choice([(server.fill, server.make_room), (server.freeze, server.thaw)])

    def act(what: Callable[[], None]) -> None:
        with contextlib.suppress(redis.RedisError):  # it is down, and starts with its own settings
            what()

    act(begin)
    return lambda: act(end)


def pause(arena: Arena) -> None:
    sinks, seconds = arena.sinks, arena.chance.uniform(1, 6)
    name = arena.chance.choice(sinks.all).name

    def pause_and_resume() -> None:
        sinks.command("pause", name)
        time.sleep(seconds)
        while sinks.command("resume", name):  # the store may be away
            time.sleep(0.2)

    sinks.later(pause_and_resume)


def change_file(arena: Arena) -> None:
    arena.sinks.declare(arena.chance.choice(arena.sinks.all), arena.chance.choice([7, 50, 100, 300]))
    arena.write_files()


SINK_FAULTS: dict[str, tuple[Callable[[Arena], Callable[[], None] | None], int]] = {
    "kill -9 of a process of the sinks": (kill_process, 20),
    "kill -9 of the sinks' process of a bridge": (kill_child, 12),
    "sinks' process dies at a named instant": (die_at_an_instant, 30),
    "sinks' process stopped (SIGSTOP), later woken": (stop_process, 15),
    "target killed, later started": (kill_target, 15),
    "target's connections cut": (cut_target, 20),
    "target silent": (silence_target, 8),
    "target slow, 20 to 500 ms each way": (slow_target, 8),
    "target refuses: 503, 429, full, read-only": (refuse, 12),
    "sink paused, later resumed": (pause, 6),
    "sinks' configuration changed": (change_file, 8),
}
