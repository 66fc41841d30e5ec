"""Every way in which a handler can end, and every way in which a client can be misused: the table of docs/CONSUMERS.md."""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from cdcbridge import AsyncQueue, Message, Queue, Stream
from cdcbridge.errors import ClientClosed, UnreadableData, UsageError
from tests.harness.world import PATIENCE, eventually
from tests.integration.test_client_leaving import publish, unfinished
from tests.sql.queue import StoreQueue
from tests.unit.test_handlers import Speechless

LOST = "select history -> 0 ->> 'reason' as reason from cdcbridge_internal.delayed"


class Way:
    """How a handler ends at the first delivery: what it does with the message, and then what it raises or returns."""

    def __init__(
        self,
        does: str = "",
        raises: Callable[[], BaseException] | None = None,
        reason: str | None = None,
        says: str = "",
    ) -> None:
        self.does, self.raises, self.reason, self.says = does, raises, reason, says


WAYS = {
    "returns": Way(),
    "raises": Way(raises=lambda: ValueError("oh"), reason="ValueError: oh"),
    "raises with NUL": Way(raises=lambda: ValueError("a\0b"), reason="ValueError: a\\x00b"),
    "raises with half a pair": Way(raises=lambda: ValueError("\ud800"), reason="ValueError: \\ud800"),
    "raises without words": Way(raises=Speechless, reason="Speechless: its text cannot be read: ValueError"),
    "CancelledError": Way(raises=asyncio.CancelledError, reason="CancelledError: "),
    "GeneratorExit": Way(raises=GeneratorExit, reason="GeneratorExit: "),
    "acks and returns": Way("ack"),
    "acks and raises": Way("ack", lambda: ValueError("oh")),
    "nacks and returns": Way("nack", reason="by itself"),
    "nacks and raises": Way("nack", lambda: ValueError("oh"), reason="by itself"),
    "loses its delivery": Way("lose", reason="visibility timeout passed", says="its delivery had expired"),
    "loses its delivery and raises": Way("lose", lambda: ValueError("oh"), reason="visibility timeout passed"),
}


def work_through(store: StoreQueue, asynchronous: bool, way: Way) -> tuple[list[tuple[int, int]], BaseException | None]:
    """(seq, deliver_count) of each handling, and what run() raised. Ends when a second message was handled."""
    seen: list[tuple[int, int]] = []

    def begin(message: Any) -> bool:
        seen.append((message.seq, message.deliver_count))
        if message.seq > 1:
            message._queue.stop()
        return len(seen) == 1

    def lose() -> None:
        store.expire()
        assert store.receive(1, "0 s")

    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "c") as client:

            @client.worker()
            async def handle(message: Any) -> None:
                if begin(message):
                    if way.does == "ack":
                        await message.ack()
                    elif way.does == "nack":
                        await message.nack(reason="by itself")
                    elif way.does == "lose":
                        lose()
                    if way.raises:
                        raise way.raises()

            await handle.run()

    def work_plainly() -> None:
        with Queue.connect(store.dsn, "c") as client:

            @client.worker()
            def handle(message: Any) -> None:
                if begin(message):
                    if way.does == "ack":
                        message.ack()
                    elif way.does == "nack":
                        message.nack(reason="by itself")
                    elif way.does == "lose":
                        lose()
                    if way.raises:
                        raise way.raises()

            handle.run()

    try:
        asyncio.run(work()) if asynchronous else work_plainly()
    except (SystemExit, KeyboardInterrupt) as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", WAYS)
def test_a_handler_ends_and_the_worker_goes_on(
    store: StoreQueue, asynchronous: bool, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    way = WAYS[name]
    store.session.execute("create table told as select 0 as seq, ''::text as reason limit 0")
    for table in ("delayed", "leases"):
        seq = "new.seqs[1]" if table == "leases" else "new.seq"
        store.session.execute(
            f"create or replace function tell_{table}() returns trigger language plpgsql as $$ begin insert into public.told"
            f" select {seq}, h ->> 'reason' from jsonb_array_elements(new.history) h; return null; end $$".encode()
        )
        store.session.execute(
            f"create trigger tell after insert on cdcbridge_internal.{table} for each row execute function tell_{table}()".encode()
        )
    publish(store, "a", "b")
    with caplog.at_level(logging.INFO, "cdcbridge.client"):
        seen, raised = work_through(store, asynchronous, way)
    assert raised is None
    again = [(1, 2)] if way.reason and "visibility" not in way.reason else [(1, 3)] if way.reason else []
    assert sorted(seen) == sorted([(1, 1), *again, (2, 1)])
    assert unfinished(store) == {}
    if way.reason:
        assert {row["reason"] for row in store.all("select reason from told")} == {way.reason}
    text = caplog.text
    assert ("message 1 of c failed" in text) == (way.raises is not None)
    assert way.says in text


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["sys.exit", "KeyboardInterrupt"])
def test_a_handler_that_ends_the_program_gives_its_message_back_first(
    store: StoreQueue, asynchronous: bool, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, *"aaa")
    seen, raised = work_through(store, asynchronous, Way(raises=lambda: error))
    assert raised is error
    assert seen == [(1, 1)]
    assert unfinished(store) == {1: (1, False), 2: (0, False), 3: (0, False)}
    assert [row["reason"] for row in store.all(f"{LOST} where seq = 1")] == [f"{type(error).__name__}: {error}"]
    assert "message 1 of c failed" in caplog.text


def test_a_handler_that_is_killed_leaves_its_message_to_the_timeout(store: StoreQueue) -> None:
    publish(store, "a")
    program = "import os, sys\nfrom cdcbridge import Queue\nq = Queue.connect(sys.argv[1], 'c')\n"
    program += "@q.worker()\ndef handle(message):\n    os.kill(os.getpid(), 9)\nhandle.run()\n"
    assert subprocess.run([sys.executable, "-c", program, store.dsn], check=False).returncode == -9
    assert unfinished(store) == {1: (1, True)}


def test_a_handler_that_outlives_the_grace_comes_again_and_the_rest_is_given_back(
    store: StoreQueue, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, *"aab")

    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "c") as client:

            @client.worker(grace=0.2)
            async def handle(message: Any) -> None:
                client.stop()
                await asyncio.sleep(PATIENCE)

            await handle.run()

    asyncio.run(work())
    assert [row["reason"] for row in store.all(f"{LOST} where seq = 1")] == ["CancelledError: "]
    assert unfinished(store) == {1: (1, False), 2: (0, False), 3: (0, False)}
    with Queue.connect(store.dsn, "c") as client:

        @client.worker(grace=0.2)
        def handle(message: Message) -> None:
            client.stop()
            time.sleep(3)

        handle.run()
    assert "was still being handled when the worker ended" in caplog.text
    assert unfinished(store) == {1: (2, True), 2: (0, False), 3: (0, False)}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_lease_that_is_lost_under_its_handler_is_told(
    store: StoreQueue, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store.declare("brief", topics=("t",), visibility_timeout="600ms")
    publish(store, "a")
    told = "the delivery of message 1 of brief was lost"

    async def work() -> None:
        async with await AsyncQueue.connect(store.dsn, "brief") as client:

            @client.worker()
            async def handle(message: Any) -> None:
                client.stop()
                store.expire()
                assert store.receive(1, "30 s", name="brief")
                await asyncio.to_thread(eventually, lambda: told in caplog.text)

            await handle.run()

    def work_plainly() -> None:
        with Queue.connect(store.dsn, "brief") as client:

            @client.worker()
            def handle(message: Message) -> None:
                client.stop()
                store.expire()
                assert store.receive(1, "30 s", name="brief")
                eventually(lambda: told in caplog.text)

            handle.run()

    asyncio.run(work()) if asynchronous else work_plainly()
    assert "was handled, but its delivery had expired" in caplog.text
    assert unfinished(store, "brief") == {1: (2, True)}


def test_a_handler_that_returns_a_coroutine_has_not_handled_anything(store: StoreQueue) -> None:
    publish(store, "a")
    with Queue.connect(store.dsn, "c") as client:

        async def forgotten() -> None: ...

        def handle(message: Message) -> Any:
            client.stop()
            return forgotten()

        client.worker()(handle).run()
    assert "returned a coroutine, which was not run" in store.value(LOST)


@pytest.mark.parametrize("opened", ["sync", "async"], indirect=True)
def test_handlers_that_would_not_run_are_refused_when_they_are_registered(opened: Any, store: StoreQueue) -> None:
    client = opened()

    def generator(message: Any) -> Any:
        yield

    wrong: Any = generator
    with pytest.raises(TypeError, match="would not run"):
        client.worker()(wrong)


def test_one_bad_document_concerns_its_message_alone(store: StoreQueue) -> None:
    publish(store, "a")
    store.session.execute("select cdcbridge.publish('t', 'b', (repeat('[', 5000) || repeat(']', 5000))::json)")
    store.session.execute("""select cdcbridge.publish('t', 'c', '{"a": "\\u0000", "b": "\\ud800", "c": 1e400}')""")
    publish(store, "d")
    handled: list[int] = []
    with Queue.connect(store.dsn, "c") as client:

        @client.worker(concurrency=2)
        def handle(message: Message) -> None:
            if message.deliver_count == 1:
                assert message.raw
                assert message.data["op"] == "message"
                handled.append(message.seq)
            if len(handled) == 3:
                client.stop()

        handle.run()
    assert sorted(handled) == [1, 3, 4]
    with Stream.connect(store.dsn, "s") as stream:
        seen = []
        for message in stream.messages(wait=0, stop_when_empty=True):
            try:
                seen.append((message.seq, message.data["op"]))
            except UnreadableData as error:
                seen.append((message.seq, "bad"))
                assert "message 2 of t" in str(error)
    assert sorted(seen) == [(1, "message"), (2, "bad"), (3, "message"), (4, "message")]


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "SQL_ASCII"])
def test_an_encoding_of_the_environment_blocks_nothing(
    store: StoreQueue, opened: Any, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = store.dsn.split("dbname=")[1]
    store.session.execute(f"alter database {database} set client_encoding = '{encoding}'".encode())
    monkeypatch.setenv("PGCLIENTENCODING", encoding)
    client, stream = opened(), opened("s")
    client.publish("t", {"n": "☃ 😀"}, key="é😀")
    with psycopg.connect(store.dsn, client_encoding=encoding) as mine:
        assert mine.info.encoding != "utf-8" or encoding == "SQL_ASCII"
        if isinstance(client, Queue):
            client.publish("t", {"n": "☃ 😀"}, connection=mine)
    count = 2 if isinstance(client, Queue) else 1
    batch = client.receive()
    assert [message.data["record"] for message in batch] == [{"n": "☃ 😀"}] * count
    assert batch[0].key == "é😀"
    assert client.nack(batch, reason="☃ 😀\0\ud800") == count
    assert len(list(stream.messages(wait=0, stop_when_empty=True))) == count


# misuse


def test_a_closed_client_says_so(store: StoreQueue, opened: Any) -> None:
    for consumer in ("c", "s"):
        client = opened(consumer)
        client.close()
        client.close()
        calls = [client.messages, *((client.offsets, client.read) if consumer == "s" else (client.receive,))]
        for call in calls:
            with pytest.raises(ClientClosed, match="is closed"):
                call()


def test_the_worker_of_a_closed_client_says_so(store: StoreQueue) -> None:
    with Queue.connect(store.dsn, "c") as client:
        worker = client.worker()(_nothing)
    with pytest.raises(ClientClosed, match="is closed"):
        worker.run()


def test_close_in_another_thread_ends_a_loop_politely(store: StoreQueue) -> None:
    client = Queue.connect(store.dsn, "c")
    thread = threading.Thread(target=lambda: list(client.messages()), daemon=True)
    thread.start()
    eventually(client._reading.locked)
    client.close()
    thread.join(5)
    assert not thread.is_alive()


def _in_child(client: Any, answers: Any) -> None:
    try:
        client.receive()
    except UsageError as error:
        answers.put(str(error))
    client.close()
    os._exit(0)


def test_a_forked_child_is_told_to_connect_and_spares_its_parents_sessions(store: StoreQueue) -> None:
    publish(store, "a")
    with Queue.connect(store.dsn, "c") as client:
        (message,) = client.receive()
        message.extend(60)
        sessions = (
            "select array_agg(pid order by pid) from pg_stat_activity where application_name like 'cdcbridge cl%'"
        )
        before = store.value(sessions)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(client, answers))
        child.start()
        assert "belongs to process" in answers.get()
        child.join(PATIENCE)
        assert message.ack()
        assert store.value(sessions) == before


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_a_concurrency_that_is_none_is_refused(store: StoreQueue, opened: Any, number: Any) -> None:
    with pytest.raises(UsageError, match="concurrency is"):
        opened().worker(concurrency=number)


def test_times_that_are_none_are_refused(store: StoreQueue, opened: Any) -> None:
    client, stream = opened(), opened("s")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: client.receive(wait=float("nan")), "wait is nan"),
        (lambda: client.receive(wait=-1), "wait is -1"),
        (lambda: client.worker(wait=-1), "wait is -1"),
        (lambda: client.worker(grace=float("nan")), "grace is nan"),
        (lambda: client.messages(wait=-1), "wait is -1"),
        (lambda: stream.batches(wait=-1), "wait is -1"),
        (lambda: client.publish("t", 1, delay=-1), "delay is -1"),
        (lambda: opened(poll_interval=0), "poll_interval is 0"),
        (lambda: opened("s", lease=0), "lease is 0"),
        (lambda: client.publish("t", float("nan")), "data is nan"),
        (lambda: client.publish("t", 1, key="\0"), "key is"),
        (lambda: client.publish("t\ud800", 1), "topic is"),
    ]
    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()
    assert store.value("select count(*) from cdcbridge.messages") == 0


def _nothing(message: Any) -> None: ...


def _exhaust(loop: Callable[..., Any], **named: Any) -> None:
    for _ in loop(**named):
        pass


def _noted(looks: list[Any], call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    looks.append(arguments)
    return call(*arguments, **named)


@pytest.mark.parametrize("loop", ["worker", "messages", "batches"])
def test_no_loop_asks_a_thousand_times_a_second(store: StoreQueue, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Queue.connect(store.dsn, "c") as client, Stream.connect(store.dsn, "s") as stream:
        looks: list[Any] = []
        for one, name in ((client, "receive"), (stream, "read")):
            original = getattr(one, name)
            monkeypatch.setattr(one, name, functools.partial(_noted, looks, original))
        runs: dict[str, Callable[[], Any]] = {
            "worker": client.worker(wait=0)(_nothing).run,
            "messages": functools.partial(_exhaust, client.messages, wait=0),
            "batches": functools.partial(_exhaust, stream.batches, wait=0),
        }
        thread = threading.Thread(target=runs[loop])
        thread.start()
        threading.Event().wait(2)
        client.stop()
        stream.stop()
        thread.join(PATIENCE)
    assert 1 <= len(looks) <= 4


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_log_says_which_delivery_failed_and_when_the_message_comes_again(
    store: StoreQueue, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    delay = {"initial": "2s", "max": "2s"}
    store.declare(topics=("t",), max_deliveries=2, retry_delay=delay)
    publish(store, "a")
    deliveries = 0

    def fail(queue: Any) -> None:
        nonlocal deliveries
        deliveries += 1
        if deliveries == 1:
            # The delay is over as soon as the message has it.
            threading.Timer(0.2, lambda: eventually(due)).start()
        else:
            queue.stop()
        raise ValueError("no such invoice")

    def due() -> bool:
        query = "update cdcbridge_internal.delayed set visible_at = now() - interval '1 s' returning seq"
        return bool(store.all(query, session=other))

    other = store.open()
    if asynchronous:

        async def work() -> None:
            async with await AsyncQueue.connect(store.dsn, "c", poll_interval=0.1) as client:

                @client.worker()
                async def handle(_message: Any) -> None:
                    fail(client)

                await handle.run()

        asyncio.run(work())
    else:
        with Queue.connect(store.dsn, "c", poll_interval=0.1) as client:

            @client.worker()
            def handle(_message: Any) -> None:
                fail(client)

            handle.run()
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == [
        "message 1 of c failed: delivery 1 of 2, again in 2 s",
        "message 1 of c failed: delivery 2 of 2, now a dead letter: cdcbridge dead show c 1",
    ]
    assert store.value("select seq from cdcbridge.dead_messages where id = 1") == 1


def test_the_log_says_when_the_message_of_a_failed_block_comes_again(
    store: StoreQueue, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store.declare(topics=("t",), retry_delay={"initial": "2s", "max": "2s"})
    publish(store, "a")
    client = opened()
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="no such invoice"), client.receive()[0]:
        raise ValueError("no such invoice")
    said = [record.getMessage() for record in caplog.records if "was nacked" in record.getMessage()]
    assert said == ["message 1 of c was nacked: delivery 1 of 5, again in 2 s"]
