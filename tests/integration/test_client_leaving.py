"""What a client fetched and nobody began: it goes back at once, uncounted, in every way of leaving."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from cdcbridge import AsyncMessage, AsyncQueue, AsyncStream, Message, Queue
from tests.harness.world import PATIENCE, eventually
from tests.sql.queue import StoreQueue

UNFINISHED = "select seq, deliver_count, not_visible_until > now() as held from cdcbridge.consumer_messages"


def unfinished(store: StoreQueue, consumer: str = "c") -> dict[int, tuple[int, bool]]:
    """seq → deliver_count, and whether it is in flight, of the consumer's messages."""
    query = f"{UNFINISHED} where consumer_id = (select id from cdcbridge.consumers where name = '{consumer}')"
    return {row["seq"]: (row["deliver_count"], bool(row["held"])) for row in store.all(query)}


def free(*seqs: int, count: int = 0) -> dict[int, tuple[int, bool]]:
    return dict.fromkeys(seqs, (count, False))


@pytest.mark.parametrize("consumer", ["c", "f"])
def test_leaving_by_break_keeps_the_taken_one_alone(store: StoreQueue, opened: Any, consumer: str) -> None:
    put = publish(store, *"aaab")
    client = opened(consumer)
    for _ in range(7):  # more often than max_deliveries
        for message in client.messages(wait=0):  # noqa: B007 - used below
            break
        gc.collect()
        assert unfinished(store, consumer) == {put[0]: (message.deliver_count, True)} | free(*put[1:])
        assert message.deliver_count == 1 and message.ack()
        put = put[1:] + publish(store, "a")
    assert store.value("select count(*) from cdcbridge.dead_messages") == 0


def test_next_of_messages_takes_one(store: StoreQueue) -> None:
    put = publish(store, *"aab")
    for consumer in ("c", "f"):
        with Queue.connect(store.dsn, consumer) as client:
            message = next(client.messages(wait=0))
            assert unfinished(store, consumer) == {put[0]: (1, True)} | free(*put[1:])
            assert message.ack()


def by_return(client: Queue) -> None:
    for _ in client.messages():
        return


def by_exception(client: Queue) -> None:
    for _ in client.messages():
        raise ZeroDivisionError


def by_stop(client: Queue) -> None:
    for _ in client.messages():
        client.stop()


def by_close(client: Queue) -> None:
    for _ in client.messages():
        client.close()


@pytest.mark.parametrize("leave", [by_return, by_exception, by_stop, by_close])
def test_every_way_of_leaving_a_loop(store: StoreQueue, leave: Callable[[Queue], None]) -> None:
    put = publish(store, *"abc")
    with Queue.connect(store.dsn, "c") as client, contextlib.suppress(ZeroDivisionError):
        leave(client)
    assert unfinished(store) == {put[0]: (1, True)} | free(*put[1:])


async def async_return(client: AsyncQueue) -> None:
    async for _ in client.messages():
        return


async def async_exception(client: AsyncQueue) -> None:
    async for _ in client.messages():
        raise ZeroDivisionError


async def async_kept(client: AsyncQueue) -> None:
    messages = client.messages()
    await anext(messages)
    client.kept = messages  # type: ignore[attr-defined]


async def async_cancelled(client: AsyncQueue) -> None:
    async def loop() -> None:
        async for _ in client.messages():
            began.set()
            await asyncio.sleep(PATIENCE)

    began = asyncio.Event()
    task = asyncio.create_task(loop())
    await began.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [async_return, async_exception, async_kept, async_cancelled])
@pytest.mark.parametrize("close", [True, False])
def test_every_way_of_leaving_an_asynchronous_loop(store: StoreQueue, leave: Any, close: bool) -> None:
    put = publish(store, *"abc")

    clients = []

    async def work() -> None:
        client = await AsyncQueue.connect(store.dsn, "c")
        clients.append(client)
        async with contextlib.AsyncExitStack() as stack:
            if close:
                await stack.enter_async_context(client)
            with contextlib.suppress(ZeroDivisionError):
                await leave(client)

    asyncio.run(work())
    for session in (clients[0]._reader, clients[0]._writer):
        if session is not None:
            session.pgconn.finish()  # else it warns
    assert unfinished(store) == {put[0]: (1, True)} | free(*put[1:])


def test_a_receive_that_is_cancelled_at_any_moment_loses_nothing(store: StoreQueue) -> None:
    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "c") as client:
            for moment in range(60):
                (seq,) = publish(store, "a")
                task = asyncio.create_task(client.receive(wait=PATIENCE))
                for _ in range(moment % 12):
                    await asyncio.sleep(0)
                if moment >= 12:
                    await asyncio.sleep(moment / 20_000)
                task.cancel()
                try:
                    messages = await task
                except asyncio.CancelledError:
                    assert unfinished(store) == free(seq), moment
                    messages = await client.receive(wait=5)
                assert [(m.seq, m.deliver_count) for m in messages] == [(seq, 1)]
                assert await client.ack(messages) == 1

    asyncio.run(work())


def test_a_claim_that_had_ended_when_it_was_cancelled_goes_back(store: StoreQueue, monkeypatch: Any) -> None:
    put = publish(store, *"ab")

    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "c") as client:
            reader = await client._reader_session()
            original = type(reader).wait

            async def late(self: Any, gen: Any, *arguments: Any, **named: Any) -> Any:
                result = await original(self, gen, *arguments, **named)
                if self is reader:
                    raise asyncio.CancelledError  # the claim is committed
                return result

            monkeypatch.setattr(type(reader), "wait", late)
            with pytest.raises(asyncio.CancelledError):
                await client.receive()
            monkeypatch.undo()
            assert unfinished(store) == free(*put)
            assert [m.deliver_count for m in await client.receive()] == [1, 1]

    asyncio.run(work())


def test_a_batch_that_was_cancelled_or_left_is_read_again_at_once(store: StoreQueue, monkeypatch: Any) -> None:
    put = publish(store, *"aaa")

    async def work() -> None:
        async with await AsyncStream.connect(store.dsn, "s", lease=60) as stream:
            reader = await stream._reader_session()
            original = type(reader).wait

            async def late(self: Any, gen: Any, *arguments: Any, **named: Any) -> Any:
                result = await original(self, gen, *arguments, **named)
                if self is reader:
                    raise asyncio.CancelledError
                return result

            monkeypatch.setattr(type(reader), "wait", late)
            with pytest.raises(asyncio.CancelledError):
                await stream.read()
            monkeypatch.undo()
        async with await AsyncStream.connect(store.dsn, "s", lease=60) as stream:
            seen = 0
            async for _ in stream.messages():
                seen += 1
                if seen == 2:
                    break
        async with await AsyncStream.connect(store.dsn, "s") as stream:
            assert [m.seq async for m in stream.messages(wait=0, stop_when_empty=True)] == put[1:]

    asyncio.run(work())


def test_a_polite_stop_counts_nothing(store: StoreQueue, opened: Any) -> None:
    """Ten times more than max_deliveries, a worker is stopped while it handles the first of a key."""
    put = publish(store, *["k"] * 6)
    for consumer in ("c", "f"):
        rest = list(put)
        for _ in range(5):
            with Queue.connect(store.dsn, consumer) as client:

                @client.worker(concurrency=8)
                def handle(message: Message, rest: list[int] = rest, client: Queue = client) -> None:
                    rest.remove(message.seq)
                    client.stop()

                handle.run()
            assert unfinished(store, consumer) == free(*rest)
    assert store.value("select count(*) from cdcbridge.dead_messages") == 0


def test_an_asynchronous_worker_that_is_cancelled_lets_its_handlers_end(store: StoreQueue) -> None:
    put = publish(store, *["k"] * 3)
    ended: list[int] = []

    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "c") as client:
            began = asyncio.Event()

            @client.worker()
            async def handle(message: AsyncMessage) -> None:
                began.set()
                await asyncio.sleep(0.3)
                ended.append(message.seq)

            task = asyncio.create_task(handle.run())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(work())
    assert ended == put[:1]
    assert unfinished(store) == free(*put[1:])


def test_one_that_waits_is_woken_by_what_another_gives_back(store: StoreQueue) -> None:
    put = publish(store, *"ab")
    with Queue.connect(store.dsn, "c") as one, Queue.connect(store.dsn, "c") as other:
        first = next(messages := one.messages(wait=0))
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.extend(m.seq for m in other.receive(wait=PATIENCE)))
        thread.start()
        waiting = "select count(*) from pg_stat_activity where datname = current_database() and state = 'idle'"
        waiting += " and query like '%next_visible%' and pid <> pg_backend_pid()"
        eventually(lambda: store.value(waiting))
        messages.close()
        thread.join(5)
        assert found == put[1:]
        assert first.ack()


def test_given_back_in_fifo_the_order_stays_and_a_stale_receipt_counts_nothing(store: StoreQueue) -> None:
    put = publish(store, *"aaab")
    give = "select cdcbridge.give_back('f', %s::text[])"
    rows = store.receive(10, name="f")
    second = [row["receipt"] for row in rows if row["seq"] == put[1]]
    assert store.value(give, second) == 1
    assert store.value(give, second) == 0
    with psycopg.connect(store.dsn) as mine:
        mine.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with pytest.raises(psycopg.Error, match="REPEATABLE READ") as raised:
            mine.execute(give, (second,))
        assert raised.value.sqlstate == "CB005"
    assert unfinished(store, "f") == {put[0]: (1, True), put[3]: (1, True)} | free(put[1], put[2])
    assert store.receive(10, name="f") == []
    store.session.execute("select cdcbridge.nack('f', %s, '0 s')", ([rows[0]["receipt"]],))
    (first,) = store.receive(10, name="f")
    assert (first["seq"], first["deliver_count"]) == (put[0], 2)
    store.session.execute("select cdcbridge.ack('f', %s)", ([first["receipt"]],))
    assert [(r["seq"], r["deliver_count"]) for r in store.receive(10, name="f")] == [(put[1], 1), (put[2], 1)]


def publish(store: StoreQueue, *keys: str) -> list[int]:
    return [store.value("select cdcbridge.publish('t', %s, '1')", key) for key in keys]
