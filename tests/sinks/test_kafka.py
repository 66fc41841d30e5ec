"""The Kafka sink against real brokers: order, each message once, and lanes that pass to another process."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from cdcbridge.sinks.target import Displaced, Lane
from cdcbridge.sinks.targets.kafka_progress import TOPIC, record
from tests.harness.brokers.kafka import Kafka
from tests.sinks.kafka import lane, opened, run, seqs, some, target, topic

pytestmark = pytest.mark.needs_kafka


def test_messages_are_in_order_and_once_and_a_restart_continues_after_them(own_kafka: Kafka) -> None:
    async def test() -> None:
        for first in (1, 1201):
            async with opened(target(case, lane(case))) as sink:
                assert await sink.position() == (first - 1 or None)
                assert await sink.deliver(some(case, range(first, first + 600))) == {}
                assert await sink.deliver(some(case, range(first + 600, first + 1200))) == {}
                assert await sink.position() == first + 1199

    with topic(own_kafka) as case:
        run(test())
        assert seqs(case) == list(range(1, 2401))
        key, headers, body = case.messages()[0]
        assert (key, dict(headers)["cdcbridge-id"], body) == (b"k", b"7/1/0/1", b"{}")


def test_lanes_remember_each_their_own_position(own_kafka: Kafka) -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            sinks = [await stack.enter_async_context(opened(target(case, lane(case, n)))) for n in range(4)]
            for first in range(0, 2000, 40):
                batches = [some(case, range(first + 1 + n, first + 41, 4), key=f"k{n}") for n in range(4)]
                sent = zip(sinks, batches, strict=True)
                assert await asyncio.gather(*(sink.deliver(batch) for sink, batch in sent)) == [{}] * 4
        for number in range(4):
            async with opened(target(case, lane(case, number))) as sink:
                assert await sink.position() == 1997 + number
        async with opened(target(case, Lane(case.name, "7231", 0, 2))) as sink:
            assert await sink.position() is None, "with another number of lanes, a lane has other messages"

    with topic(own_kafka) as case:
        run(test())
        assert sorted(seqs(case)) == list(range(1, 2001))


def test_a_tombstone_and_a_message_without_a_key(own_kafka: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver([*some(case, [1], body=None), *some(case, [2], key=None)]) == {}

    with topic(own_kafka, partitions=1) as case:
        run(test())
        assert [(key, body) for key, _, body in case.messages()] == [(b"k", b""), (None, b"{}")]
        assert case._committed(case.name)[0].value() is None


def test_an_earlier_holder_of_the_lane_is_fenced_before_it_writes(own_kafka: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case))) as old:
            assert await old.deliver(some(case, range(1, 11))) == {}
            async with opened(target(case, lane(case))) as new:
                with pytest.raises(Displaced, match="another process has taken over the lane"):
                    await old.deliver(some(case, range(11, 21)))
                assert await new.position() == 10
                assert await new.deliver(some(case, range(11, 16))) == {}

    with topic(own_kafka) as case:
        run(test())
        assert seqs(case) == list(range(1, 16))


def test_a_holder_whose_transaction_failed_does_not_take_the_lane_back(own_kafka: Kafka) -> None:
    """It begins with a new producer, which would fence the new holder, and finds messages of the new one."""

    async def test() -> None:
        async with opened(target(case, lane(case))) as old:
            assert await old.position() is None
            async with opened(target(case, lane(case))) as new:
                assert await new.deliver(some(case, range(1, 11))) == {}
            with pytest.raises(Displaced, match="another process has delivered"):
                await old._in_thread(old._begin_lane_again)

    with topic(own_kafka) as case:
        run(test())


def test_the_transaction_of_a_killed_holder_is_aborted(own_kafka: Kafka) -> None:
    """Its messages are in the topic, and a reader with read_committed never sees them."""

    async def test() -> None:
        async with opened(target(case, lane(case))) as old:
            assert await old.deliver(some(case, range(1, 11))) == {}
            producer = old._producer
            producer.begin_transaction()
            for message in some(case, range(11, 21)):
                producer.produce(message.destination, b"half", message.key)
            producer.produce(TOPIC, record(lane(case), 20), lane(case).name.encode())
            assert await asyncio.to_thread(producer.flush, 10) == 0
            async with opened(target(case, lane(case))) as new:
                assert await new.position() == 10
                assert await new.deliver(some(case, range(11, 21))) == {}

    with topic(own_kafka) as case:
        run(test())
        assert seqs(case) == list(range(1, 21))


def test_another_lane_with_an_open_transaction_hides_no_progress(own_kafka: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case, 1))) as other, opened(target(case, lane(case))) as sink:
            other._producer.begin_transaction()
            other._producer.produce(TOPIC, b'{"seq":1,"of":4}', b"other")
            assert await asyncio.to_thread(other._producer.flush, 10) == 0
            assert await sink.deliver(some(case, range(1, 11))) == {}
            await sink.close()
            await sink.open()
            reading = asyncio.create_task(sink.position())
            done, _ = await asyncio.wait([reading], timeout=1)
            assert not done, "the records after an open transaction are not readable yet"
            await asyncio.to_thread(other._producer.abort_transaction, 10)
            assert await reading == 10

    with topic(own_kafka) as case:
        run(test())


def test_claims_are_delivered_at_the_same_time(own_kafka: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, None)) as sink:
            assert await sink.position() is None
            batches = [some(case, range(i, i + 100), key=f"k{i}") for i in range(0, 2000, 100)]
            assert await asyncio.gather(*(sink.deliver(batch) for batch in batches)) == [{}] * 20

    with topic(own_kafka) as case:
        run(test())
        found = seqs(case)
        assert sorted(found) == list(range(2000))
        for first in range(0, 2000, 100):
            assert [i for i in found if first <= i < first + 100] == list(range(first, first + 100))


def test_without_transactions_a_lane_is_in_order_and_has_no_position(own_kafka: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case), transactions=False)) as sink:
            assert await sink.deliver(some(case, range(1, 501))) == {}
            assert await sink.position() is None

    with topic(own_kafka, partitions=1) as case:
        run(test())
        assert seqs(case) == list(range(1, 501))


def test_a_progress_that_is_far_from_the_end_is_found(own_kafka: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(1, 11))) == {}
        async with opened(target(case, lane(case, 1))) as other:
            for seq in range(1, 700):
                assert await other.deliver(some(case, [seq], key="other")) == {}
        async with opened(target(case, lane(case))) as sink:
            assert await sink.position() == 10

    with topic(own_kafka) as case:
        run(test())
        assert json.loads(case.messages(TOPIC)[-1][2]) == {"seq": 699, "of": 4}
