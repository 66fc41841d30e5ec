"""Where faults are tried: two servers, two bridges on hosts of their own, receivers, sinks, pgbench: tests.campaigns.faults."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from tests.campaigns.sink_arena import PARTITIONS, Sinks
from tests.harness import hostile
from tests.harness.hostile import own_environment
from tests.harness.listening import ListeningServer
from tests.harness.netns import Host
from tests.harness.proxy import Proxy
from tests.harness.world import World, clean_environment

hostile.install_if_wanted()  # here, since the processes that it starts import this module

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
SETTINGS = {
    "fsync": "off",
    "max_wal_size": "256MB",
    "min_wal_size": "80MB",
    "max_connections": "200",
}
STORE_SIZE = "1500m"


class Arena:
    """The servers, the bridges, the load."""

    def __init__(self, folder: Path, chance: random.Random, beside: contextlib.ExitStack) -> None:
        self.chance, self.folder = chance, folder
        self.source = beside.enter_context(ListeningServer(DEBIAN_15, settings=SETTINGS))
        self.disk = beside.enter_context(small_disk(folder / "disk"))
        self.store = beside.enter_context(_server_in(self.disk))
        self.hosts = [beside.enter_context(Host()) for _ in range(2)]
        self.hosts[1].route(self.hosts[0].source)  # where the sinks' targets are
        self.proxies = [beside.enter_context(Proxy(server.port)) for server in (self.source, self.store)]
        self.world = World(self.source, "postgres", chance.choice(["wal2json", "pgoutput"]), folder)
        self.world.slot, self.world.store_dsn = "cdcbridge", self.store.dsn()
        self.world.store_settings |= {"retention": "1d", "partitions": PARTITIONS}
        self.sinks = Sinks(folder, chance, beside, self.world, self.hosts[0].source)
        self.bridges: list[subprocess.Popen[str]] = []
        self.receivers: list[tuple[Any, str]] = []
        self.mends: list[tuple[float, Callable[[], None]]] = []  # when, and what ends a fault that lasts
        self.load_ends = threading.Event()
        self.kills = 0
        beside.callback(self.close)

    def dsn(self, server: EmbeddedServer) -> str:
        """Over TCP, without the test's own settings."""
        return server.dsn(tcp=True) + " connect_timeout=3"

    # bridges

    def write_files(self) -> None:
        """Write the files of the bridges and of the sinks' processes. Each process follows its file.

        The first of each goes through the proxies, the other does not.
        """
        world, stores = self.world, [self.proxies[1].port, self.store.port]
        for number, host in enumerate(self.hosts):
            ports = [p.port for p in self.proxies] if number == 0 else [self.source.port, self.store.port]
            world.settings["dsn"] = f"host={host.source} port={ports[0]} user=postgres dbname=postgres"
            world.store_dsn = f"host={host.store} port={ports[1]} user=postgres dbname=postgres"
            world.write_config().rename(self._file(number))
        self.sinks.write_files(
            self.source.dsn(tcp=True), [f"host=127.0.0.1 port={port} user=postgres dbname=postgres" for port in stores]
        )

    def _file(self, number: int) -> Path:
        return self.folder / f"bridge{number}.yaml"

    def start_bridge(self, number: int) -> None:
        """Start a bridge on its host, with a clock of its own."""
        host, path = self.hosts[number], self._file(number)
        self.clock(number).write_text("+0")
        environment = {
            "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self.clock(number)), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip
        with (self.folder / "bridge.log").open("a") as log:
            process = subprocess.Popen(
                [*host.prefix, sys.executable, "-m", "cdcbridge", "-c", str(path), "run"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, text=True,
                env={**clean_environment(), **environment},
                start_new_session=True,  # Linux gives each session a share of the processors, as hosts have
            )  # fmt: skip
        self.bridges[number : number + 1] = [process]

    def clock(self, number: int) -> Path:
        """The file that says how wrong a bridge's clock is."""
        return self.folder / f"clock{number}"

    def leader(self) -> int:
        """Which of the two leads, as the store has it."""
        holder = self.in_store("select holder from cdcbridge_internal.leaders order by epoch desc limit 1")[0][0]
        pids = [f"pid {bridge.pid}" for bridge in self.bridges]
        return next((n for n, pid in enumerate(pids) if holder.endswith(pid)), 0)

    def in_store(self, query: str) -> list[tuple[Any, ...]]:
        return ask(self.dsn(self.store), query)

    def in_source(self, query: str) -> list[tuple[Any, ...]]:
        return ask(self.dsn(self.source), query)

    @staticmethod
    def is_confirmed(lsn: str) -> str:
        """A query that returns a row once the slot has confirmed an LSN."""
        return f"select 1 from pg_replication_slots where slot_name = 'cdcbridge' and confirmed_flush_lsn >= '{lsn}'"

    # load

    def pgbench(self) -> None:
        """Again and again: it ends when its server does."""
        while not self.load_ends.is_set():
            subprocess.run(
                [self.source.binaries / "pgbench", "-n", "-h", "127.0.0.1", "-p", str(self.source.port), "-U", "postgres",
                 "-c", "3", "-R", "150", "-T", "20", "postgres"], capture_output=True, check=False, env=own_environment(),
            )  # fmt: skip

    def start_receiver(self, consumer: str) -> None:
        process = multiprocessing.get_context("spawn").Process(
            target=receive, args=(self.dsn(self.store), consumer), daemon=True
        )
        process.start()
        self.receivers.append((process, consumer))

    def mend(self, now: float) -> None:
        """End those faults whose time is over."""
        for due, mend in [entry for entry in self.mends if entry[0] <= now]:
            self.mends.remove((due, mend))
            mend()

    def close(self) -> None:
        self.load_ends.set()
        for process, _ in self.receivers:
            process.kill()
        for bridge in self.bridges:
            bridge.kill()
            bridge.wait()
        self.world.close()


def ask(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as session:
        cursor = session.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORE_SIZE},mode=755", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def _server_in(folder: Path) -> EmbeddedServer:
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        return ListeningServer(DEBIAN_15, settings=SETTINGS)
    finally:
        tempfile.tempdir = before


def receive(dsn: str, consumer: str) -> None:
    """A receiver, until it is killed: acks strictly, together with its effect. A server that is away is waited for."""
    while True:
        with contextlib.suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True) as session:
            while True:
                with session.transaction():
                    query = "select receipt, seq, key from cdcbridge.receive(%s, 200, '5 s')"
                    rows = session.execute(query, (consumer,)).fetchall()
                with session.transaction():
                    session.execute("select cdcbridge.ack(%s, %s, true)", (consumer, [row[0] for row in rows]))
                    session.cursor().executemany(
                        "insert into ledger (consumer, seq, key) values (%s, %s, %s)",
                        [(consumer, *r[1:]) for r in rows],
                    )
                if not rows:
                    time.sleep(0.05)
        time.sleep(0.2)
