"""The Kafka sink against brokers that are cut off, killed, silent, or restored from an older state."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import pytest

from cdcbridge.sinks.target import TargetAway
from tests.harness.brokers.kafka import Kafka, KafkaCluster
from tests.harness.proxy import Proxy
from tests.sinks.kafka import kafka_threads, lane, opened, run, seqs, some, target, topic

pytestmark = pytest.mark.needs_kafka


def test_a_thread_that_never_ends_holds_nobody_up(own_kafka: Kafka) -> None:
    """librdkafka waits by the wall clock, which may be set back while it waits."""
    stuck = threading.Event()

    async def close() -> None:
        with topic(own_kafka) as case:
            made = target(case, None, timeout="1s")
            await made.open()
            call = asyncio.create_task(made._in_thread(stuck.wait))
            await asyncio.sleep(0)
            started = time.monotonic()
            await made.close()
            assert 0.9 < time.monotonic() - started < 10
            stuck.set()
            await call
            for thread in kafka_threads():
                await asyncio.to_thread(thread.join)

    run(close())


def test_a_connection_that_is_cut_in_the_middle_of_batches() -> None:
    async def test() -> None:
        sent, attempts = 0, 0
        sink = target(case, lane(case), timeout="20s")
        try:
            while sent < 20_000:
                attempts += 1
                try:
                    await sink.open()
                    sent = await sink.position() or 0
                    while sent < 20_000:
                        assert await sink.deliver(some(case, range(sent + 1, sent + 501), body=b"x" * 300)) == {}
                        sent += 500
                        if sent % 4000 == 0:
                            proxy.away = True
                            await asyncio.sleep(0.02)
                            proxy.away = False
                except TargetAway:
                    assert attempts < 20
        finally:
            await sink.close()

    server = Kafka()
    with Proxy(server.proxied_port) as proxy:
        server.advertise(proxy)
        with server, topic(server, proxy=proxy.port, partitions=1) as case:
            run(test())
            assert seqs(case) == list(range(1, 20_001))


def test_a_transaction_that_was_committed_and_not_answered() -> None:
    """The proxy stays silent while the broker has the commit: position() shows whether it was stored."""

    end = 0

    async def test() -> None:
        nonlocal end
        for round_ in range(4):
            sink = target(case, lane(case), timeout="3s")
            async with opened(sink):
                last = await sink.position() or 0
                delivering = asyncio.create_task(
                    sink.deliver(some(case, range(last + 1, last + 2001), body=b"x" * 300))
                )
                await asyncio.sleep(0.02 * round_)
                proxy.silent = True
                with contextlib.suppress(TargetAway):
                    await delivering
            proxy.silent = False
        async with opened(target(case, lane(case))) as sink:
            last = await sink.position() or 0
            assert await sink.deliver(some(case, range(last + 1, last + 101))) == {}
            end = last + 100

    server = Kafka()
    with Proxy(server.proxied_port) as proxy:
        server.advertise(proxy)
        with server, topic(server, proxy=proxy.port, partitions=1) as case:
            run(test())
            assert seqs(case) == list(range(1, end + 1))


def test_a_broker_that_is_killed_and_restarted() -> None:
    async def test() -> None:
        sink = target(case, lane(case), timeout="2s")
        async with opened(sink):
            assert await sink.deliver(some(case, range(1, 101))) == {}
            # Kafka answers a commit before it has written the markers. One node that is killed in between may never
            # write them, and then nothing after them is ever readable.
            assert await sink.position() == 100
            delivering = asyncio.create_task(sink.deliver(some(case, range(101, 2001), body=b"x" * 500)))
            await asyncio.sleep(0.01)
            await asyncio.to_thread(server.kill)
            with contextlib.suppress(TargetAway):
                await delivering
            with pytest.raises(TargetAway, match="not answered within 2 s"):
                await sink.open()
            await asyncio.to_thread(server.restart)
        while True:
            try:
                await continued()
                return
            except TargetAway:  # the engine tries again, too: Kafka may not have ended the open transaction yet
                assert time.monotonic() < deadline

    async def continued() -> None:
        async with opened(target(case, lane(case), timeout="10s")) as sink:
            last = await sink.position()
            assert last is not None
            assert await sink.deliver(some(case, range(last + 1, 2101))) == {}

    deadline = time.monotonic() + 100
    with Kafka() as server, topic(server, partitions=1) as case:
        run(test())
        assert seqs(case) == list(range(1, 2101))


@pytest.mark.parametrize("lanes", [True, False], ids=["lane", "claims"])
def test_a_broker_that_does_not_answer(own_kafka: Kafka, lanes: bool) -> None:
    async def test() -> None:
        sink = target(case, lane(case) if lanes else None, timeout="4s")
        await sink.open()
        assert await sink.deliver(some(case, range(1, 11))) == {}
        own_kafka.pause()
        try:
            started = time.monotonic()
            with pytest.raises(TargetAway):
                await sink.deliver(some(case, range(11, 21)))
            delivering = asyncio.create_task(sink.deliver(some(case, range(11, 21))))
            await asyncio.sleep(0.1)
            delivering.cancel()
            with contextlib.suppress(asyncio.CancelledError, TargetAway):
                await delivering
            await sink.close()
            with pytest.raises(TargetAway, match="not answered within 4 s"):
                await sink.open()
            await sink.close()
            assert time.monotonic() - started < 24
        finally:
            own_kafka.resume()

    with topic(own_kafka) as case:
        run(test())


def test_the_leader_of_a_cluster_is_killed() -> None:
    async def test() -> None:
        sent, killed = 0, False
        sink = target(case, lane(case), timeout="10s")
        deadline = time.monotonic() + 90
        try:
            while sent < 6000 and time.monotonic() < deadline:
                with contextlib.suppress(TargetAway):
                    await sink.open()
                    sent = await sink.position() or 0
                    while sent < 6000:
                        delivering = asyncio.create_task(sink.deliver(some(case, range(sent + 1, sent + 201))))
                        if sent >= 2000 and not killed:
                            killed = True
                            await asyncio.to_thread(lambda: cluster.leader(case.name).kill())
                        assert await delivering == {}
                        sent += 200
        finally:
            await sink.close()
        assert sent == 6000 and killed

    with KafkaCluster() as cluster, topic(cluster, partitions=1) as case:
        run(test())
        assert seqs(case) == list(range(1, 6001))


def test_too_few_replicas_keep_messages_waiting() -> None:
    async def test() -> None:
        async with opened(target(case, None, timeout="2s")) as sink:
            for node in server.nodes[1:]:
                await asyncio.to_thread(node.pause)
            with pytest.raises(TargetAway, match=r"topic|stopped"):
                await sink.deliver(some(case, range(1, 11)))

    with KafkaCluster() as server, topic(server) as case:
        run(test())


def test_a_topic_that_was_restored_from_an_older_state() -> None:
    async def test() -> None:
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(1, 11))) == {}
        saved = server.folder / "data"
        await asyncio.to_thread(server.stop)
        copy = server.folder / "older"
        await asyncio.to_thread(_copy, saved, copy)
        await asyncio.to_thread(server.start)
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(11, 21))) == {}
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(_copy, copy, saved)
        await asyncio.to_thread(server.start)
        async with opened(target(case, lane(case))) as sink:
            assert await sink.position() == 10
            assert await sink.deliver(some(case, range(11, 21))) == {}

    with Kafka() as server, topic(server, partitions=1) as case:
        run(test())
        assert seqs(case) == list(range(1, 21))


def _copy(source: Path, to: Path) -> None:
    import shutil

    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to)
