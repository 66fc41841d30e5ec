"""The Python clients of streams, both by the same tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from cdcbridge import AsyncStream, StaleReceipt, Stream
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import UsageError
from tests.harness.waiting import Waiting
from tests.harness.world import PATIENCE, store_database
from tests.sql.queue import StoreQueue


@pytest.fixture
def queue(pg15: EmbeddedServer) -> Iterator[StoreQueue]:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        made.declare("s", mode="stream", topics=("news",), start="earliest")
        yield made
        made.close()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, queue: StoreQueue) -> Iterator[Callable[..., Any]]:
    """Opens a member of the group s."""
    with contextlib.ExitStack() as stack:
        if request.param == "sync":

            def open_(consumer: str = "s", **named: Any) -> Any:
                return stack.enter_context(Stream.connect(queue.dsn, consumer, **named))
        else:
            runner = stack.enter_context(asyncio.Runner())

            def open_(consumer: str = "s", **named: Any) -> Any:
                made = Waiting(runner.run(AsyncStream.connect(queue.dsn, consumer, **named)), runner)
                return stack.enter_context(made)

        yield open_


def publish(queue: StoreQueue, *keys: str) -> list[int]:
    return [queue.value("select cdcbridge.publish('news', %s, '{\"n\": 1.50}')", key) for key in keys]


def test_a_member_reads_batches_and_commits_them_on_leaving(queue: StoreQueue, connect: Any) -> None:
    put = publish(queue, *[f"k{n}" for n in range(30)])
    stream = connect()
    got: list[int] = []
    for batch in stream.batches(wait=0, stop_when_empty=True):
        with batch:
            assert len(batch) == len(batch.messages)
            got += [message.seq for message in batch.messages]
    assert sorted(got) == put
    assert all(standing.messages == 0 for standing in stream.offsets())
    assert len(stream.offsets()) == 16


def test_a_block_that_raises_gives_the_partition_back_at_once(queue: StoreQueue, connect: Any) -> None:
    put = publish(queue, "a", "a")
    stream = connect()
    with pytest.raises(ZeroDivisionError), stream.read():
        raise ZeroDivisionError
    batch = stream.read(1)
    assert [message.seq for message in batch.messages] == put[:1]
    assert stream.read() is None, "the partition is leased"
    assert batch.commit() is True
    assert [message.seq for message in stream.read().messages] == put[1:]


def test_a_message_is_as_it_was_logged(queue: StoreQueue, connect: Any) -> None:
    publish(queue, "a")
    (message,) = connect().read().messages
    assert (message.seq, message.topic, message.key, message.position) == (1, "news", "a", None)
    assert message.data["record"] == {"n": 1.5}
    assert '"n": 1.50' in message.raw


def test_messages_come_one_by_one_and_are_done_when_the_next_is_asked_for(queue: StoreQueue, connect: Any) -> None:
    put = publish(queue, "a", "a", "a")
    stream = connect()
    messages = stream.messages(wait=0, stop_when_empty=True)
    assert [next(messages).seq, next(messages).seq] == put[:2]
    messages.close()
    assert [message.seq for message in stream.messages(wait=0, stop_when_empty=True)] == put[1:]


def test_in_the_callers_transaction_reading_and_effect_are_one(queue: StoreQueue) -> None:
    put = publish(queue, "a", "a")
    with Stream.connect(queue.dsn, "s") as stream, psycopg.connect(queue.dsn) as connection:
        for rolled_back in (True, False):
            with connection.transaction(force_rollback=rolled_back):
                batch = stream.read(connection=connection)
                assert batch is not None and [message.seq for message in batch.messages] == put
                with batch:
                    connection.execute("create table effect as select 1")
        assert stream.read(connection=connection) is None
        assert stream.read() is None


def test_two_members_share_the_partitions_and_a_dead_ones_go_to_the_other(queue: StoreQueue, connect: Any) -> None:
    put = publish(queue, *[f"k{n}" for n in range(40)])
    one, other = connect(lease=0.5), connect()
    held = [one.read(), one.read(), one.read()]
    assert len({batch.partition for batch in held}) == 3
    got = [message.seq for batch in other.batches(wait=PATIENCE, stop_when_empty=False) if _within(batch, other, put)
           for message in batch.messages]  # fmt: skip
    assert sorted(got) == put, "all of it, when the leases ended"
    with pytest.raises(StaleReceipt):
        held[0].commit()
    with pytest.raises(StaleReceipt):
        held[0].extend()


def _within(batch: Any, stream: Any, put: list[int]) -> bool:
    """Commit it, and stop where it was the last."""
    batch.commit()
    if not any(standing.messages for standing in stream.offsets()):
        stream.stop()
    return bool(put)


def test_a_waiting_member_is_woken(queue: StoreQueue, connect: Any) -> None:
    stream = connect()
    timer = threading.Timer(0.3, lambda: publish_apart(queue))
    timer.start()
    started = time.monotonic()
    batch = stream.read(wait=PATIENCE)
    assert batch is not None
    assert time.monotonic() - started < 5, "by the notification, not by the next look"
    timer.join()


def publish_apart(queue: StoreQueue) -> None:
    with psycopg.connect(queue.dsn, autocommit=True) as session:
        session.execute("select cdcbridge.publish('news', 'k', '1')")


def test_seek_takes_words_seqs_and_times(queue: StoreQueue, connect: Any) -> None:
    put = publish(queue, "a", "a")
    stream = connect()
    for target, expected in (
        (put[1], put[1:]),
        ("earliest", put),
        ("latest", []),
        (datetime(2020, 1, 1, tzinfo=UTC), put),
    ):
        assert stream.seek(target) == 16
        assert [m.seq for m in stream.messages(wait=0, stop_when_empty=True)] == expected
    with pytest.raises(UsageError, match="not a place in the log"):
        stream.seek("yesterday, perhaps")
    with pytest.raises(UsageError, match="no partition 99"):
        stream.seek("latest", 99)


def test_unknown_consumers_and_queues_are_refused(queue: StoreQueue, connect: Any) -> None:
    queue.declare("q")
    for name, message in (("nobody", "no consumer named 'nobody'"), ("q", "not a stream")):
        with pytest.raises(UsageError, match=message):
            connect(name)
