"""The writes of the mirrors' campaign on PostgreSQL's own subscriptions in both directions, with `origin = none`.

A subscription that a conflict stops is continued as a person would do it: by skipping the transaction that the server's
log names. Counts the stops, and the rows that differ in the end.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer, wheel_binaries
from tests.campaigns.mirror_arena import SETTINGS
from tests.harness.world import eventually
from tests.mirrors.workload import SCHEMA, Ledger, Writer, examine_without_conflicts

_FINISHED = re.compile(r"finished at ([0-9A-F]+/[0-9A-F]+)")


def run_native(seconds: float, seed: int, pause: float) -> None:
    """Write for so many seconds, wait until all is quiet, and print what differs."""
    with contextlib.ExitStack() as beside:
        servers = [beside.enter_context(EmbeddedServer(wheel_binaries(), settings=SETTINGS)) for _ in range(2)]
        sessions = [beside.enter_context(psycopg.connect(server.dsn(), autocommit=True)) for server in servers]
        for session in sessions:
            for statement in (*SCHEMA, "create publication p for tables in schema public"):
                session.execute(statement.encode())
        for session, other in zip(sessions, reversed(servers), strict=True):
            session.execute(
                f"create subscription s connection '{other.dsn(tcp=True)}' publication p"
                " with (origin = none, copy_data = false, disable_on_error = true)".encode()
            )
        ledger = Ledger()
        writers = [
            Writer(n, servers[n // 2].dsn, ledger, seed, pause=pause, skew=3600.0 if n == 3 else 0.0) for n in range(4)
        ]
        stops = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stops += sum(_continue(session, server) for session, server in zip(sessions, servers, strict=True))
            time.sleep(0.05)
        for writer in writers:
            writer.stop()
        for number in (0, 1):
            stops += _drain(sessions, servers, number)
        wrong = examine_without_conflicts(sessions, ledger)
        print(f"\nsubscriptions with origin = none, {seconds:.0f} s: {len(ledger.entries):,} writes, {stops} stops that need"
              f" a person, {wrong.differing} rows differ in the end, {len(wrong.wrong)} writes lost unseen", flush=True)  # fmt: skip


def _continue(session: psycopg.Connection[Any], server: EmbeddedServer) -> int:
    """Skip the transaction that stopped the subscription. Return 1 if it had stopped."""
    if session.execute("select from pg_subscription where subenabled").fetchone() is not None:
        return 0
    found = _FINISHED.findall((server.data / "server.log").read_text(errors="replace"))
    if found:
        session.execute(f"alter subscription s skip (lsn = '{found[-1]}')".encode())
    session.execute("alter subscription s enable")
    return 1


def _drain(sessions: Sequence[psycopg.Connection[Any]], servers: Sequence[EmbeddedServer], number: int) -> int:
    """Wait until the other side has everything of this one. Return the stops meanwhile."""
    stops = 0
    row = sessions[number].execute("select pg_current_wal_insert_lsn()").fetchone()
    lsn = row[0] if row else None

    def done() -> bool:
        nonlocal stops
        stops += _continue(sessions[1 - number], servers[1 - number])
        query = "select coalesce(bool_and(replay_lsn >= %s), false) from pg_stat_replication"
        return sessions[number].execute(query, (lsn,)).fetchone() == (True,)

    eventually(done, "the subscription has everything", 300)
    return stops
