"""What the sinks of the faults campaign have in the end, compared with the log.

Everything must be there: once where that is promised, in the order of its key where there is one. Never changes a target.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.campaigns.sink_arena import TABLES, Sink
from tests.harness.world import eventually
from tests.sinks.case import Received, by_key

if TYPE_CHECKING:
    from tests.campaigns.arena import Arena

PATIENCE = 150.0  # seconds until everything is delivered. A sink whose target was away may wait for 30 s
AT_ONCE = 10.0  # seconds until the slot has confirmed a change while no target can be reached
_LOG = f"""
    select system_identifier || '/' || timeline || '/' || commit_lsn || '/' || ordinal, key
    from cdcbridge.messages, cdcbridge_internal.source where topic in {TABLES} order by seq"""
_UNFINISHED = "select name, pending, in_flight from cdcbridge.consumer_lag() where pending + in_flight > 0"
_DEAD = (
    "select c.name, m.seq, m.reason from cdcbridge.dead_messages m join cdcbridge.consumers c on c.id = m.consumer_id"
)


def check_that_the_slot_does_not_wait(arena: Arena) -> None:
    """Take all targets away, and see that the slot moves on."""
    names = {sink.name for sink in arena.sinks.all if sink.target is not None}
    for proxy in arena.sinks.proxies.values():
        proxy.away = True
    arena.in_source("update pgbench_tellers set tbalance = tbalance")
    lsn = arena.in_source("select pg_current_wal_lsn()")[0][0]
    eventually(
        lambda: arena.in_source(arena.is_confirmed(lsn)),
        "the slot is confirmed while no target can be reached",
        AT_ONCE,
    )
    unfinished = {row[0] for row in arena.in_store(_UNFINISHED)}
    assert names <= unfinished, f"these sinks delivered without their targets: {names - unfinished}"
    for proxy in arena.sinks.proxies.values():
        proxy.away = False


def check_sinks(arena: Arena) -> None:
    """Wait until all sinks have delivered everything, and compare. Prints one line for each sink."""
    ours = {sink.name for sink in arena.sinks.all}

    def unfinished() -> list[object]:
        return [row for row in arena.in_store(_UNFINISHED) if row[0] in ours]

    try:
        eventually(lambda: not unfinished(), "the sinks have delivered everything", PATIENCE)
    except AssertionError as error:
        raise AssertionError(f"not delivered: {unfinished()}") from error
    wanted = arena.in_store(_LOG)
    dead = [row for row in arena.in_store(_DEAD) if row[0] in ours]
    arena.close()  # the targets need the processors to tell what they have
    child = ["pgrep", "-f", f"{arena.folder}.*--until-stdin-ends"]
    eventually(
        lambda: subprocess.run(child, capture_output=True, check=False).returncode == 1,
        "the sinks' processes end with their bridges",
    )
    print("\n| sink | mode | messages | duplicates | lost | longest wait |\n|---|---|---|---|---|---|")
    broken = [problem for sink in arena.sinks.all for problem in _compare(arena, sink, wanted)]
    print(f"{arena.sinks.deaths} deaths at a named instant\n", flush=True)
    assert not broken, "; ".join(broken)
    assert not dead, f"dead letters: {dead[:3]}"


def _compare(arena: Arena, sink: Sink, wanted: Sequence[tuple[str, str | None]]) -> list[str]:
    """Print the line of a sink, and return what is wrong."""
    received = sink.case.received()
    found = Counter(one.id for one in received)
    lost = [one for one, _ in wanted if one not in found]
    foreign = found.keys() - {one for one, _ in wanted}
    twice = [one for one, times in found.items() if times > 1]
    print(f"| {sink.name} | {sink.mode} | {len(wanted):,} | {len(received) - len(found):,} | {len(lost):,} |"
          f" {arena.sinks.waits.get(sink.name, 0.0):.1f} s |", flush=True)  # fmt: skip
    problems = []
    if lost:
        problems.append(f"{sink.name} lost {len(lost)}: {lost[:3]}")
    if foreign:
        problems.append(f"{sink.name} has messages that are not in the log: {sorted(foreign)[:3]}")
    if twice and sink.mode == "stream" and sink.case.exactly_once:
        problems.append(f"{sink.name} has {len(twice)} messages twice: {twice[:3]}")
    if not lost and sink.mode != "queue" and not _in_order(received, wanted):
        problems.append(f"{sink.name} has a key out of order")
    return problems


def _in_order(received: Sequence[Received], wanted: Sequence[tuple[str, str | None]]) -> bool:
    return by_key([(one.id, one.key) for one in received]) == by_key(wanted)
