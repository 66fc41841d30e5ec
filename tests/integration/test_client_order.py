"""What comes next: in fifo only a committed ack lets the next message of a key out; and no handler begins without a lease."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from typing import Any

import psycopg
import pytest

from cdcbridge import AsyncQueue, AsyncStream, Message, Queue, Stream
from cdcbridge.errors import UsageError
from tests.harness.world import PATIENCE, eventually
from tests.integration.test_client_leaving import free, publish, unfinished
from tests.sql.queue import StoreQueue


def test_an_ack_that_was_rolled_back_lets_nothing_out(store: StoreQueue) -> None:
    put = publish(store, *"aaa")
    done: list[int] = []
    with Queue.connect(store.dsn, "f") as client, psycopg.connect(store.dsn) as mine:
        rolled_back = False
        for message in client.messages(wait=0, stop_when_empty=True):
            client.ack([message], connection=mine)
            if rolled_back:
                mine.commit()
                done.append(message.seq)
            else:
                mine.rollback()
                rolled_back = True
    assert done == put
    assert unfinished(store, "f") == {}


@pytest.mark.parametrize("end", ["open", "savepoint", "not acked", "other connection"])
def test_everything_but_a_committed_ack_gives_the_key_back(store: StoreQueue, end: str) -> None:
    put = publish(store, *"aaab")
    seen: list[int] = []
    with Queue.connect(store.dsn, "f") as client, psycopg.connect(store.dsn) as mine:
        for message in client.messages(wait=0, stop_when_empty=True):
            seen.append(message.seq)
            if message.key == "b":
                message.ack()
            elif end == "savepoint":
                with mine.transaction(force_rollback=True):
                    mine.execute("select 1")
                    client.ack([message], connection=mine)
                break
            elif end in {"open", "other connection"}:
                client.ack([message], connection=mine)
        if end == "savepoint":
            return
        mine.rollback()
    assert seen == [put[0], put[3]]
    states = unfinished(store, "f")
    assert states[put[0]][0] == 1
    assert {seq: states[seq] for seq in put[1:3]} == free(*put[1:3])


def test_a_savepoint_that_was_rolled_back_is_no_ack(store: StoreQueue) -> None:
    put = publish(store, *"aa")
    with Queue.connect(store.dsn, "f") as client, psycopg.connect(store.dsn) as mine:
        messages = client.messages(wait=0, stop_when_empty=True)
        message = next(messages)
        with mine.transaction():
            with mine.transaction(force_rollback=True):
                client.ack([message], connection=mine)
            mine.execute("select 1")
        assert [m.seq for m in messages] == [put[0]], "it comes again, and the next one waits for it"
        messages.close()


def test_an_ack_that_came_too_late_lets_nothing_out(store: StoreQueue, opened: Any) -> None:
    put = publish(store, *"aab")
    client = opened("f")
    seen = []
    for message in client.messages(wait=0, stop_when_empty=True):
        seen.append(message.seq)
        if len(seen) == 1:
            store.session.execute(
                "update cdcbridge_internal.leases set not_visible_until = now() - interval '1 s' where 'a' = any (keys)"
            )
            taken = [row["seq"] for row in store.receive(10, "60 s", name="f") if row["key"] == "a"]
            assert taken == put[:2]
            assert not message.ack()
    assert seen[0] == put[0] and put[1] not in seen


def test_an_ack_that_was_repeated_after_a_rollback_counts(store: StoreQueue) -> None:
    put = publish(store, *"aa")
    seen = []
    with Queue.connect(store.dsn, "f") as client, psycopg.connect(store.dsn) as mine:
        for message in client.messages(wait=0, stop_when_empty=True):
            client.ack([message], connection=mine)
            mine.rollback()
            client.ack([message], connection=mine)
            mine.commit()
            seen.append((message.seq, message.deliver_count))
    assert seen == [(seq, 1) for seq in put]


def test_a_committed_ack_lets_the_next_one_out_at_once(store: StoreQueue) -> None:
    put = publish(store, *"aaa")

    async def work() -> list[int]:
        seen = []
        async with (
            await AsyncQueue.connect(store.dsn, "f") as client,
            await psycopg.AsyncConnection.connect(store.dsn) as mine,
        ):
            async for message in client.messages(wait=0, stop_when_empty=True):
                assert message.deliver_count == 1
                await client.ack([message], connection=mine)
                await mine.commit()
                await mine.execute("select 1")  # the next transaction is open already
                seen.append(message.seq)
        return seen

    assert asyncio.run(work()) == put


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_worker_whose_ack_is_rolled_back(store: StoreQueue, asynchronous: bool) -> None:
    put = publish(store, *"aaa")
    done: list[int] = []
    failed: list[int] = []

    def note(message: Any, stop: Any) -> bool:
        """Whether to roll back."""
        if not failed:
            failed.append(message.seq)
            return True
        done.append(message.seq)
        if len(done) == 3:
            stop()
        return False

    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "f") as client:

            @client.worker(concurrency=4)
            async def handle(message: Any) -> None:
                async with await psycopg.AsyncConnection.connect(store.dsn) as mine, mine.transaction() as transaction:
                    await client.ack([message], connection=mine)
                    if note(message, client.stop):
                        raise psycopg.Rollback(transaction)

            await handle.run()

    if asynchronous:
        asyncio.run(work())
    else:
        with Queue.connect(store.dsn, "f") as client:

            @client.worker(concurrency=4)
            def handle(message: Message) -> None:
                with psycopg.connect(store.dsn) as mine, mine.transaction() as transaction:
                    client.ack([message], connection=mine)
                    if note(message, client.stop):
                        raise psycopg.Rollback(transaction)

            handle.run()
    assert done == put
    assert unfinished(store, "f") == {}


def test_a_block_that_raises_after_its_ack_gives_the_message_back(store: StoreQueue) -> None:
    publish(store, "a")
    with Queue.connect(store.dsn, "c") as client, psycopg.connect(store.dsn) as mine:
        (message,) = client.receive()
        with pytest.raises(ZeroDivisionError), message, mine.transaction():
            client.ack([message], connection=mine)
            raise ZeroDivisionError
        (again,) = client.receive()
        assert again.deliver_count == 2
        with pytest.raises(ZeroDivisionError), again:
            again.ack()
            raise ZeroDivisionError
    assert unfinished(store) == {}


STOPPED = r"""
import sys
from cdcbridge import Queue
queue = Queue.connect(sys.argv[1], "c")
@queue.worker(concurrency=4)
def handle(message):
    print(message.seq, flush=True)
    sys.stdin.readline()
{loop}
"""
LOOPS = {
    "worker": "handle.run()",
    "messages": "for message in queue.messages():\n    handle(message)\n    message.ack()",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_process_that_was_stopped_begins_nothing_that_expired_meanwhile(store: StoreQueue, loop: str) -> None:
    store.declare(topics=("t",), visibility_timeout="1s")
    put = publish(store, *"aaa")
    command = [sys.executable, "-c", STOPPED.format(loop=LOOPS[loop]), store.dsn]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert int(process.stdout.readline()) == put[0]
        process.send_signal(signal.SIGSTOP)
        try:
            taken = eventually(lambda: store.receive(10, "60 s"), "all of it expired, and is another receiver's")
            while len(taken) < 3:
                taken += eventually(lambda: store.receive(10, "60 s"))
            (fresh,) = publish(store, "b")
        finally:
            process.send_signal(signal.SIGCONT)
        process.stdin.write("\n" * 5)
        process.stdin.flush()
        seen = []
        while fresh not in seen:
            seen.append(int(process.stdout.readline()))
        process.kill()
        seen += [int(line) for line in process.stdout.read().split()]
    assert seen == [fresh], "nothing that another receiver has"


def test_a_message_that_expired_before_its_turn_is_passed_over(store: StoreQueue, opened: Any) -> None:
    put = publish(store, *"abc")
    client = opened()
    messages = client.messages(wait=0, stop_when_empty=True)
    first = next(messages)
    store.expire()
    for row in store.receive(10, "60 s"):
        assert row["deliver_count"] == 2
    seen = [first.seq]
    for held in list(client._unbegun if not hasattr(client, "_target") else client._target._unbegun):
        held._ends = 0.0  # as if half of it had passed
    seen += [message.seq for message in messages]
    assert seen == put[:1]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["messages", "batches"])
def test_the_lease_of_a_stream_is_kept_while_a_slow_handler_runs(
    store: StoreQueue, asynchronous: bool, how: str
) -> None:
    put = publish(store, *"aaa")
    seen: list[int] = []

    def slow() -> None:
        with Stream.connect(store.dsn, "s", lease=0.4) as stream:
            if how == "messages":
                for message in stream.messages(wait=0, stop_when_empty=True):
                    seen.append(message.seq)
                    threading.Event().wait(1)
            for batch in stream.batches(wait=0, stop_when_empty=True):
                with batch:
                    seen.extend(message.seq for message in batch.messages)
                    threading.Event().wait(1)

    async def slowly() -> None:
        async with await AsyncStream.connect(store.dsn, "s", lease=0.4) as stream:
            if how == "messages":
                async for message in stream.messages(wait=0, stop_when_empty=True):
                    seen.append(message.seq)
                    await asyncio.sleep(1)
            async for batch in stream.batches(wait=0, stop_when_empty=True):
                async with batch:
                    seen.extend(message.seq for message in batch.messages)
                    await asyncio.sleep(1)

    asyncio.run(slowly()) if asynchronous else slow()
    assert seen == put


def test_the_message_that_is_handled_in_a_loop_is_kept_too(store: StoreQueue) -> None:
    store.declare(topics=("t",), visibility_timeout="400ms", max_deliveries=2)
    put = publish(store, *"abc")
    with Queue.connect(store.dsn, "c") as client:
        seen = []
        for message in client.messages(wait=0, stop_when_empty=True):
            threading.Event().wait(1)
            seen.append((message.seq, message.deliver_count))
            assert message.ack()
    assert seen == [(seq, 1) for seq in put]


def test_a_batch_is_not_read_where_nothing_would_hold_it(store: StoreQueue) -> None:
    publish(store, "a")
    with Stream.connect(store.dsn, "s") as stream:
        with psycopg.connect(store.dsn, autocommit=True) as mine:
            with pytest.raises(UsageError, match="autocommit"):
                stream.read(connection=mine)
            with mine.transaction():
                batch = stream.read(connection=mine)
                assert batch is not None and stream.read() is None, "the transaction holds it"
                batch.commit()
        with (
            psycopg.connect(store.dsn, client_encoding="LATIN1") as mine,
            pytest.raises(UsageError, match="client_encoding is LATIN1"),
        ):
            stream.read(connection=mine)


def test_a_time_without_a_zone_is_no_place(store: StoreQueue, opened: Any) -> None:
    with pytest.raises(UsageError, match="has no time zone"):
        opened("s").seek(datetime(2026, 1, 1))  # noqa: DTZ001 - that is it


def test_a_client_is_woken_after_its_consumer_was_removed_and_made_again(store: StoreQueue) -> None:
    started = time.monotonic()
    with Queue.connect(store.dsn, "c") as client:
        found: list[Message] = []
        thread = threading.Thread(target=lambda: found.extend(client.receive(wait=PATIENCE)))
        thread.start()
        listening = "select count(*) from pg_stat_activity where query like '%next_visible%' and state = 'idle'"
        eventually(lambda: store.value(listening))
        store.session.execute("select cdcbridge_internal.remove_consumer('c')")
        store.declare(topics=("t",))
        publish(store, "a")
        thread.join(PATIENCE)
    assert len(found) == 1
    assert time.monotonic() - started < 8, "by the notification, not by the next look"
