"""The Python clients, both by the same tests: the asynchronous one through a proxy that waits for each call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from cdcbridge import AsyncMessage, AsyncQueue, StaleReceipt
from cdcbridge import Queue as SyncQueue
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import StoreUnavailable, UsageError
from tests.harness.waiting import Waiting
from tests.harness.world import PATIENCE, eventually, store_database
from tests.sql.queue import StoreQueue


@pytest.fixture
def queue(pg15: EmbeddedServer) -> Iterator[StoreQueue]:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        made.declare(topics=("t",), visibility_timeout="30s")
        yield made
        made.close()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, queue: StoreQueue) -> Iterator[Callable[..., Any]]:
    """Opens a client of the consumer c."""
    with contextlib.ExitStack() as stack:
        if request.param == "sync":

            def open_(consumer: str = "c", **named: Any) -> Any:
                return stack.enter_context(SyncQueue.connect(queue.dsn, consumer, **named))
        else:
            runner = stack.enter_context(asyncio.Runner())

            def open_(consumer: str = "c", **named: Any) -> Any:
                made = Waiting(runner.run(AsyncQueue.connect(queue.dsn, consumer, **named)), runner)
                return stack.enter_context(made)

        yield open_


def test_messages_are_acked_by_their_blocks_and_given_back_where_these_raise(queue: StoreQueue, connect: Any) -> None:
    queue.append(3)
    client = connect()
    seen: list[int] = []
    with pytest.raises(ZeroDivisionError):
        for message in client.messages(wait=0):
            with message:
                seen.append(message.data["record"]["id"])
                if len(seen) == 2:
                    raise ZeroDivisionError("oh")
    assert seen == [0, 1]
    history = queue.value("select history -> 0 ->> 'reason' from cdcbridge_internal.delayed where deliver_count = 1")
    assert history == "ZeroDivisionError: oh"
    assert [m.seq for m in client.receive()] == [3], "what had been fetched came back at once"


def test_a_message_has_what_it_was_delivered_with(queue: StoreQueue, connect: Any) -> None:
    queue.append(1)
    client = connect()
    (message,) = client.receive()
    assert (message.seq, message.topic, message.key, message.deliver_count) == (1, "public.t", "0", 1)
    assert message.data == {"op": "insert", "record": {"id": 0, "secret": "s"}, "old": None, "unchanged": []}
    assert message.position == ("0/6E", 0)
    assert client.publish("t", {"n": 1.5}, key="k") == 2
    (published,) = client.receive()
    assert (published.position, published.key, published.data["record"]) == (None, "k", {"n": 1.5})


def test_batches_are_acked_given_back_and_extended(queue: StoreQueue, connect: Any) -> None:
    queue.append(5)
    client = connect()
    batch = client.receive(10)
    assert client.ack(batch[:2]) == 2
    assert client.ack(batch[:2]) == 0
    assert client.nack(batch[2:3], delay=0, reason="again") == 1
    assert client.extend(batch[3:], 600) == 2
    assert batch[4].nack(dead=True)
    assert batch[3].ack()
    assert not batch[3].ack()
    assert [m.deliver_count for m in client.receive()] == [2]
    assert queue.states()["dead"] == 1


def test_what_is_settled_inside_its_block_is_left_alone(queue: StoreQueue, connect: Any) -> None:
    queue.append(2)
    one, two = connect().receive()
    with one:
        one.nack(delay=3600)
    with contextlib.suppress(ZeroDivisionError), two:
        two.ack()
        raise ZeroDivisionError
    assert queue.states() == {"pending": 1, "in_flight": 0, "dead": 0}


def test_an_ack_in_the_callers_transaction_is_strict(queue: StoreQueue) -> None:
    queue.session.execute("create table effect (seq bigint)")
    queue.append(2)
    with SyncQueue.connect(queue.dsn, "c") as client, psycopg.connect(queue.dsn) as mine:
        one, two = client.receive()
        mine.execute("insert into effect values (1)")
        assert client.ack([one], connection=mine) == 1
        mine.commit()
        two.ack()
        mine.execute("insert into effect values (2)")
        with pytest.raises(StaleReceipt, match="stale receipt for consumer 'c': 2-"):
            client.ack([two], connection=mine)
        mine.rollback()
    assert queue.value("select count(*) from effect") == 1


def test_an_asynchronous_ack_in_the_callers_transaction(queue: StoreQueue) -> None:
    async def work() -> None:
        queue.append(1)
        async with await AsyncQueue.connect(queue.dsn, "c") as client:
            (message,) = await client.receive()
            async with await psycopg.AsyncConnection.connect(queue.dsn) as mine:
                assert await client.ack([message], connection=mine) == 1
                await mine.rollback()
                assert await client.ack([message], connection=mine) == 1

    asyncio.run(work())


def test_a_waiting_reader_is_woken_and_not_by_others(queue: StoreQueue, connect: Any) -> None:
    other = queue.declare("other", topics=("u",))
    client = connect()
    timers = [threading.Timer(0.2, queue.append, (1, other)), threading.Timer(0.4, queue.append, (1,))]
    started = time.monotonic()
    for timer in timers:
        timer.start()
    (message,) = client.receive(wait=10)
    assert 0.3 < time.monotonic() - started < 3
    for timer in timers:
        timer.join()
    assert message.seq == 2


def test_a_waiting_reader_is_there_when_a_timeout_or_a_delay_ends(queue: StoreQueue, connect: Any) -> None:
    put = queue.append(1)
    client = connect()
    client.receive(visibility_timeout=0.3)
    (again,) = client.receive(wait=10)
    assert (again.seq, again.deliver_count) == (put[0], 2)
    again.nack(delay=0.3)
    started = time.monotonic()
    assert client.receive(wait=10)[0].deliver_count == 3
    late = client.publish("t", 1, delay=0.3)
    assert [m.seq for m in client.receive(wait=10)] == [late]
    assert time.monotonic() - started < 5


def test_a_lost_session_is_made_anew(queue: StoreQueue, connect: Any) -> None:
    client = connect()
    kill = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'cdcbridge client%'"
    timers = [
        threading.Timer(0.2, queue.session.execute, (kill,)),
        threading.Timer(0.6, queue.append, (2,)),
    ]
    for timer in timers:
        timer.start()
    batch = client.receive(wait=10)
    for timer in timers:
        timer.join()
    assert len(batch) == 2
    assert client.ack(batch[:1]) == 1
    queue.session.execute(kill)
    assert client.ack(batch[1:]) == 1


def test_behind_a_pooler_it_looks_now_and_then(queue: StoreQueue, connect: Any) -> None:
    client = connect(poll_interval=0.1)
    timer = threading.Timer(0.3, queue.append, (1,))
    timer.start()
    started = time.monotonic()
    assert len(client.receive(wait=10)) == 1
    assert time.monotonic() - started < 3
    timer.join()


def test_a_client_polls_behind_a_pooler() -> None:
    made = SyncQueue("host=nowhere", "c", "cdcbridge", None)
    made._note_consumer((1, "queue"))
    assert (made._pooled, made.poll_interval) == (False, None)
    made._pooled = True
    made._note_consumer((1, "queue"))
    assert made.poll_interval == 1.0


def test_stop_when_empty_and_stop(queue: StoreQueue, connect: Any) -> None:
    queue.append(25)
    client = connect()
    count = 0
    for message in client.messages(wait=0, stop_when_empty=True):
        with message:
            count += 1
    assert count == 25
    queue.append(25)
    for message in client.messages(wait=5):
        with message:
            count += 1
            client.stop()
    assert count == 26
    assert queue.states() == {"pending": 24, "in_flight": 0, "dead": 0}


def test_messages_that_wait_their_turn_do_not_expire(queue: StoreQueue, connect: Any) -> None:
    queue.declare(topics=("t",), visibility_timeout="2s")
    queue.append(6)
    seen = []
    for message in connect().messages(wait=0, stop_when_empty=True):
        with message:
            seen.append((message.seq, message.deliver_count))
            threading.Event().wait(0.6)
    assert seen == [(n, 1) for n in range(1, 7)]


def test_in_fifo_what_went_back_with_a_failed_one_is_not_handled(queue: StoreQueue, connect: Any) -> None:
    consumer = queue.declare("f", mode="fifo", retry_delay={"initial": "0s", "max": "0s"})
    queue.append_keys("a", "b", "a", "c", consumers=(consumer,))
    client = connect("f")
    seen: list[str] = []
    for message in client.messages(wait=0, stop_when_empty=True):
        seen.append(message.key)
        if len(seen) == 1:
            message.nack()
        else:
            message.ack()
    assert seen == ["a", "b", "c", "a", "a"]


@pytest.mark.parametrize("consumer", ["nobody", None])
def test_a_wrong_name_is_an_error_at_once(connect: Any, consumer: str | None) -> None:
    with pytest.raises(UsageError, match="no consumer named"):
        connect(consumer)


def test_a_store_that_is_not_there(queue: StoreQueue) -> None:
    with pytest.raises(StoreUnavailable):
        SyncQueue.connect("host=/nowhere", "c")


# workers


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_worker_handles_all_and_keeps_order_by_key(queue: StoreQueue, mode: str) -> None:
    consumer = queue.declare("w", mode=mode, retry_delay={"initial": "0s", "max": "0s"}, max_deliveries=50)
    queue.append_keys(*[str(n % 7) for n in range(300)], consumers=(consumer,))
    done: dict[str | None, list[int]] = {}
    lock = threading.Lock()
    with SyncQueue.connect(queue.dsn, "w") as client:

        @client.worker(concurrency=8, wait=1)
        def handle(message: Any) -> None:
            if message.seq % 10 == 0 and message.deliver_count < 3:
                raise ValueError("not yet")
            with lock:
                done.setdefault(message.key, []).append(message.seq)
                if sum(map(len, done.values())) == 300:
                    client.stop()

        handle.run()
    assert sorted(seq for found in done.values() for seq in found) == list(range(1, 301))
    if mode == "fifo":
        assert all(found == sorted(found) for found in done.values())
    assert queue.value("select count(*) from cdcbridge.consumer_messages") == 0


def test_an_asynchronous_worker(queue: StoreQueue) -> None:
    queue.append(50)
    running = most = 0

    async def work() -> None:
        client = await AsyncQueue.connect(queue.dsn, "c")
        seen: set[int] = set()

        @client.worker(concurrency=5, wait=1)
        async def handle(message: AsyncMessage) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            seen.add(message.seq)
            if len(seen) == 50:
                client.stop()

        async with client:
            await handle.run()

    asyncio.run(work())
    assert most == 5
    assert queue.states() == {"pending": 0, "in_flight": 0, "dead": 0}


def test_long_work_is_extended(queue: StoreQueue) -> None:
    queue.declare(topics=("t",), visibility_timeout="600ms")
    queue.append(1)
    counts: list[int] = []
    with SyncQueue.connect(queue.dsn, "c") as client:

        @client.worker(wait=1)
        def handle(message: Any) -> None:
            counts.append(message.deliver_count)
            threading.Event().wait(2)
            client.stop()

        handle.run()
    assert counts == [1]
    assert queue.states() == {"pending": 0, "in_flight": 0, "dead": 0}


PROGRAM = r"""
import sys, time
from cdcbridge import Queue
queue = Queue.connect(sys.argv[1], "c")
@queue.worker(concurrency=2)
def handle(message):
    print(f"{message.seq}\n", end="", flush=True)
    time.sleep(1)
    print("done\n", end="", flush=True)
handle.run()
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_handled_end(queue: StoreQueue, number: signal.Signals) -> None:
    queue.append(10)
    command = [sys.executable, "-c", PROGRAM, queue.dsn]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        assert {process.stdout.readline().strip() for _ in range(2)} == {"1", "2"}
        process.send_signal(number)
        rest = process.stdout.read().split()
        assert process.wait(PATIENCE) == 0
    assert rest == ["done", "done", "ended"]
    eventually(lambda: queue.states() == {"pending": 8, "in_flight": 0, "dead": 0}, "two were acked, none is held")
