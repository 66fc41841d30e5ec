"""Streams of a real Redis: each fault of the server and of the network, and what is in the streams after it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection

from cdcbridge.config.sink import RedisSink
from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import Displaced, Lane, Outgoing, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import WAITS
from cdcbridge.sinks.targets.redis import RedisTarget
from cdcbridge.sinks.targets.redis_connection import options, place_of
from cdcbridge.sinks.targets.redis_entries import word
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.redis import Redis
from tests.harness.world import eventually
from tests.sinks.cases.redis import RedisCase
from tests.sinks.messages import SYSTEM, lane, message, messages
from tests.sinks.relay import Relay

ONE = lane()
QUEUE = None
PRIMARY = {"repl-diskless-sync-delay": "0"}  # a replica need not wait for further ones
_names = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture
def stream(server: Redis) -> Iterator[str]:
    """The name of a stream that does not exist. The server has room and takes writes."""
    yield f"shop{next(_names)}"
    with server.client() as client:
        client.flushall()


def sink(server: Redis, stream: str, *, port: int | None = None, **keys: Any) -> RedisSink:
    url = server.url if port is None else server.url.replace(f":{server.port}/", f":{port}/")
    return RedisSink.model_validate({"type": "redis", "url": url, "stream": stream, "timeout": "10s", **keys})


@asynccontextmanager
async def target(sink: RedisSink, place: Lane | None = ONE) -> AsyncIterator[RedisTarget]:
    made = RedisTarget(sink, place)
    try:
        yield made
    finally:
        await made.close()


def seqs(server: Redis, stream: str) -> list[int]:
    with server.client() as client:
        entries: Any = client.xrange(stream)
    return [int(entry.split(b"-")[0]) for entry, _ in entries]


def ids(server: Redis, stream: str) -> list[str]:
    with server.client() as client:
        entries: Any = client.xrange(stream)
    return [fields[b"id"].decode() for _, fields in entries]


def identity(*numbers: int) -> list[str]:
    return [message(number, "").id for number in numbers]


async def deliver(sink: RedisSink, batch: list[Outgoing], place: Lane | None = ONE) -> int | None:
    """Deliver with an instance of its own, see that nothing failed, and return the position."""
    async with target(sink, place) as one:
        await one.open()
        assert await one.deliver(batch) == {}
        return await one.position()


def error_of(sink: RedisSink, batch: list[Outgoing] = [], place: Lane | None = ONE) -> CdcbridgeError:  # noqa: B006
    """Return the error of opening, or of a delivery."""

    async def attempt() -> None:
        async with target(sink, place) as one:
            await one.open()
            await one.deliver(batch)

    with pytest.raises(CdcbridgeError) as caught:
        asyncio.run(attempt())
    assert Redis.password not in f"{caught.value} {caught.value.hint}"
    return caught.value


# What is stored


def test_an_entry_has_the_seq_as_its_id_and_the_message_as_its_fields(server: Redis, stream: str) -> None:
    batch = [message(7, stream, key="ä"), message(9, stream, key=None, body=b"\x00\r\n"), message(12, stream, key="")]
    batch = [one._replace(headers={**one.headers, "cdcbridge-op": "insert"}) for one in batch]
    assert asyncio.run(deliver(sink(server, stream), batch)) == 12
    with server.client() as client:
        entries: Any = client.xrange(stream)
    common = {b"topic": b"public.orders", b"op": b"insert"}
    first, second, third = (one.id.encode() for one in batch)
    assert entries == [
        (b"7-0", {b"id": first, b"key": "ä".encode(), **common, b"body": batch[0].body}),
        (b"9-0", {b"id": second, **common, b"body": b"\x00\r\n"}),
        (b"12-0", {b"id": third, b"key": b"", **common, b"body": batch[2].body}),
    ]


def test_a_lane_has_a_stream_of_its_own(server: Redis) -> None:
    assert RedisTarget.lanes(sink(server, "shop:{partition}"), 8) == 8
    assert RedisTarget.lanes(sink(server, "shop:{partition}:{topic}"), 8) == 8
    assert RedisTarget.lanes(sink(server, "shop:{topic}"), 8) == RedisTarget.lanes(sink(server, "shop"), 8) == 1


def test_a_target_without_entries_is_at_the_beginning(server: Redis, stream: str) -> None:
    async def position(template: str) -> int | None:
        async with target(sink(server, template)) as one:
            await one.open()
            return await one.position()

    assert asyncio.run(position(stream)) == 0
    assert asyncio.run(position(f"{stream}:{{topic}}")) == 0
    with server.client() as client:
        client.xgroup_create(stream, "readers", mkstream=True)
    assert asyncio.run(position(stream)) == 0


def test_what_is_there_already_is_not_added_again(server: Redis, stream: str) -> None:
    one = sink(server, stream)
    assert asyncio.run(deliver(one, messages(range(1, 6), stream))) == 5
    assert asyncio.run(deliver(one, messages(range(3, 9), stream))) == 8
    assert seqs(server, stream) == list(range(1, 9))


def test_streams_by_topic_share_a_position(server: Redis, stream: str) -> None:
    a, b = f"{stream}:a", f"{stream}:b"
    one = sink(server, f"{stream}:{{topic}}")
    first = [message(1, a), message(2, b), message(3, a)]
    assert asyncio.run(deliver(one, first)) == 3
    with server.client() as client:  # an older state of the record of the position
        client.set(f"cdcbridge:progress:{ONE.name}", 1)
    assert asyncio.run(deliver(one, [*first[1:], message(4, b)])) == 4
    assert seqs(server, a) == [1, 3]
    assert seqs(server, b) == [2, 4]


def test_a_stream_is_limited_and_the_position_stays(server: Redis, stream: str) -> None:
    one = sink(server, stream, maxlen=100)
    assert asyncio.run(deliver(one, messages(range(1, 1001), stream))) == 1000
    assert 100 <= len(seqs(server, stream)) < 250
    with server.client() as client:
        client.xtrim(stream, maxlen=0)
    assert asyncio.run(deliver(one, messages(range(1000, 1003), stream))) == 1002
    assert seqs(server, stream) == [1001, 1002]


# A server that refuses


def test_a_full_server_takes_all_of_a_batch_or_nothing(server: Redis, stream: str) -> None:
    async def run() -> None:
        async with target(sink(server, stream)) as one:
            await one.open()
            server.fill()
            try:
                with pytest.raises(TargetAway, match="OOM") as caught:
                    await one.deliver(messages(range(1, 4), stream))
            finally:
                server.make_room()
            assert caught.value.hint and "maxmemory" in caught.value.hint

    asyncio.run(run())
    assert seqs(server, stream) == []
    assert asyncio.run(deliver(sink(server, stream), messages(range(1, 4), stream))) == 3


def test_a_server_that_becomes_full_in_a_batch_has_nothing_of_it(server: Redis, stream: str) -> None:
    """The commands are queued while there is room, and the transaction is refused as a whole."""
    large = [message(seq, stream, body=b"x" * 100_000) for seq in range(1, 200)]
    with server.client() as client:
        memory: Any = client.info("memory")
        client.config_set("maxmemory", memory["used_memory"] + 5_000_000)
    try:
        assert isinstance(error_of(sink(server, stream), large), TargetAway)
    finally:
        server.make_room()
    assert seqs(server, stream) == []
    assert asyncio.run(deliver(sink(server, stream), large)) == 199


@pytest.mark.parametrize("place", [ONE, QUEUE])
def test_a_replica_and_a_lonely_primary_refuse_for_the_moment(server: Redis, stream: str, place: Lane | None) -> None:
    server.freeze()
    try:
        error = error_of(sink(server, stream), messages([1], stream), place)
    finally:
        server.thaw()
    assert isinstance(error, TargetAway) and "READONLY" in str(error) and "primary" in str(error.hint)
    with server.client() as client:
        client.config_set("min-replicas-to-write", 1)
    try:
        error = error_of(sink(server, stream), messages([1], stream), place)
    finally:
        with server.client() as client:
            client.config_set("min-replicas-to-write", 0)
    assert isinstance(error, TargetAway) and "NOREPLICAS" in str(error)
    assert seqs(server, stream) == []


def test_a_message_over_the_limit_is_refused_for_good(server: Redis, stream: str) -> None:
    large = message(3, stream, key="b", body=b"x" * 2_000_000)
    batch = [message(1, stream, key="a"), message(2, stream, key="b"), large, message(4, stream, key="a")]
    batch += [message(5, stream, key="b")]

    async def attempt(place: Lane | None) -> Any:
        async with target(sink(server, stream), place) as one:
            await one.open()
            return await one.deliver(batch)

    with server.client() as client:
        client.config_set("proto-max-bulk-len", 1 << 20)
    try:
        in_order = asyncio.run(attempt(ONE))
        stored = ids(server, stream)
        with server.client() as client:
            client.delete(stream)
        by_key = asyncio.run(attempt(QUEUE))
    finally:
        with server.client() as client:
            client.config_set("proto-max-bulk-len", 512 << 20)
    assert in_order.keys() == {2, 3, 4} and by_key.keys() == {2, 4}
    assert stored == identity(1, 2) and ids(server, stream) == identity(1, 2, 4)
    for failures in (in_order, by_key):
        assert failures[2].for_good and "2000000 bytes" in failures[2].reason
        assert "proto-max-bulk-len" in failures[2].reason and "invalid bulk length" in failures[2].reason
        assert failures[4] == WAITS


def test_a_key_that_is_not_a_stream_is_refused_for_good(server: Redis, stream: str) -> None:
    other = f"{stream}:other"
    batch = [message(1, f"{stream}:a", key="a"), message(2, other, key="b"), message(3, f"{stream}:a", key="a")]
    batch += [message(4, f"{stream}:a", key="b"), message(5, f"{stream}:a", key=None)]
    with server.client() as client:
        client.set(other, "a text")

    async def attempt(place: Lane | None) -> Any:
        async with target(sink(server, f"{stream}:{{topic}}"), place) as one:
            await one.open()
            failures = await one.deliver(batch)
            return failures, await one.position()

    failures, position = asyncio.run(attempt(ONE))
    assert failures.keys() == {1, 2, 3, 4} and failures[1].for_good and other in failures[1].reason
    assert position == 1 and ids(server, f"{stream}:a") == identity(1)
    with server.client() as client:
        client.delete(f"{stream}:a")
    failures, _ = asyncio.run(attempt(QUEUE))
    assert failures.keys() == {1, 3}
    assert ids(server, f"{stream}:a") == identity(1, 3, 5)


def test_the_place_stays_before_an_entry_that_was_refused_late(server: Redis, stream: str) -> None:
    """The stream was replaced by another key after its type had been asked for."""
    a, b = f"{stream}:a", f"{stream}:b"

    async def run() -> None:
        async with target(sink(server, f"{stream}:{{topic}}")) as one:
            await one.open()
            assert await one.deliver([message(1, a), message(2, b)]) == {}
            with server.client() as client:
                client.delete(a)
                client.set(a, "a text")
            failures = await one.deliver([message(3, b), message(4, a), message(5, b)])
            assert failures[1].for_good and "WRONGTYPE" in failures[1].reason
            assert await one.position() == 2
            failures = await one.deliver([message(6, a), message(7, b)])
            assert failures[0].for_good and failures[1] == WAITS

    asyncio.run(run())
    with server.client() as client:
        client.delete(a)
    assert asyncio.run(deliver(sink(server, f"{stream}:{{topic}}"), [message(n, d) for n, d in [(3, b), (4, a), (5, b)]])) == 5  # fmt: skip
    assert seqs(server, a) == [4] and seqs(server, b) == [2, 3, 5]


def test_entries_of_another_program_are_not_taken_for_ours(server: Redis, stream: str) -> None:
    with server.client() as client:
        client.xadd(stream, {"a": "1"}, id="1700000000000-0")
    error = error_of(sink(server, stream))
    assert (
        isinstance(error, Unusable) and "another program" in str(error) and f"redis-cli DEL {stream}" in str(error.hint)
    )
    other = f"{stream}:other"

    async def run() -> None:
        async with target(sink(server, other)) as one:
            await one.open()
            assert await one.deliver(messages([1], other)) == {}
            with server.client() as client:
                client.xadd(other, {"a": "1"})
            with pytest.raises(Unusable, match="another program"):
                await one.deliver(messages([2], other))

    asyncio.run(run())
    assert isinstance(error_of(sink(server, other)), Unusable)


# A connection that ends


@pytest.mark.parametrize("template", ["{}", "{}:{{topic}}"])
def test_a_cut_in_the_middle_of_a_batch_leaves_nothing_of_it(server: Redis, stream: str, template: str) -> None:
    name = template.format(stream)

    async def run() -> None:
        async with Relay(server.port) as relay:
            one = sink(server, name, port=relay.port)
            async with target(one) as broken:
                await broken.open()
                relay.limit = 50_000
                with pytest.raises(TargetAway, match="closed"):
                    await broken.deliver(messages(range(1, 1001), stream))
            assert seqs(server, stream) == []
            assert await deliver(one, messages(range(1, 1001), stream)) == 1000

    asyncio.run(run())
    assert seqs(server, stream) == list(range(1, 1001))


def test_a_batch_that_was_stored_without_an_answer_is_found(server: Redis, stream: str) -> None:
    async def run() -> None:
        async with Relay(server.port) as relay:
            one = sink(server, stream, port=relay.port)
            async with target(one) as broken:
                await broken.open()
                assert await broken.deliver(messages([1], stream)) == {}
                relay.deaf = True
                delivery = asyncio.create_task(broken.deliver(messages(range(2, 6), stream)))
                await asyncio.to_thread(eventually, lambda: seqs(server, stream) == [1, 2, 3, 4, 5], "stored")
                relay.deaf = False
                relay.cut()
                with pytest.raises(TargetAway):
                    await delivery
            async with target(one) as whole:
                await whole.open()
                assert await whole.position() == 5
                assert await whole.deliver(messages(range(4, 8), stream)) == {}

    asyncio.run(run())
    assert seqs(server, stream) == list(range(1, 8))


def test_a_killed_server_has_each_entry_once(stream: str) -> None:
    with Redis() as own:
        one = sink(own, stream)

        async def until_it_is_killed() -> int:
            """Deliver batches until the server dies, and return the last seq that was acknowledged."""
            acknowledged = 0
            async with target(one) as broken:
                await broken.open()
                with suppress(TargetAway):
                    while True:
                        batch = messages(range(acknowledged + 1, acknowledged + 101), stream)
                        assert await broken.deliver(batch) == {}
                        acknowledged += 100
                        if acknowledged == 1000:
                            asyncio.get_running_loop().run_in_executor(None, own.kill)
            return acknowledged

        acknowledged = asyncio.run(until_it_is_killed())
        assert isinstance(error_of(one), TargetAway)
        own.restart()

        async def go_on() -> None:
            async with target(one) as whole:
                await whole.open()
                last = await whole.position()
                assert last is not None and last >= acknowledged
                assert await whole.deliver(messages(range(last + 1, last + 101), stream)) == {}

        asyncio.run(go_on())
        found = seqs(own, stream)
        assert found == list(range(1, len(found) + 1)) and len(found) > acknowledged


def test_a_server_that_lost_everything_is_at_the_beginning(stream: str) -> None:
    with Redis(settings={"appendonly": "no"}) as own:
        assert asyncio.run(deliver(sink(own, stream), messages(range(1, 6), stream))) == 5
        own.kill()
        own.restart()

        async def position() -> int | None:
            async with target(sink(own, stream)) as one:
                await one.open()
                return await one.position()

        assert asyncio.run(position()) == 0
        assert asyncio.run(deliver(sink(own, stream), messages(range(1, 7), stream))) == 6
        assert seqs(own, stream) == list(range(1, 7))


def test_a_silent_server_is_away_after_the_time_limit(server: Redis, stream: str) -> None:
    async def run() -> None:
        async with target(sink(server, stream, timeout="300ms")) as one:
            await one.open()
            server.pause()
            try:
                began = time.monotonic()
                with pytest.raises(TargetAway, match=r"did not answer within 0\.3 s"):
                    await one.deliver(messages([1], stream))
                with pytest.raises(TargetAway, match="did not answer"):
                    await RedisTarget(sink(server, stream, timeout="300ms"), ONE).open()
                assert time.monotonic() - began < 5
            finally:
                server.resume()

    asyncio.run(run())
    eventually(lambda: asyncio.run(deliver(sink(server, stream), messages([1, 2], stream))) == 2, "it goes on")
    assert seqs(server, stream) == [1, 2]


def clients(server: Redis) -> int:
    """The number of connections to the server."""
    with server.client() as client:
        listed: Any = client.client_list()
    return len(listed)


def test_a_cancelled_delivery_leaves_no_task_and_no_connection(server: Redis, stream: str) -> None:
    before = clients(server)

    async def run() -> None:
        async with target(sink(server, stream)) as one:
            await one.open()
            server.pause()
            try:
                delivery = asyncio.create_task(one.deliver(messages([1], stream)))
                await asyncio.sleep(0)
                delivery.cancel()
                await asyncio.gather(delivery, return_exceptions=True)
                assert delivery.cancelled() and not one._all
            finally:
                server.resume()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    eventually(lambda: clients(server) == before, "the connections are gone")


def test_nothing_of_a_cancelled_delivery_is_sent_later(server: Redis, stream: str) -> None:
    """Bytes wait in the client for a server that is slow. The library alone would send them when it goes on."""
    large = [message(seq, stream, body=b"x" * 100_000) for seq in range(2, 200)]

    before = clients(server)

    async def run() -> None:
        async with Relay(server.port) as relay, target(sink(server, stream, port=relay.port), QUEUE) as one:
            await one.open()
            assert await one.deliver(messages([1], stream)) == {}
            (held,) = one._all
            transport = held._transport
            assert transport is not None
            server.pause()
            relay.deaf = True  # bytes that were not read would make the kernel drop those that wait
            try:
                delivery = asyncio.create_task(one.deliver(large))
                await asyncio.to_thread(eventually, transport.get_write_buffer_size, "bytes wait")
                delivery.cancel()
                await asyncio.gather(delivery, return_exceptions=True)
                assert delivery.cancelled() and not one._all
            finally:
                server.resume()
            await asyncio.to_thread(eventually, lambda: clients(server) == before, "the connection is gone")
            assert relay.sent < sum(len(each.body or b"") for each in large)

    asyncio.run(run())
    assert ids(server, stream) == identity(1)


def test_a_connection_that_ended_is_not_made_again_within_a_lane(server: Redis, stream: str) -> None:
    """A new connection would not watch the lane's key, so that 5 could be stored without 3 and 4."""
    one = sink(server, stream)

    async def run() -> None:
        async with target(one) as earlier, target(one) as later:
            await earlier.open()
            assert await earlier.deliver(messages([1, 2], stream)) == {}
            await later.open()
            with server.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
            (lost,) = earlier._all
            for _ in range(2):
                with pytest.raises(ConnectionError, match="closed"):
                    await lost.ask([("XADD", stream, "5-0", "id", "5")])

    asyncio.run(run())
    assert seqs(server, stream) == [1, 2]


# Several holders


@pytest.mark.parametrize("template", ["{}", "{}:{{topic}}"])
def test_an_earlier_holder_delivers_nothing_more(server: Redis, stream: str, template: str) -> None:
    one = sink(server, template.format(stream))

    async def run() -> None:
        async with target(one) as earlier, target(one) as later:
            await earlier.open()
            assert await earlier.deliver(messages([1, 2], stream)) == {}
            await later.open()
            assert await later.position() == 2
            with pytest.raises(Displaced):
                await earlier.deliver(messages([5], stream))  # 3 and 4 would never come
            assert await later.deliver(messages([3, 4], stream)) == {}

    asyncio.run(run())
    assert seqs(server, stream) == [1, 2, 3, 4]


def test_a_batch_that_was_on_its_way_does_not_count_after_the_lane_was_opened_again(server: Redis, stream: str) -> None:
    """The server stands still with the batch of the earlier holder in its socket."""

    async def run() -> None:
        async with target(sink(server, stream, timeout="3s")) as earlier, target(sink(server, stream)) as later:
            await earlier.open()
            assert await earlier.deliver(messages([1], stream)) == {}
            await later.open()
            server.pause()
            delivery = asyncio.create_task(earlier.deliver(messages([2, 3, 4], stream)))
            await asyncio.gather(delivery, return_exceptions=True)
            server.resume()
            assert isinstance(delivery.exception(), TargetAway)
            assert await later.deliver(messages([2], stream)) == {}
            assert await later.position() == 2

    asyncio.run(run())
    assert seqs(server, stream) == [1, 2]


def test_lanes_do_not_displace_each_other(server: Redis, stream: str) -> None:
    one = sink(server, f"{stream}:{{partition}}")

    async def run() -> None:
        async with target(one, lane(0, 2)) as first, target(one, lane(1, 2)) as second:
            await first.open()
            await second.open()
            assert await first.deliver(messages([1, 4], f"{stream}:0")) == {}
            assert await second.deliver(messages([2, 3], f"{stream}:1")) == {}
            assert (await first.position(), await second.position()) == (4, 3)

    asyncio.run(run())


def test_several_claims_are_delivered_at_once(server: Redis, stream: str) -> None:
    """Where nothing is ordered, a repeat has the same `id` again."""

    async def run() -> None:
        async with target(sink(server, stream), QUEUE) as one:
            await one.open()
            batches = [messages(range(n, n + 10), stream) for n in range(1, 101, 10)]
            assert await asyncio.gather(*map(one.deliver, batches)) == [{}] * 10
            assert await one.deliver(batches[0]) == {}
            assert len(one._all) <= 10
        assert one._all == set()

    asyncio.run(run())
    assert sorted(ids(server, stream)) == sorted(identity(*range(1, 101), *range(1, 11)))


# Replicas and clusters


def test_entries_count_once_the_replicas_have_them(stream: str) -> None:
    with Redis(settings=PRIMARY) as primary:
        one = sink(primary, stream, wait_replicas=1, timeout="2s")
        assert "0 replicas" in str(error_of(one))
        with Redis(settings={"replicaof": f"127.0.0.1 {primary.port}"}) as replica:
            eventually(lambda: _delivers(one, messages([1], stream)), "the replica has the entry")
            assert seqs(replica, stream) == [1]

            async def without_replica() -> None:
                async with target(one) as target_:
                    await target_.open()
                    replica.pause()
                    with pytest.raises(TargetAway, match="0 replicas"):
                        await target_.deliver(messages([2], stream))

            asyncio.run(without_replica())
            assert seqs(primary, stream) == [1, 2]
            error = error_of(one)
            assert isinstance(error, TargetAway) and "0 replicas" in str(error), "2 is on one server alone"
            replica.resume()

            async def position() -> int | None:
                async with target(one) as target_:
                    await target_.open()
                    return await target_.position()

            eventually(lambda: _opens(one), "the replica is back")
            assert asyncio.run(position()) == 2
            assert seqs(primary, stream) == seqs(replica, stream) == [1, 2]


def _delivers(sink: RedisSink, batch: list[Outgoing]) -> bool:
    with suppress(TargetAway):
        asyncio.run(deliver(sink, batch))
        return True
    return False


def _opens(sink: RedisSink) -> bool:
    async def attempt() -> None:
        async with target(sink) as one:
            await one.open()

    with suppress(TargetAway):
        asyncio.run(attempt())
        return True
    return False


def test_a_replica_that_lost_the_tail_gets_it_again(stream: str) -> None:
    with Redis(settings=PRIMARY) as primary, Redis(settings={"replicaof": f"127.0.0.1 {primary.port}"}) as replica:
        assert asyncio.run(deliver(sink(primary, stream), messages(range(1, 6), stream))) == 5
        eventually(lambda: seqs(replica, stream) == [1, 2, 3, 4, 5], "the replica has all")
        with replica.client() as client:
            client.replicaof("NO", "ONE")
        assert asyncio.run(deliver(sink(primary, stream), messages(range(6, 9), stream))) == 8
        primary.kill()

        async def go_on() -> int | None:
            async with target(sink(replica, stream)) as one:
                await one.open()
                assert await one.position() == 5
                assert await one.deliver(messages(range(6, 10), stream)) == {}
                return await one.position()

        assert asyncio.run(go_on()) == 9
        assert seqs(replica, stream) == list(range(1, 10))


@pytest.fixture
def cluster() -> Iterator[tuple[Redis, Redis]]:
    """Two nodes with half of the slots each."""
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "1000"}
    with Redis(settings=settings) as first, Redis(settings=settings) as second:
        for node, slots in ((first, (0, 8191)), (second, (8192, 16383))):
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
        with first.client() as client:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", second.port, second.port + 10_000)
        eventually(lambda: _whole(first) and _whole(second), "the cluster is whole")
        yield first, second


def _whole(node: Redis) -> bool:
    with node.client() as client:
        return "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO"))


def test_a_lane_finds_the_node_of_its_stream(cluster: tuple[Redis, Redis]) -> None:
    first, _ = cluster
    one = sink(first, "shop:{partition}")

    async def run() -> list[int]:
        ports = []
        for number in range(4):
            async with target(one, lane(number, 4)) as each:
                await each.open()
                assert await each.deliver(messages([number + 1], f"shop:{number}")) == {}
                assert await each.position() == number + 1
                ports += [connection.port for connection in each._all]
        return ports

    assert set(asyncio.run(run())) == {node.port for node in cluster}
    for number in range(4):
        assert asyncio.run(RedisTarget(one, lane(number, 4)).check()) == []
    for place in (ONE, QUEUE):
        batch = [message(seq, f"shop:{seq}") for seq in range(1, 9)]
        error = error_of(sink(first, "shop:{topic}"), batch, place)
        assert isinstance(error, Unusable) and "{partition}" in str(error.hint), error


# Log in


def test_a_wrong_password_names_the_key_to_correct(stream: str) -> None:
    with Redis(auth="acl") as own:
        right = sink(own, stream)
        assert asyncio.run(deliver(right, messages([1], stream))) == 1
        for url in (own.url.replace(own.password, "gu%20ess"), f"redis://{own.address}"):
            error = error_of(right.model_copy(update={"url": SecretStr(url)}))
            assert isinstance(error, Unusable) and "`url`" in str(error.hint) and "ess" not in str(error)

        async def expires() -> None:
            async with target(right) as one:
                await one.open()
                with own.client() as client:
                    client.acl_setuser(own.user, enabled=True, passwords=["+other", f"-{own.password}"])
                    client.client_kill_filter(user=own.user, skipme=False)
                with pytest.raises(TargetAway):
                    await one.deliver(messages([2], stream))

        asyncio.run(expires())
        error = error_of(right)
        assert isinstance(error, Unusable) and "WRONGPASS" in str(error)


def test_a_user_without_rights_is_told_the_command(stream: str) -> None:
    with Redis(settings={"user": "bridge on >secret ~shop* ~cdcbridge:* +@all -xadd"}) as own:
        own.auth = "acl"
        one = sink(own, stream)
        error = error_of(one, messages([1], stream))
        assert isinstance(error, Unusable) and "NOPERM" in str(error) and "ACL SETUSER bridge" in str(error.hint)
        (problem,) = asyncio.run(RedisTarget(one, None).check())
        assert (problem.code, problem.severity) == ("sink_unusable", "error") and "ACL SETUSER" in problem.fix
        command = str(error.hint).replace("STREAM", "shop").replace("'", "").split()[1:]
        assert command[:2] == ["ACL", "SETUSER"]
        with own.client() as client:
            client.execute_command(*command[:2], "bridge", "resetkeys", "-@all", *command[3:], "+ping")
        assert asyncio.run(deliver(one, messages([1], stream))) == 1


def test_tls_and_who_is_trusted(tmp_path: Path, stream: str) -> None:
    certificates = Certificates(tmp_path)
    with Redis(tls=certificates) as own:
        assert asyncio.run(deliver(sink(own, stream, tls={"ca": certificates.ca}), messages([1], stream))) == 1
        for tls in (None, {"ca": certificates.other_ca}):
            error = error_of(sink(own, stream, tls=tls))
            assert isinstance(error, Unusable) and "certificate verify failed" in str(error)
            assert "tls" in str(error.hint)
        error = error_of(sink(own, stream, tls={"ca": tmp_path / "missing"}))
        assert isinstance(error, Unusable) and "cannot be read" in str(error)


@pytest.mark.parametrize(
    ("url", "given", "place"),
    [
        ("redis://host", {"host": "host"}, "host:6379"),
        (
            "rediss://a%40b:p%3Aw@[::1]:1/3",
            {
                "host": "::1",
                "port": 1,
                "username": "a@b",
                "password": "p:w",
                "db": 3,
                "connection_class": SSLConnection,
            },
            "::1:1",
        ),
        ("redis://:secret@host:7/", {"host": "host", "port": 7, "password": "secret"}, "host:7"),
        (
            "unix:///run/redis.sock",
            {"path": "/run/redis.sock", "connection_class": UnixDomainSocketConnection},
            "/run/redis.sock",
        ),
    ],
)
def test_a_url_is_read(url: str, given: dict[str, Any], place: str) -> None:
    assert options(url) == given
    assert place_of(url) == place


@pytest.mark.parametrize(
    "url",
    ["http://secret@host", "redis://h/x-secret", "redis://h:secret/", "redis://h/0?a=secret", "unix://secret"],
)
def test_a_url_that_is_none_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(Unusable) as caught:
        options(url)
    assert "secret" not in f"{caught.value}" and "`url`" in f"{caught.value.hint}"


def test_a_unix_socket_and_another_database(tmp_path: Path, stream: str) -> None:
    with Redis(settings={"unixsocket": str(tmp_path / "s")}) as own:
        for url, database in ((f"unix://{tmp_path}/s", 0), (f"redis://{own.address}/3", 3)):
            one = RedisSink.model_validate({"type": "redis", "url": url, "stream": stream})
            assert asyncio.run(deliver(one, messages([1], stream))) == 1
            with own.client() as client:
                client.select(database)
                assert client.xlen(stream) == 1
        error = error_of(RedisSink.model_validate({"type": "redis", "url": f"redis://{own.address}/99", "stream": "s"}))
        assert isinstance(error, Unusable) and "DB index" in str(error)


# check()


def test_check_finds_what_is_missing_and_changes_nothing(server: Redis, stream: str) -> None:
    one = sink(server, f"{stream}:{{partition}}")

    async def run() -> None:
        async with target(one) as running:
            await running.open()
            assert await running.deliver(messages([1], f"{stream}:0")) == {}
            assert await RedisTarget(one, ONE).check() == []
            assert await running.deliver(messages([2], f"{stream}:0")) == {}

    asyncio.run(run())
    with server.client() as client:
        assert sorted(client.keys(f"{stream}*")) == [f"{stream}:0".encode()]
        client.config_set("maxmemory-policy", "allkeys-lru")
        (problem,) = asyncio.run(RedisTarget(one, None).check())
        client.config_set("maxmemory-policy", "noeviction")
    assert (problem.code, problem.severity) == ("sink_evicts", "warning")
    server.fill()
    (problem,) = asyncio.run(RedisTarget(one, None).check())
    server.make_room()
    assert problem.code == "sink_unreachable" and "OOM" in problem.message and "maxmemory" in problem.fix
    away = one.model_copy(update={"url": SecretStr("redis://:secret@127.0.0.1:1")})
    (problem,) = asyncio.run(RedisTarget(away, None).check())
    assert problem.code == "sink_unreachable" and "127.0.0.1:1" in problem.message and "secret" not in problem.message


def test_the_case_finds_what_was_delivered(server: Redis, stream: str) -> None:
    case = RedisCase(server, stream)
    one = RedisSink.model_validate(case.sink())
    sent = message(3, f"{stream}:2", key=None)
    asyncio.run(deliver(one, [sent], lane(2, 4)))
    ((identity_, key, body, destination),) = case.received()
    assert (identity_, key, body, destination) == (sent.id, None, sent.body, f"{stream}:2")
    case.close()
    assert case.received() == []
    with server.client() as client:
        assert client.keys("*") == []


def test_words_are_packed_as_redis_reads_them() -> None:
    assert word("WAIT") + word(1) + word("ä") == b"$4\r\nWAIT\r\n$1\r\n1\r\n$2\r\n\xc3\xa4\r\n"
    assert SYSTEM in lane().name
