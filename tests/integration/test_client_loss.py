"""Lost sessions, servers that are away, read-only or silent: every call of a client goes on trying, and never without end."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from cdcbridge import AsyncQueue, Queue, Stream
from cdcbridge.client import _sessions
from cdcbridge.errors import StoreUnavailable
from tests.conftest import FAST
from tests.harness.proxy import Proxy
from tests.harness.standby import Standby
from tests.harness.world import PATIENCE, eventually, store_database
from tests.integration.conftest import through
from tests.integration.test_client_leaving import publish, unfinished
from tests.sql.queue import StoreQueue

KILL = "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name like 'cdcbridge client%'"


@contextmanager
def away_for(proxy: Proxy, seconds: float) -> Any:
    """The database is away, and comes back while the block runs."""
    proxy.away = True
    timer = threading.Timer(seconds, setattr, (proxy, "away", False))
    timer.start()
    yield
    timer.join()


def test_what_ends_a_delivery_is_tried_until_the_lease_ends(store: StoreQueue, opened: Any, proxy: Proxy) -> None:
    put = publish(store, *"abcd")
    client = opened(dsn=through(store, proxy))
    batch = client.receive()
    with away_for(proxy, 2):
        assert client.ack(batch[:1]) == 1
    with away_for(proxy, 1):
        assert client.nack(batch[1:2], delay=600) == 1
    with away_for(proxy, 1):
        assert client.extend(batch[2:3], 60) == 1
    with away_for(proxy, 1), batch[3]:
        pass
    assert sorted(unfinished(store)) == put[1:3]


def test_a_worker_handles_once_although_the_database_was_away(store: StoreQueue, proxy: Proxy) -> None:
    publish(store, *"abc")
    counts: list[int] = []
    with Queue.connect(through(store, proxy), "c") as client:

        @client.worker(concurrency=1)
        def handle(message: Any) -> None:
            counts.append(message.deliver_count)
            if len(counts) == 1:
                proxy.away = True
                threading.Timer(2, setattr, (proxy, "away", False)).start()
            if len(counts) == 3:
                client.stop()

        handle.run()
    assert counts == [1, 1, 1]
    assert unfinished(store) == {}


def test_calls_of_a_stream_are_tried_until_the_lease_ends(store: StoreQueue, opened: Any, proxy: Proxy) -> None:
    put = publish(store, "a", "a")
    stream = opened("s", through(store, proxy), lease=20)
    with away_for(proxy, 1):
        batch = stream.read(1, wait=5)
    with away_for(proxy, 1):
        batch.extend()
    with away_for(proxy, 2):
        assert batch.commit() is True
    with away_for(proxy, 1):
        assert sum(standing.messages for standing in stream.offsets()) == 1
    with away_for(proxy, 1):
        stream.seek("earliest")
    assert [m.seq for m in stream.messages(wait=0, stop_when_empty=True)] == put


def test_an_idle_session_that_was_ended_costs_nobody_an_error(store: StoreQueue, opened: Any) -> None:
    client, stream = opened(), opened("s")
    for use in (
        lambda: client.publish("t", 1),
        lambda: client.publish("t", 1, dedup_id="one"),
        lambda: client.ack(client.receive(1)),
        stream.offsets,
        lambda: stream.read().commit(),
        lambda: stream.seek("latest"),
    ):
        store.session.execute(KILL)
        assert use()
    assert store.value("select count(*) from cdcbridge.messages") == 2


def test_publish_never_publishes_twice(store: StoreQueue, monkeypatch: Any) -> None:
    """The answer is lost after the statement ran: only a dedup id makes a second attempt safe."""
    with Queue.connect(store.dsn, "c") as client:
        client.publish("t", 0)
        original = _sessions.Sessions._rows
        lost = itertools.count()

        def rows(self: Any, session: Any, query: Any, values: Any, rescue: Any = None) -> Any:
            found = original(self, session, query, values, rescue)
            if query is client._sql.publish and next(lost) % 2 == 0:
                session.close()
                raise StoreUnavailable("the answer was lost")
            return found

        monkeypatch.setattr(_sessions.Sessions, "_rows", rows)
        with pytest.raises(StoreUnavailable, match="not known whether the message was published"):
            client.publish("t", 1)
        next(lost)
        assert client.publish("t", 2, dedup_id="one") == 3
    assert store.value("select count(*) from cdcbridge.messages") == 3


def test_publish_is_tried_again_where_the_server_said_no(store: StoreQueue, proxy: Proxy) -> None:
    with Queue.connect(through(store, proxy), "c") as client, psycopg.connect(store.dsn) as mine:
        mine.execute("lock table cdcbridge.messages in access exclusive mode")
        timer = threading.Timer(5, mine.rollback)  # longer than a statement may take
        timer.start()
        client.publish("t", 1)
        timer.join()
    assert store.value("select count(*) from cdcbridge.messages") == 1


@pytest.mark.parametrize("answer_lost", ["ack", "commit"])
def test_an_answer_that_was_lost_is_no_failure(store: StoreQueue, monkeypatch: Any, answer_lost: str) -> None:
    publish(store, "a")
    original = _sessions.Sessions._rows
    losses: list[Any] = []

    def rows(self: Any, session: Any, query: Any, values: Any, rescue: Any = None) -> Any:
        found = original(self, session, query, values, rescue)
        if query is getattr(self._sql, answer_lost, None) and not losses:
            losses.append(query)
            session.close()
            raise StoreUnavailable("the answer was lost")
        return found

    monkeypatch.setattr(_sessions.Sessions, "_rows", rows)
    if answer_lost == "ack":
        with Queue.connect(store.dsn, "c") as client:
            assert client.receive()[0].ack() is True
    else:
        with Stream.connect(store.dsn, "s") as stream:
            batch = stream.read()
            assert batch is not None and batch.commit() is True
    assert losses


SILENT: list[tuple[str, Callable[[Any, Any], Any], float]] = [
    ("c", lambda client, _: client.receive(wait=3), 3),
    ("c", lambda client, _: client.receive(wait=0), 0),
    ("s", lambda client, _: client.read(wait=3), 3),
    ("c", lambda client, _: client.publish("t", 1), 10),
    ("c", lambda client, message: message.ack(), 2),
]


@pytest.mark.parametrize(("consumer", "call", "allowed"), SILENT)
@pytest.mark.parametrize("opened", ["sync"], indirect=True)
def test_a_proxy_that_answers_but_not_in_sql(
    store: StoreQueue, opened: Any, proxy: Proxy, consumer: str, call: Any, allowed: float
) -> None:
    store.declare(topics=("t",), visibility_timeout="2s")
    publish(store, "a")
    client = opened(consumer, through(store, proxy))
    message = client.receive()[0] if consumer == "c" else client.read()
    proxy.silent = True
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        call(client, message)
    assert time.monotonic() - started < allowed + 7
    proxy.silent = False


def test_an_asynchronous_client_behind_a_silent_proxy(store: StoreQueue, proxy: Proxy) -> None:
    async def work() -> float:
        async with await AsyncQueue.connect(through(store, proxy), "c") as client:
            proxy.silent = True
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await client.receive(wait=1)
            took = time.monotonic() - started
            proxy.silent = False
            publish(store, "a")
            assert len(await client.receive(wait=PATIENCE)) == 1
        return took

    assert asyncio.run(work()) < 8


def test_connecting_through_a_silent_proxy_ends(store: StoreQueue, proxy: Proxy) -> None:
    proxy.silent = True
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        Queue.connect(through(store, proxy), "c")
    assert time.monotonic() - started < 8


def test_a_long_poll_that_meets_silence_finds_its_way(store: StoreQueue, proxy: Proxy) -> None:
    """The message is published while nothing passes, so a later attempt of the same call finds it."""
    with Queue.connect(through(store, proxy), "c") as client:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(client.receive(wait=PATIENCE)))
        thread.start()
        eventually(client._reading.locked)
        proxy.silent = True
        threading.Timer(3, setattr, (proxy, "silent", False)).start()
        store.declare(topics=("t",), visibility_timeout="2s")  # an answer that was under way may hold the message
        publish(store, "a")
        thread.join(PATIENCE)
    assert len(found) == 1


def test_a_message_whose_answer_met_silence_comes_again(store: StoreQueue, proxy: Proxy) -> None:
    """The claim is committed and its answer lost: the same call receives the message after its visibility timeout."""
    store.declare(topics=("t",), visibility_timeout="2s")
    with Queue.connect(through(store, proxy), "c") as client:
        publish(store, "a")
        proxy.delay = 3  # seconds to see the lease and silence the proxy, on a busy machine
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(client.receive(wait=PATIENCE)))
        thread.start()
        eventually(lambda: store.value("select count(*) from cdcbridge_internal.leases"))
        proxy.silent, proxy.delay = True, 0.0  # the answer is in its delay
        threading.Timer(4, setattr, (proxy, "silent", False)).start()
        thread.join(PATIENCE)
    assert [message.deliver_count for message in found] == [2]


def test_a_look_does_not_wait_for_another_threads_long_poll(store: StoreQueue) -> None:
    with Queue.connect(store.dsn, "c") as client:
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.extend(client.receive(1, wait=PATIENCE))) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(client._reading.locked)
        for wait in (0, 0.3):
            started = time.monotonic()
            assert client.receive(wait=wait) == []
            assert time.monotonic() - started < wait + 0.4
        put = publish(store, *"abc")
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(message.seq for message in found) == put, "each of them, woken or after the other"
        assert client.ack(found) == 3


def test_an_asynchronous_look_does_not_wait_for_another_tasks_long_poll(store: StoreQueue) -> None:
    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "c") as client:
            polls = [asyncio.create_task(client.receive(1, wait=PATIENCE)) for _ in range(2)]
            while not client._reading.locked():  # noqa: ASYNC110 - a lock tells nobody
                await asyncio.sleep(0.01)
            async with asyncio.timeout(1):
                assert await client.receive() == []
            put = await asyncio.to_thread(publish, store, *"ab")
            found = [message for messages in await asyncio.gather(*polls) for message in messages]
            assert sorted(message.seq for message in found) == put

    asyncio.run(work())


def test_a_read_only_moment_is_waited_for(pg15: Any, pg18: Any) -> None:
    """The address leads to a standby, which is promoted: a worker and a loop go on."""
    for server in (pg15, pg18):
        with store_database(server) as database:
            store = StoreQueue(server.dsn(database))
            store.declare(topics=("t",))
            with Standby(server, settings=FAST) as standby, Queue.connect(server.dsn(database), "c") as client:
                publish(store, *"ab")
                there = standby.dsn(database)
                with psycopg.connect(there, autocommit=True) as other:
                    count = "select count(*) from cdcbridge.messages"
                    eventually(lambda: other.execute(count).fetchone() == (2,))  # noqa: B023
                client._dsn = there
                for session in (client._reader, client._writer):
                    if session is not None:
                        session.close()
                seen: list[int] = []

                @client.worker()
                def handle(message: Any, seen: list[int] = seen, client: Queue = client) -> None:
                    seen.append(message.seq)
                    if len(seen) == 2:
                        client.stop()

                with pytest.raises(StoreUnavailable):
                    client.receive(wait=1)
                threading.Timer(1, standby.promote).start()
                handle.run()
            store.close()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_worker_whose_sessions_are_ended_all_the_time_loses_nothing(store: StoreQueue, asynchronous: bool) -> None:
    store.declare("f", mode="fifo", topics=("t",), visibility_timeout="2s", max_deliveries=100)
    put = publish(store, *[str(n % 5) for n in range(40)])
    done: dict[str, list[int]] = {}
    ended = threading.Event()

    def end_sessions() -> None:
        with psycopg.connect(store.dsn, autocommit=True) as other:
            while not ended.wait(0.7):
                other.execute(KILL.replace(", 5000", ""))

    def note(message: Any, stop: Callable[[], None]) -> None:
        done.setdefault(message.key, []).append(message.seq)
        if len({seq for seqs in done.values() for seq in seqs}) == len(put):
            ended.set()
            stop()

    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "f") as client:

            @client.worker(concurrency=4, wait=1)
            async def handle(message: Any) -> None:
                await asyncio.sleep(0.02)
                note(message, client.stop)

            await handle.run()

    thread = threading.Thread(target=end_sessions)
    thread.start()
    if asynchronous:
        asyncio.run(work())
    else:
        with Queue.connect(store.dsn, "f") as client:

            @client.worker(concurrency=4, wait=1)
            def handle(message: Any) -> None:
                threading.Event().wait(0.02)
                note(message, client.stop)

            handle.run()
    thread.join()
    for seqs in done.values():
        assert list(dict.fromkeys(seqs)) == sorted(set(seqs)), "first handled in order"
    assert store.value("select count(*) from cdcbridge.dead_messages") == 0
