"""Where faults of mirrors are tried: two servers that mirror each other, their bridges and mirrors, and writers on both.

Each mirror reaches the other side through a relay, so that each direction can be cut alone. Used by
tests.campaigns.mirror_faults.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer, wheel_binaries
from tests.harness.proxy import Proxy
from tests.harness.world import Running, World, eventually
from tests.mirrors.workload import SCHEMA, Ledger, Writer

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "1GB", "track_commit_timestamp": "on"}
PATIENCE = 120.0
KINDS = ("bridge", "mirror")


class MirrorArena:
    """The servers, the processes and the writers. Side 0 is `a`, and side 1 is `b`."""

    def __init__(self, folder: Path, chance: random.Random, beside: contextlib.ExitStack, seed: int) -> None:
        self.chance, self.seed = chance, seed
        self.kills = 0
        self.mends: list[tuple[float, Callable[[], None]]] = []
        self.ledger = Ledger()
        self.writers: list[Writer] = []
        choices = [(DEBIAN_15, "wal2json"), (wheel_binaries(), "pgoutput")]
        chosen = [chance.choice(choices), choices[1]]
        self.servers = [beside.enter_context(EmbeddedServer(binaries, settings=SETTINGS)) for binaries, _ in chosen]
        self.plugins = [plugin for _, plugin in chosen]
        self.proxies = [beside.enter_context(Proxy(server.port)) for server in self.servers]  # to each side
        self.sides: list[World] = []
        for number, server in enumerate(self.servers):
            home = folder / "ab"[number]
            home.mkdir()
            side = World(server, "postgres", self.plugins[number], home)
            side.slot = "cdcbridge"
            side.store_settings |= {"retention": "1d"}
            side.execute(*SCHEMA, "create table probe (id bigint primary key)")
            self.sides.append(side)
        for number, (name, peer) in enumerate((("to_b", "to_a"), ("to_a", "to_b"))):
            port = self.proxies[1 - number].port
            target = f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=3"
            self.sides[number].mirrors = [{"name": name, "target": {"dsn": target}, "tables": ["public.*"], "start": "now",
                                           "two_way": {"peer": peer}, "create_tables": False}]  # fmt: skip
        self.processes: dict[tuple[str, int], Running] = {}
        for number in (0, 1):
            self.start("bridge", number)
        for side in self.sides:
            eventually(side.active, "the bridge streams", PATIENCE)
        for number in (0, 1):
            self.start("mirror", number)
        beside.callback(self.close)

    def start(self, kind: str, number: int) -> None:
        side = self.sides[number]
        self.processes[kind, number] = side.start_process() if kind == "bridge" else side.start_mirrors()

    def kill(self, kind: str, number: int) -> None:
        """Kill a process with SIGKILL, and start it again."""
        process = self.processes[kind, number]
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.kills += 1
        self.start(kind, number)

    def write(self, pause: float) -> None:
        """Two writers on each side. One of side b has a clock that jumps."""
        for number in range(4):
            side = self.sides[number // 2]
            skew = 3600.0 if number == 3 else 0.0
            self.writers.append(
                Writer(number, partial(getattr, side, "dsn"), self.ledger, self.seed, pause=pause, skew=skew)
            )

    def kill_backend(self, number: int, which: str) -> None:
        """Kill a backend with SIGKILL. Its server ends all sessions and recovers."""
        found = self.ask(number, f"select pid from pg_stat_activity where {which} order by random() limit 1")
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0][0], signal.SIGKILL)
                self.kills += 1

    def crash(self, number: int) -> None:
        self.servers[number].stop("immediate")
        self.kills += 1
        time.sleep(self.chance.uniform(0, 1))
        self.servers[number].start()

    def ask(self, number: int, query: str) -> list[tuple[Any, ...]]:
        """Rows of a side, once it answers."""
        return eventually(lambda: self._rows(number, query), query, PATIENCE)[0]  # type: ignore[no-any-return]

    def _rows(self, number: int, query: str) -> list[list[tuple[Any, ...]]]:
        self.mend(time.monotonic())
        with contextlib.suppress(psycopg.OperationalError):
            path = "-c search_path=cdcbridge,cdcbridge_internal,public"
            with psycopg.connect(
                self.servers[number].dsn(), autocommit=True, connect_timeout=3, options=path
            ) as session:
                cursor = session.execute(query.encode())
                return [cursor.fetchall() if cursor.description else []]
        return []

    def passes(self) -> float:
        """Commit a row on each side, and wait until the other one has it. Return the seconds."""
        began = time.monotonic()
        for number in (0, 1):
            probe = 2 * time.monotonic_ns() + number
            self.ask(number, f"insert into probe values ({probe}) on conflict do nothing")
            there = f"select 1 from probe where id = {probe}"
            eventually(lambda: self.ask(1 - number, there), "the other side has a later change", PATIENCE)  # noqa: B023
        return time.monotonic() - began

    def mend(self, now: float) -> None:
        """End the faults whose time is over."""
        for entry in [entry for entry in self.mends if entry[0] <= now]:
            self.mends.remove(entry)
            entry[1]()

    def close(self) -> None:
        for writer in self.writers:
            writer.end()
        for side in self.sides:
            side.close()
