"""Two bridges on one slot: whatever happens to the one that leads, the other streams within five seconds, and nothing is
lost or written twice, also when the first one comes back.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.instants import Instant
from tests.harness.listening import ListeningServer
from tests.harness.netns import Host
from tests.harness.world import Running, World, eventually, fresh_database

WITHIN = 5.0


class Pair:
    """A world whose leader runs on a host of its own, and a stand-by that runs here."""

    def __init__(self, world: World, host: Host) -> None:
        self.world, self.host = world, host
        self.second = 0  # pid
        self.written = 0

    def start(self, crash: tuple[Instant, int] | None = None) -> Running:
        world, port = self.world, self.world.server.port
        world.settings["dsn"] = f"host={self.host.source} port={port} user=postgres dbname={world.database}"
        world.store_dsn = f"host={self.host.store} port={port} user=postgres dbname={world.database}"
        world.write_config().rename(world.folder / "second.yaml")
        leader = world.start_process(crash=crash, prefix=self.host.prefix, environment={"CRASH_SIGNAL": "SIGSTOP"})
        eventually(
            lambda: "bridge.streaming" in world.log() or (crash and leader.poll() is not None), "the first leads"
        )
        (world.folder / "second.yaml").replace(world.folder / "cdcbridge.yaml")
        self.second = world.start_process().pid
        eventually(lambda: "bridge.standby" in world.log(), "the second stands by")
        return leader

    def taken_over(self, since: float) -> float:
        """Seconds until something that was committed after `since` is in the log."""
        number = self.written
        eventually(lambda: self.written > number + 1, "the writer goes on")
        key = str(self.written)
        eventually(lambda: self.world.rows("select from messages where key = %s", key), f"key {key} is in the log")
        return time.monotonic() - since

    @contextmanager
    def writer(self) -> Iterator[None]:
        """A row every 20 ms."""
        stop = threading.Event()

        def write() -> None:
            with psycopg.connect(self.world.dsn, autocommit=True) as session:
                while not stop.wait(0.02):
                    session.execute("insert into t values (%s)", (self.written + 1,))
                    self.written += 1

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def everything_once(self) -> None:
        rows = self.written
        eventually(lambda: self.world.value("select count(*) from messages") >= rows, f"{rows} rows")
        assert self.world.value("select array_agg(key::int order by seq) from messages") == list(range(1, rows + 1))
        assert self.world.value("select count(distinct seq) from consumer_messages") == rows
        assert f"pid {self.second} " in self.world.value(
            "select holder || ' ' from leaders order by epoch desc limit 1"
        )


@pytest.fixture
def pair(listening: EmbeddedServer, tmp_path: Path) -> Iterator[Pair]:
    with fresh_database(listening) as database, Host() as host:
        world = World(listening, database, "wal2json", tmp_path)
        world.execute("create table t (id int primary key)")
        world.consumer()
        yield Pair(world, host)
        world.close()


@pytest.fixture(scope="module")
def listening() -> Iterator[EmbeddedServer]:
    """A PostgreSQL 15 that listens on every address."""
    from tests.conftest import DEBIAN_15, FAST

    with ListeningServer(DEBIAN_15, settings=FAST) as server:
        yield server


def _stop_and_wake(leader: Running, _host: Host) -> Callable[[], None]:
    leader.send_signal(signal.SIGSTOP)
    return lambda: leader.send_signal(signal.SIGCONT)


def _cut(*which: str) -> Callable[[Running, Host], Callable[[], None]]:
    def cut(_leader: Running, host: Host) -> Callable[[], None]:
        addresses = [getattr(host, name) for name in which]
        host.cut(*addresses)
        return lambda: host.heal(*addresses)

    return cut


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_stop_and_wake, id="stopped"),
        pytest.param(_cut("source"), id="cut off from the source"),
        pytest.param(_cut("store"), id="cut off from the store"),
        pytest.param(_cut("source", "store"), id="cut off from both"),
    ],
)
def test_the_other_takes_over_within_five_seconds_and_the_first_comes_back_as_stand_by(
    pair: Pair, fault: Callable[[Running, Host], Callable[[], None]]
) -> None:
    leader = pair.start()
    with pair.writer():
        pair.taken_over(time.monotonic())
        since = time.monotonic()
        mend = fault(leader, pair.host)
        seconds = pair.taken_over(since)
        print(f"taken over after {seconds:.2f} s")
        assert seconds < WITHIN, pair.world.log()
        mend()
        told = pair.world.log().count("bridge.standby")
        eventually(lambda: pair.world.log().count("bridge.standby") > told, "the first one stands by")
    pair.everything_once()


def test_a_killed_leader_is_followed_within_five_seconds(pair: Pair) -> None:
    leader = pair.start()
    with pair.writer():
        pair.taken_over(time.monotonic())
        since = time.monotonic()
        leader.kill()
        assert pair.taken_over(since) < WITHIN, pair.world.log()
    pair.everything_once()


@pytest.mark.parametrize(
    "instant", ["append begun", "rows copied", "position written", "committed", "about to confirm"]
)
def test_a_leader_that_hangs_in_an_append_cannot_finish_it_after_the_other_has_taken_over(
    pair: Pair, instant: Instant
) -> None:
    """It holds the fence of its epoch, and its transaction, when it is stopped; woken, it must not write a thing."""
    count = 3 if instant != "about to confirm" else 12
    leader = pair.start(crash=(instant, count))
    with pair.writer():
        eventually(lambda: _stopped(leader.pid), f"the leader is stopped: {instant}")
        since = time.monotonic()
        assert pair.taken_over(since) < WITHIN, pair.world.log()
        leader.send_signal(signal.SIGCONT)
        eventually(lambda: pair.world.log().count("bridge.standby") > 1, "the first one stands by")
    pair.everything_once()


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
