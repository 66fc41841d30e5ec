"""A RabbitMQ that is killed, full, silent or encrypted: one server for all of these tests, which no other test uses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cdcbridge.sinks.target import Lane, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import WAITS
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.rabbitmq import RabbitMQ, RabbitMQCluster
from tests.harness.brokers.server import free_port
from tests.harness.world import eventually
from tests.sinks.cases.rabbitmq import RabbitmqExchangeCase, RabbitmqStreamCase, steady_rabbitmq
from tests.sinks.messages import message, messages
from tests.sinks.rabbit import ONE, QUEUE, deliver, error_of, name, seqs, sink_of, target

pytestmark = pytest.mark.timeout(300)
TOPIC = "public.orders"
Case = RabbitmqStreamCase | RabbitmqExchangeCase


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    certificates = Certificates(Path(tmp_path_factory.mktemp("certificates")))
    settings = {"max_message_size": "1000000", "stream.listeners.ssl.1": f"127.0.0.1:{free_port()}"}
    with steady_rabbitmq(tls=certificates, settings=settings) as server:
        yield server


@pytest.fixture(params=[RabbitmqStreamCase, RabbitmqExchangeCase])
def case(own: RabbitMQ, request: pytest.FixtureRequest) -> Iterator[Case]:
    made: Case = request.param(own, name())
    yield made
    made.close()


@pytest.fixture
def exchange(own: RabbitMQ) -> Iterator[RabbitmqExchangeCase]:
    made = RabbitmqExchangeCase(own, name())
    yield made
    made.close()


def test_a_killed_server_lost_nothing_that_it_confirmed(own: RabbitMQ, case: Case) -> None:
    case.settle()
    one = sink_of(case)

    async def until_it_is_killed() -> int:
        """Deliver batches until the server dies, and return the last seq that was confirmed."""
        confirmed = 0
        async with target(one) as broken:
            await broken.open()
            with suppress(TargetAway):
                while True:
                    batch = [message(seq, TOPIC, key=None) for seq in range(confirmed + 1, confirmed + 101)]
                    assert await broken.deliver(batch) == {}
                    confirmed += 100
                    if confirmed == 500:
                        asyncio.get_running_loop().run_in_executor(None, own.kill)
        return confirmed

    confirmed = asyncio.run(until_it_is_killed())
    assert isinstance(error_of(one, []), TargetAway)
    own.restart()

    async def go_on() -> None:
        async with target(one) as whole:
            await whole.open()
            last = await whole.position() if whole.remembers else confirmed
            assert last is not None and last >= confirmed
            batch = [message(seq, TOPIC, key=None) for seq in range(last + 1, last + 101)]
            assert await whole.deliver(batch) == {}

    def goes_on() -> bool:
        with suppress(TargetAway):  # the stream has no leader at first
            asyncio.run(go_on())
            return True
        return False

    eventually(goes_on, "the stream is there again")
    found = seqs(case)
    if case.exactly_once:
        assert found == list(range(1, len(found) + 1)) and len(found) > confirmed
    else:
        assert set(found) == set(range(1, confirmed + 101))


def test_the_leader_of_a_stream_is_killed() -> None:
    """The other nodes choose a leader among the replicas, which have each message that was confirmed."""

    async def run() -> None:
        sent, killed = 0, False
        while sent < 3000:
            with suppress(TargetAway):
                async with target(one) as sink:
                    await sink.open()
                    sent = await sink.position() or 0
                    while sent < 3000:
                        batch = [message(seq, TOPIC, key=None) for seq in range(sent + 1, sent + 101)]
                        delivering = asyncio.create_task(sink.deliver(batch))
                        if sent >= 1000 and not killed:
                            killed = True
                            await asyncio.to_thread(leader.kill)
                        assert await delivering == {}
                        sent += 100
            assert time.monotonic() < deadline
        assert killed

    with RabbitMQCluster() as cluster:
        first, second = cluster.nodes[:2]
        case = RabbitmqStreamCase(second, "shop")
        leader = cluster.leader("shop")
        assert leader is second  # the node that creates a stream leads it
        one = sink_of(case, url=first.stream_url)
        deadline = time.monotonic() + 90
        asyncio.run(run())
        case.server = first
        assert seqs(case) == list(range(1, 3001))


def test_a_full_server_takes_nothing_and_no_message_counts(own: RabbitMQ, case: Case) -> None:
    async def run() -> None:
        async with target(sink_of(case, timeout="4s")) as one:
            await one.open()
            assert await one.deliver(messages([1], TOPIC)) == {}
            await asyncio.to_thread(own.fill)
            try:
                with pytest.raises(TargetAway) as caught:
                    for seq in range(2, 100):
                        assert await one.deliver(messages([seq], TOPIC)) == {}
                assert "alarms" in str(caught.value.hint)
                if isinstance(case, RabbitmqExchangeCase):
                    assert "disk" in str(caught.value)
                assert isinstance(
                    await asyncio.to_thread(error_of, sink_of(case, timeout="4s"), messages([2], TOPIC)), TargetAway
                )
            finally:
                await asyncio.to_thread(own.make_room)

    asyncio.run(run())
    asyncio.run(deliver(sink_of(case), messages([2, 3], TOPIC)))
    found = seqs(case)
    assert set(found) == {1, 2, 3}
    assert not case.exactly_once or found == [1, 2, 3]


def test_a_silent_server_is_away_after_the_time_limit(own: RabbitMQ, case: Case) -> None:
    async def run() -> None:
        async with target(sink_of(case, timeout="3s")) as one:
            await one.open()
            own.pause()
            try:
                with pytest.raises(TargetAway, match="did not answer within 3 s"):
                    await one.deliver(messages([1], TOPIC))
                async with asyncio.timeout(20):
                    await one.close()
                error = await asyncio.to_thread(error_of, sink_of(case, timeout="3s"), [])
                assert isinstance(error, TargetAway) and "did not answer within 3 s" in str(error)
            finally:
                own.resume()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    asyncio.run(deliver(sink_of(case), messages([1, 2], TOPIC)))
    assert set(seqs(case)) == {1, 2}


def test_connections_that_the_server_closes(own: RabbitMQ, exchange: RabbitmqExchangeCase) -> None:
    async def run() -> None:
        async with target(sink_of(exchange)) as one:
            await one.open()
            await asyncio.to_thread(own.control, "close_all_connections", "for a test")
            with pytest.raises(TargetAway, match="for a test"):
                await one.deliver(messages([1], TOPIC))

    asyncio.run(run())


@pytest.mark.parametrize("place", [ONE, QUEUE])
def test_a_message_over_the_limit_is_refused_and_the_others_are_delivered(
    exchange: RabbitmqExchangeCase, place: Lane | None
) -> None:
    batch = [message(seq, TOPIC, key=str(seq), body=b"x" * 100_000) for seq in range(1, 6)]
    batch.append(message(6, TOPIC, key="6", body=b"x" * 1_000_001))
    batch += [message(7, TOPIC, key="7", body=b"x" * 1_000_000), message(8, TOPIC, key="6")]

    async def run() -> None:
        async with target(sink_of(exchange), place) as one:
            await one.open()
            failures = await one.deliver(batch)
            assert failures.keys() == {5, 7}
            assert failures[5].for_good and failures[7] == WAITS
            assert "larger than configured max size 1000000" in failures[5].reason
            assert "max_message_size" in failures[5].reason

    asyncio.run(run())
    assert set(seqs(exchange)) == {1, 2, 3, 4, 5, 7}


def test_tls_and_who_is_trusted(own: RabbitMQ, case: Case) -> None:
    certificates = own.certificates
    assert certificates
    if isinstance(case, RabbitmqStreamCase):
        port = own.settings["stream.listeners.ssl.1"].rpartition(":")[2]
        url = f"rabbitmq-stream+tls://{own.user}:{own.password}@{own.host}:{port}/"
    else:
        url = own.tls_url
    asyncio.run(deliver(sink_of(case, url=url, tls={"ca": certificates.ca}), messages([1], TOPIC)))
    assert seqs(case) == [1]
    for tls in (None, {"ca": certificates.other_ca}):
        error = error_of(sink_of(case, url=url, tls=tls), [])
        assert isinstance(error, Unusable) and "certificate verify failed" in str(error) and "tls" in str(error.hint)
