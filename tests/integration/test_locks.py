"""What operators and the bridge do beside sessions that stay in their transactions: nobody else has to wait for it.

Each command runs beside an idle receiver, an idle publisher and a pg_dump that is under way, while a bridge appends, others
publish, and somebody looks at the lag. It succeeds, or it names the session that it waits for and leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import psycopg
import pytest

from cdcbridge import Queue as Client
from cdcbridge.config import Consumer
from cdcbridge.database.patience import patiently
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import Fenced, LockedOut, StoreUnavailable
from cdcbridge.routing.subscription import Subscription
from cdcbridge.store import consumers, migrate, sql_files
from cdcbridge.store import replay as backlog
from cdcbridge.store.log import BridgeStore
from tests.harness.world import World, eventually, store_database
from tests.sql.queue import StoreQueue

LONGEST = 2.0  # seconds that anybody else may wait
PATIENCE = 1.5  # seconds that a command tries; an operator's tries 30 s
RECEIVER, PUBLISHER, DUMP = "receiver", "publisher", "pg_dump"
BASE = [
    Consumer(name="c", tables=("public.t",), topics=("t",)),
    Consumer(name="doomed", tables=("public.t",), topics=("t",)),
    Consumer(name="s", tables=("public.t",), topics=("t",), mode="stream", start="earliest"),
]


class Traffic:
    """A bridge that appends, a publisher in autocommit, and `lag`: how often, and the longest wait of each."""

    def __init__(self, queue: StoreQueue) -> None:
        self._queue = queue
        self._stop = threading.Event()
        self.done = {"append": 0, "publish": 0, "lag": 0}
        self.longest = dict.fromkeys(self.done, 0.0)
        self.failed: list[BaseException] = []
        self._threads = [threading.Thread(target=self._loop, args=(name,)) for name in self.done]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.failed, self.failed
        assert all(waited < LONGEST for waited in self.longest.values()), self.longest

    def progress(self) -> None:
        """All three go on from here."""
        before = dict(self.done)
        eventually(lambda: self.failed or all(self.done[name] > before[name] for name in before), "the others go on")

    def _loop(self, name: str) -> None:
        work = getattr(self, f"_{name}")
        try:
            with psycopg.connect(self._queue.dsn, autocommit=True) as session:
                while not self._stop.wait(0.005):
                    start = time.monotonic()
                    work(session)
                    self.longest[name] = max(self.longest[name], time.monotonic() - start)
                    self.done[name] += 1
        except BaseException as error:
            self.failed.append(error)

    def _append(self, _: psycopg.Connection[Any]) -> None:
        try:
            self._queue.append_keys("x", consumers=tuple(self._ids()))
        except Fenced:  # as a bridge begins anew
            self._queue._store.begin_epoch()

    def _ids(self) -> list[int]:
        query = "select id from consumers where name in ('c', 'doomed') order by id"
        return [consumer_id for (consumer_id,) in self._queue._store.connection.execute(query).fetchall()]

    def _publish(self, session: psycopg.Connection[Any]) -> None:
        session.execute("select cdcbridge.publish('t', 'other', '1')")

    def _lag(self, session: psycopg.Connection[Any]) -> None:
        session.execute("select * from cdcbridge.consumer_lag()")


@contextlib.contextmanager
def receiver(queue: StoreQueue, _: EmbeddedServer) -> Iterator[int]:
    """It has received from a queue, and read from a stream, and does nothing more."""
    session = queue.open(autocommit=False)
    session.execute("select * from cdcbridge.receive('doomed', 1)")
    assert session.execute("select * from cdcbridge.read_stream('s', 1)").fetchone() or not _has(queue, "s")
    yield session.info.backend_pid
    session.close()


@contextlib.contextmanager
def publisher(queue: StoreQueue, _: EmbeddedServer) -> Iterator[int]:
    session = queue.open(autocommit=False)
    session.execute("select cdcbridge.publish('t', 'k', '1')")
    yield session.info.backend_pid
    session.close()


@contextlib.contextmanager
def dump(queue: StoreQueue, server: EmbeddedServer) -> Iterator[int]:
    """A pg_dump that has locked all tables of the store, and waits for one that somebody else has locked."""
    queue.session.execute("create table if not exists public.zzz ()")
    blocker = queue.open(autocommit=False)
    blocker.execute("lock table public.zzz in access exclusive mode")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    with subprocess.Popen(
        [server.binaries / "pg_dump", "--schema-only", "-f", "/dev/null", queue.dsn], env=environment
    ) as process:
        held = """select a.pid from pg_stat_activity a where a.application_name = 'pg_dump' and a.wait_event_type = 'Lock'
                  and a.datname = current_database()"""
        pid = eventually(lambda: next((row["pid"] for row in queue.all(held)), None), "pg_dump waits")
        yield pid
        blocker.close()
        assert process.wait(60) == 0


HOLDERS = {RECEIVER: receiver, PUBLISHER: publisher, DUMP: dump}


def _has(queue: StoreQueue, name: str) -> bool:
    return bool(queue.value("select exists (select from cdcbridge.consumers where name = %s) as there", name))


def applied(*more: Consumer) -> Callable[[StoreQueue, BridgeStore], Any]:
    return lambda _, store: consumers.apply(store.connection, [*BASE, *more], patience=PATIENCE)


def removed(name: str) -> Callable[[StoreQueue, BridgeStore], Any]:
    return lambda _, store: consumers.remove(store.connection, name, PATIENCE)


def executed(query: str) -> Callable[[StoreQueue, BridgeStore], Any]:
    def run(_: StoreQueue, store: BridgeStore) -> Any:
        return patiently(
            store.connection, lambda: store.connection.execute(query.encode()).fetchall(), what=query, patience=PATIENCE
        )

    return run


def replayed(queue: StoreQueue, store: BridgeStore) -> Any:
    with psycopg.connect(queue.dsn, options="-c search_path=cdcbridge,cdcbridge_internal") as reader:
        row = store.connection.execute("select id, name, mode, config from consumers where name = 'c'").fetchone()
        assert row
        return backlog.replay(store.connection, reader, Subscription.from_config(*row), 0, 1 << 40)


def dropped(_: StoreQueue, store: BridgeStore) -> Any:
    """As the bridge does: it tries again later."""
    row = store.connection.execute("select dropped, held_by from drop_segments('0')").fetchone()
    if row != (1, None):
        raise LockedOut(f"not now: {row}")


def migrated(_: StoreQueue, store: BridgeStore) -> Any:
    store.connection.execute("delete from schema_code")  # as after another version
    return migrate.migrate(store.connection, "cdcbridge", PATIENCE)


def altered(_: StoreQueue, store: BridgeStore) -> Any:
    """A migration that changes a table which everybody uses."""
    found = [*sql_files.migrations(), (9999, "test", "alter table messages add column extra int")]
    patch = pytest.MonkeyPatch()
    with patch.context() as one:
        one.setattr(sql_files, "migrations", lambda: found)
        return migrate.migrate(store.connection, "cdcbridge", PATIENCE)


def partitioned(_: StoreQueue, store: BridgeStore) -> Any:
    store.set_partitions(store.partitions() + 1)


def finish_segment(queue: StoreQueue) -> None:
    """Everything in the log's first segment is done with, and the log goes on in the next one."""
    for name in ("c", "doomed"):
        while rows := queue.receive(1000, name=name):
            queue.value("select cdcbridge.ack(%s, %s)", name, [row["receipt"] for row in rows])
    queue.value("select cdcbridge.seek('s', 'latest')")
    queue.next_segment()


def compact_and_finish_segment(queue: StoreQueue) -> None:
    queue.declare("kept", mode="stream", compact=True)
    finish_segment(queue)


EARLIEST = Consumer(name="late", tables=("public.t",), topics=("t",), start="earliest")
STREAM = Consumer(name="s2", tables=("public.t",), topics=("t",), mode="stream")
# The command, beside whom it cannot be done, and what comes before it.
COMMANDS: dict[str, tuple[Callable[[StoreQueue, BridgeStore], Any], set[str], Callable[[StoreQueue], Any] | None]] = {
    "apply a queue": (applied(Consumer(name="n", tables=("public.t",))), set(), None),
    "apply a fifo": (applied(Consumer(name="f", tables=("public.t",), topics=("t",), mode="fifo")), set(), None),
    "apply one with start: earliest": (applied(EARLIEST), {PUBLISHER}, None),
    "apply one that takes tables from the beginning": (applied(EARLIEST.model_copy(update={"topics": ()})), set(), None),
    "apply a stream": (applied(STREAM), set(), None),
    "apply the first stream": (applied(STREAM), {PUBLISHER}, lambda queue: queue.session.execute("drop index cdcbridge_internal.messages_000000_partition")),
    "apply a change": (applied(BASE[0].model_copy(update={"max_in_flight": 7})), set(), None),
    "remove a queue": (removed("doomed"), {RECEIVER, PUBLISHER, DUMP}, None),
    "remove a stream": (removed("s"), {RECEIVER}, None),
    "pause": (executed("update consumers set paused = not paused where name = 'c' returning id"), set(), None),
    "seek": (executed("select seek('s', 'earliest')"), {RECEIVER}, None),
    "replay": (replayed, set(), None),
    "backfill start": (executed("select start_backfill('c', 'public.t')"), set(), None),
    "backfill cancel": (executed("select change_backfills('c', null, '{waiting}', 'cancelled')"), set(),
                        lambda queue: queue.value("select cdcbridge_internal.start_backfill('c', 'public.t')")),
    "retention": (dropped, {RECEIVER, PUBLISHER, DUMP}, finish_segment),
    "compaction": (dropped, {RECEIVER, PUBLISHER, DUMP}, compact_and_finish_segment),
    "change of partitions": (partitioned, set(), None),
    "create segments": (executed("select create_segments(7000000)"), set(), None),
    "migrate the code": (migrated, set(), None),
    "migrate a table": (altered, {RECEIVER, PUBLISHER, DUMP}, None),
}  # fmt: skip


@pytest.fixture(params=["pg18", "pg15"])
def server(request: pytest.FixtureRequest) -> EmbeddedServer:
    found: EmbeddedServer = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_else_waits(server: EmbeddedServer, command: str, holder: str) -> None:
    run, refused, before = COMMANDS[command]
    with store_database(server) as database:
        queue = StoreQueue(server.dsn(database))
        operator = BridgeStore(queue.dsn, "cdcbridge")
        consumers.apply(operator.connection, BASE)
        queue.append_keys("x", "y", consumers=(1, 2))
        queue.value("select cdcbridge.publish('t', 'k', '1')")
        if before:
            before(queue)
            queue.append_keys("z", consumers=(1, 2))
            queue.value("select cdcbridge.publish('t', 'k', '1')")
        with Traffic(queue) as traffic:
            with HOLDERS[holder](queue, server) as pid:
                traffic.progress()
                if holder in refused:
                    schema = _schema(queue)
                    with pytest.raises(LockedOut) as raised:
                        run(queue, operator)
                    assert str(pid) in str(raised.value) or run is dropped, raised.value
                    assert _schema(queue) == schema, "nothing half done"
                else:
                    run(queue, operator)
                traffic.progress()
            if holder in refused:
                eventually(lambda: _again(run, queue, operator), "it succeeds when the holder has ended")
            traffic.progress()
        operator.close()
        queue.close()


def _again(run: Callable[[StoreQueue, BridgeStore], Any], queue: StoreQueue, operator: BridgeStore) -> bool:
    try:
        run(queue, operator)
    except LockedOut:
        return False  # a moment of the traffic
    return True


def _schema(queue: StoreQueue) -> list[Any]:
    relations = "select relname, relkind from pg_class where relnamespace in ('cdcbridge'::regnamespace, 'cdcbridge_internal'::regnamespace) order by 1"
    return [*queue.all(relations), *queue.all("select id, name, config from cdcbridge.consumers order by id")]


def _has_changes(world: World, count: int) -> bool:
    return bool(world.value("select count(*) from messages where commit_lsn is not null") >= count)


@pytest.mark.usefixtures("impatient")
def test_remove_beside_an_idle_receiver(world: World) -> None:
    """The command line and a real bridge: all others continue, and the command names the session."""
    world.execute("create table t (id int primary key)")
    world.consumer("doomed")
    world.consumer("c", topics=["t"])
    with world.bridge(), psycopg.connect(world.dsn) as idle:
        world.execute("insert into t values (1)")
        world.messages(1)
        eventually(lambda: idle.execute("select seq from cdcbridge.receive('doomed', 1)").fetchone(), "a delivery")
        removing: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(
            target=lambda: removing.append(world.run_program("consumers", "remove", "doomed", "--yes"))
        )
        thread.start()
        longest, n = 0.0, 1
        while thread.is_alive():
            n += 1
            start = time.monotonic()
            world.execute(f"insert into t values ({n})", "select cdcbridge.publish('t', 'k', '1')")
            eventually(
                functools.partial(_has_changes, world, n),
                "the bridge goes on",
            )
            assert world.value("select count(*) from consumer_lag()") == 2
            longest = max(longest, time.monotonic() - start)
        thread.join()
        (result,) = removing
        assert result.returncode == 1, result
        assert f"pid {idle.info.backend_pid}" in result.stderr and "receive('doomed', 1)" in result.stderr, (
            result.stderr
        )
        assert "idle in transaction" in result.stderr
        assert f"pg_terminate_backend({idle.info.backend_pid})" in result.stderr
        assert longest < 2 * LONGEST, longest
        idle.rollback()
        world.consumers = [c for c in world.consumers if c["name"] != "doomed"]
        result = world.run_program("consumers", "remove", "doomed", "--yes")
        assert result.returncode == 0, result.stderr
        assert world.rows("select name from consumers") == [("c",)]
        world.execute("insert into t values (0)")
        eventually(
            lambda: world.value("select count(*) from messages where commit_lsn is not null") == n + 1,
            "the bridge is back",
        )


@pytest.mark.parametrize("version", ["world15", "world18"])
@pytest.mark.parametrize("settings", [{"start": "earliest"}, {"mode": "stream"}], ids=["earliest", "first stream"])
def test_a_bridge_that_starts_names_the_publisher_that_it_waits_for(
    request: pytest.FixtureRequest, version: str, settings: dict[str, Any]
) -> None:
    """The other publishers do not wait meanwhile. When the open one ends, the bridge streams, and its message is there."""
    world: World = request.getfixturevalue(version)
    world.execute("create table t (id int primary key)")
    world.consumer("c", topics=["t"])
    with world.bridge():
        world.execute("select cdcbridge.publish('t', 'before', '1')")
    world.consumer("new", topics=["t"], **settings)
    with psycopg.connect(world.dsn) as idle:
        idle.execute("select cdcbridge.publish('t', 'open', '1')")
        process = world.start_process()
        longest, published = 0.0, 0
        # Until it has given up once, and begun anew.
        while world.log().count(f"pid {idle.info.backend_pid} (") < 3:
            assert process.poll() is None, world.log()
            start = time.monotonic()
            world.execute("select cdcbridge.publish('t', 'other', '1')")
            longest, published = max(longest, time.monotonic() - start), published + 1
            assert published < 10_000, world.log()
            time.sleep(0.02)
        assert longest < LONGEST, longest
        assert not world.active() and world.value("select count(*) from consumers where name = 'new'") == 0
        waits = next(line for line in world.log().splitlines() if "lock.waits" in line)
        assert "consumers apply" in waits and "idle in transaction since" in waits and "'open'" in waits, waits
        idle.commit()
    eventually(world.active, "it streams")
    total = published + 2 if "start" in settings else 0
    pending = {c["name"]: c["pending"] for c in world.json("lag", "--json")["consumers"]}
    assert pending == {"c": published + 2, "new": total}, pending
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.usefixtures("impatient")
def test_seek_beside_an_idle_reader_names_it(world15: World) -> None:
    world15.consumer("s", (), mode="stream", topics=["t"], start="earliest")
    assert world15.run_program("migrate").returncode == 0
    assert world15.run_program("consumers", "apply").returncode == 0
    world15.execute("select cdcbridge.publish('t', 'k', '1')")
    with psycopg.connect(world15.dsn) as idle:
        assert len(idle.execute("select * from cdcbridge.read_stream('s')").fetchall()) == 1
        result = world15.run_program("offsets", "seek", "s", "earliest")
        assert result.returncode == 1, result
        assert f"pid {idle.info.backend_pid}" in result.stderr and "read_stream('s')" in result.stderr, result.stderr
        assert "cdcbridge offsets seek s earliest" in result.stderr
        seeking: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(
            target=lambda: seeking.append(world15.run_program("offsets", "seek", "s", "earliest"))
        )
        thread.start()
        eventually(
            lambda: world15.value("select count(*) from pg_locks where not granted and locktype = 'advisory'"),
            "it waits",
        )
        idle.rollback()
        thread.join()
    assert seeking[0].returncode == 0, seeking


@pytest.mark.parametrize("version", ["world15", "world18"])
@pytest.mark.usefixtures("impatient")
def test_publish_with_a_dedup_id_names_the_open_publisher_of_the_same_one(
    request: pytest.FixtureRequest, version: str
) -> None:
    """The time is told in UTC, whatever the database's settings are."""
    world: World = request.getfixturevalue(version)
    world.consumer("c", (), topics=["t"])
    assert world.run_program("migrate").returncode == 0
    assert world.run_program("consumers", "apply").returncode == 0
    for setting in ("timezone = 'America/New_York'", "datestyle = german"):
        world.execute(f"alter database {world.database} set {setting}")
    with psycopg.connect(world.dsn, autocommit=True) as idle, Client.connect(world.dsn, "c") as client:
        idle.execute("begin")
        first = idle.execute("select cdcbridge.publish('t', 'k', '1', dedup_id => 'order-42')").fetchone()
        assert first is not None
        publish = ("publish", "t", "1", "--dedup-id", "order-42")
        result = world.run_program(*publish)
        assert result.returncode == 1, result
        pid = idle.info.backend_pid
        assert f"publish t --dedup-id order-42 waits for a lock, and nothing was changed: pid {pid}" in result.stderr
        assert " UTC, select cdcbridge.publish('t', 'k', '1', dedup_id => 'order-42')" in result.stderr, result.stderr
        with pytest.raises(StoreUnavailable, match="that published the dedup_id 'order-42' may be open"):
            client.publish("t", 1, dedup_id="order-42")
        assert world.run_program("publish", "t", "1", "--dedup-id", "order-43").returncode == 0, "others do not wait"
        waits = "select count(*) from pg_stat_activity where wait_event = 'transactionid'"
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(world.json(*publish)["seq"])),
            threading.Thread(target=lambda: answers.append(client.publish("t", 1, dedup_id="order-42"))),
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: world.value(waits) == 2, "both wait")
        idle.execute("commit")
        for thread in threads:
            thread.join()
        assert answers == [first[0]] * 2, "both get the first one's seq"
    assert world.value("select count(*) from messages") == 2


def test_seek_holds_no_partition_while_it_waits_for_another(world18: World) -> None:
    queue = StoreQueue(world18.dsn)
    queue.declare("s", mode="stream", topics=("t",), start="earliest")
    for key in "abcdefgh":
        queue.value("select cdcbridge.publish('t', %s, '1')", key)
    idle, seeker, member = queue.open(autocommit=False), queue.open(), queue.open()
    taken = 9
    idle.execute("select cdcbridge.commit_offset('s', %s, 0)", (taken,))
    thread = threading.Thread(target=lambda: seeker.execute("select cdcbridge.seek('s', 'earliest')"))
    thread.start()
    waits = "select wait_event_type = 'Lock' as waits from pg_stat_activity where pid = %s"
    eventually(lambda: queue.value(waits, seeker.info.backend_pid), "seek waits")
    for row in queue.all("select partition, seq from cdcbridge.consumer_group_offsets order by 1"):
        if row["partition"] != taken:
            member.execute("set lock_timeout = '1s'")
            member.execute("select cdcbridge.commit_offset('s', %s, %s)", (row["partition"], row["seq"]))
    idle.rollback()
    thread.join()
    queue.close()


def test_housekeeping_passes_by_what_a_receiver_in_its_transaction_has_replaced(world18: World) -> None:
    queue = StoreQueue(world18.dsn)
    queue.declare(topics=("t",))
    queue.session.execute(
        "insert into cdcbridge_internal.hints (consumer_id, waiting_floor, claim_floor, open_claims) values (1, 0, 0, '{}')"
    )
    idle = queue.open(autocommit=False)
    idle.execute("delete from cdcbridge_internal.hints where id = (select min(id) from cdcbridge_internal.hints)")
    queue.session.execute("set lock_timeout = '1s'; set search_path = cdcbridge, cdcbridge_internal")
    queue.session.execute("select cdcbridge_internal.forget_hints(), cdcbridge_internal.forget_settled()")
    idle.rollback()
    queue.session.execute("select cdcbridge_internal.forget_hints()")
    assert queue.value("select count(*) from cdcbridge_internal.hints") == 1
    queue.close()


def test_a_change_of_consumers_names_another_that_is_under_way(server: EmbeddedServer) -> None:
    with store_database(server) as database:
        queue = StoreQueue(server.dsn(database))
        operator = BridgeStore(queue.dsn, "cdcbridge")
        consumers.apply(operator.connection, BASE)
        other = queue.open(autocommit=False)
        other.execute("set local search_path = cdcbridge, cdcbridge_internal")
        other.execute("select lock_consumers()")
        changes = (applied(Consumer(name="n", tables=("public.t",))), removed("doomed"), migrated)
        with Traffic(queue) as traffic:
            for change in changes:
                with pytest.raises(LockedOut) as raised:
                    change(queue, operator)
                assert str(other.info.backend_pid) in str(raised.value)
            traffic.progress()
            other.rollback()
            for change in changes:
                eventually(functools.partial(_again, change, queue, operator))
        operator.close()
        queue.close()
