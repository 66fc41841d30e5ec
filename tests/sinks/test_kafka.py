"""The Kafka sink against real brokers: order, each message once, and every way in which a broker can fail."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, admin

from cdcbridge.config.sink import KafkaSink
from cdcbridge.sinks.target import Displaced, Lane, Outgoing, TargetAway, Unusable
from cdcbridge.sinks.targets.kafka import KafkaTarget
from cdcbridge.sinks.targets.kafka_progress import TOPIC, record
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.kafka import Kafka, KafkaCluster, MockKafka
from tests.harness.proxy import Proxy
from tests.sinks.cases.kafka import KafkaCase

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Kafka]:
    with Kafka() as running:
        yield running


@contextlib.contextmanager
def topic(server: Kafka | KafkaCluster, **options: Any) -> Iterator[KafkaCase]:
    case = KafkaCase(server, f"t{next(_numbers)}", **options)
    yield case


def lane(case: KafkaCase, number: int = 0) -> Lane:
    return Lane(case.name, "7231", number, 4)


def target(case: KafkaCase, made: Lane | None, **keys: Any) -> KafkaTarget:
    return KafkaTarget(KafkaSink(**{**case.sink(), **keys}), made)


def some(case: KafkaCase, seqs: Sequence[int], *, key: str | None = "k", body: bytes | None = b"{}") -> list[Outgoing]:
    return [Outgoing(i, f"7/1/0/{i}", key, 0, case.name, body, {"cdcbridge-id": f"7/1/0/{i}"}) for i in seqs]


def seqs(case: KafkaCase) -> list[int]:
    return [int(one.id.split("/")[-1]) for one in case.received()]


def run(made: Coroutine[Any, Any, None]) -> None:
    """Run a test, which must leave neither a task nor a thread."""

    async def watched() -> None:
        await made
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not kafka_threads()

    asyncio.run(watched())


def kafka_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("kafka-sink")]


def test_a_thread_that_never_ends_holds_nobody_up(server: Kafka) -> None:
    """librdkafka waits by the wall clock, which may be set back while it waits."""
    stuck = threading.Event()

    async def close() -> None:
        with topic(server) as case:
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


@contextlib.asynccontextmanager
async def opened(made: KafkaTarget) -> Any:
    try:
        await made.open()
        yield made
    finally:
        await made.close()


def test_messages_are_in_order_and_once_and_a_restart_continues_after_them(server: Kafka) -> None:
    async def test() -> None:
        for first in (1, 1201):
            async with opened(target(case, lane(case))) as sink:
                assert await sink.position() == (first - 1 or None)
                assert await sink.deliver(some(case, range(first, first + 600))) == {}
                assert await sink.deliver(some(case, range(first + 600, first + 1200))) == {}
                assert await sink.position() == first + 1199

    with topic(server) as case:
        run(test())
        assert seqs(case) == list(range(1, 2401))
        key, headers, body = case.messages()[0]
        assert (key, dict(headers)["cdcbridge-id"], body) == (b"k", b"7/1/0/1", b"{}")


def test_lanes_remember_each_their_own_position(server: Kafka) -> None:
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

    with topic(server) as case:
        run(test())
        assert sorted(seqs(case)) == list(range(1, 2001))


def test_a_tombstone_and_a_message_without_a_key(server: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver([*some(case, [1], body=None), *some(case, [2], key=None)]) == {}

    with topic(server, partitions=1) as case:
        run(test())
        assert [(key, body) for key, _, body in case.messages()] == [(b"k", b""), (None, b"{}")]
        assert case._committed(case.name)[0].value() is None


def test_an_earlier_holder_of_the_lane_is_fenced_before_it_writes(server: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case))) as old:
            assert await old.deliver(some(case, range(1, 11))) == {}
            async with opened(target(case, lane(case))) as new:
                with pytest.raises(Displaced, match="another process has taken over the lane"):
                    await old.deliver(some(case, range(11, 21)))
                assert await new.position() == 10
                assert await new.deliver(some(case, range(11, 16))) == {}

    with topic(server) as case:
        run(test())
        assert seqs(case) == list(range(1, 16))


def test_a_holder_whose_transaction_failed_does_not_take_the_lane_back(server: Kafka) -> None:
    """It begins with a new producer, which would fence the new holder, and finds messages of the new one."""

    async def test() -> None:
        async with opened(target(case, lane(case))) as old:
            assert await old.position() is None
            async with opened(target(case, lane(case))) as new:
                assert await new.deliver(some(case, range(1, 11))) == {}
            with pytest.raises(Displaced, match="another process has delivered"):
                await old._in_thread(old._begin_lane_again)

    with topic(server) as case:
        run(test())


def test_the_transaction_of_a_killed_holder_is_aborted(server: Kafka) -> None:
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

    with topic(server) as case:
        run(test())
        assert seqs(case) == list(range(1, 21))


def test_another_lane_with_an_open_transaction_hides_no_progress(server: Kafka) -> None:
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

    with topic(server) as case:
        run(test())


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
def test_a_broker_that_does_not_answer(server: Kafka, lanes: bool) -> None:
    async def test() -> None:
        sink = target(case, lane(case) if lanes else None, timeout="4s")
        await sink.open()
        assert await sink.deliver(some(case, range(1, 11))) == {}
        server.pause()
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
            server.resume()

    with topic(server) as case:
        run(test())


@pytest.mark.parametrize("lanes", [True, False], ids=["lane", "claims"])
def test_a_message_that_is_larger_than_the_topic_or_the_producer_takes(server: Kafka, lanes: bool) -> None:
    async def test() -> None:
        for first, size in ((1, 20_000), (101, 2_000_000)):
            async with opened(target(case, lane(case) if lanes else None)) as sink:
                batch = some(case, range(first, first + 10), key="k")
                batch[4] = batch[4]._replace(body=b"x" * size)
                failures = await sink.deliver(batch)
                assert failures[4].for_good and str(size)[:2] in failures[4].reason, failures
                assert ".bytes" in failures[4].reason
                assert set(range(4, 10)) <= set(failures) and not failures[5].for_good
                if lanes:
                    assert set(failures) == set(range(4, 10))
            async with opened(target(case, lane(case) if lanes else None)) as sink:
                again = [batch[i] for i in sorted(failures) if i != 4]
                assert await sink.deliver(again) == {}

    with topic(server, partitions=1, max_message_bytes="10000") as case:
        run(test())
        expected = [i for first in (1, 101) for i in range(first, first + 10) if i != first + 4]
        found = seqs(case)
        assert found == expected if lanes else list(dict.fromkeys(found)) == expected


def test_a_topic_whose_limit_cannot_be_read(server: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka then refuses requests with several messages, of which one is too large."""

    async def test() -> None:
        for made in (lane(case), None):
            first = 1 if made else 101
            async with opened(target(case, made)) as sink:
                batch = some(case, range(first, first + 10), key=None)
                batch[4] = batch[4]._replace(body=b"x" * 20_000)
                failures = await sink.deliver(batch)
                assert failures[4].for_good and "max.message.bytes" in failures[4].reason
                assert set(failures) == (set(range(4, 10)) if made else {4})

    monkeypatch.setattr("cdcbridge.sinks.targets.kafka.settings", lambda *_: {})
    with topic(server, partitions=1, max_message_bytes="10000") as case:
        run(test())
        assert seqs(case) == [1, 2, 3, 4, *range(101, 105), *range(106, 111)]


def test_a_batch_that_is_larger_than_the_topic_takes(server: Kafka) -> None:
    """Kafka refuses many small messages together, because librdkafka sends them together."""

    async def test() -> None:
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(1, 201), body=b"x" * 300)) == {}

    with topic(server, partitions=1, max_message_bytes="10000") as case:
        run(test())
        assert seqs(case) == list(range(1, 201))


def test_what_is_missing_is_named_with_the_command_that_creates_it(server: Kafka) -> None:
    async def test() -> None:
        with pytest.raises(Unusable, match="there is no topic none") as raised:
            async with opened(target(case, lane(case), topic="none")):
                pass
        create = f"kafka-topics.sh --bootstrap-server {server.address} --create --topic none --partitions 4"
        assert raised.value.hint == create
        for made in (lane(case), None):
            async with opened(target(case, made, topic="{topic}")) as sink:
                batch = some(case, range(1, 6))
                batch[2] = batch[2]._replace(destination="none", key="other")
                failures = await sink.deliver(batch)
                assert create in failures[2].reason and not failures[2].for_good
                assert set(failures) == ({2, 3, 4} if made else {2})
        with pytest.raises(Unusable, match="must not set acks"):
            await target(case, None, producer={"acks": "1"}).open()
        with pytest.raises(Unusable, match=r"refuses sink.producer.*nonsense"):
            await target(case, None, producer={"nonsense": "1"}).open()

    with topic(server) as case:
        run(test())


def test_a_broker_may_create_topics_by_itself() -> None:
    async def test() -> None:
        async with opened(target(case, lane(case), topic="created.{topic}")) as sink:
            batch = [one._replace(destination="created.a") for one in some(case, [1, 2])]
            assert await sink.deliver(batch) == {}

    with Kafka(settings={"auto.create.topics.enable": "true"}) as server, topic(server) as case:
        run(test())
        assert len(case.messages("created.a")) == 2
        assert asyncio.run(target(case, lane(case)).check()) == []


def test_claims_are_delivered_at_the_same_time(server: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, None)) as sink:
            assert await sink.position() is None
            batches = [some(case, range(i, i + 100), key=f"k{i}") for i in range(0, 2000, 100)]
            assert await asyncio.gather(*(sink.deliver(batch) for batch in batches)) == [{}] * 20

    with topic(server) as case:
        run(test())
        found = seqs(case)
        assert sorted(found) == list(range(2000))
        for first in range(0, 2000, 100):
            assert [i for i in found if first <= i < first + 100] == list(range(first, first + 100))


def test_without_transactions_a_lane_is_in_order_and_has_no_position(server: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case), transactions=False)) as sink:
            assert await sink.deliver(some(case, range(1, 501))) == {}
            assert await sink.position() is None

    with topic(server, partitions=1) as case:
        run(test())
        assert seqs(case) == list(range(1, 501))


def test_passwords(tmp_path: Path) -> None:
    async def test() -> None:
        for login in (server.sasl, {**server.sasl, "sasl.mechanism": "PLAIN"}, server.tls):
            given = {name: value for name, value in login.items() if name != "bootstrap.servers"}
            case.address = login["bootstrap.servers"]
            async with opened(target(case, lane(case), producer=given)) as sink:
                last = await sink.position() or 0
                assert await sink.deliver(some(case, [last + 1])) == {}
            started = time.monotonic()
            with pytest.raises(Unusable) as raised:
                async with opened(target(case, lane(case), producer={**given, "sasl.password": "hush"})):
                    pass
            assert "sink.producer" in (raised.value.hint or "") and "hush" not in str(raised.value)
            assert time.monotonic() - started < 10
        with pytest.raises(Unusable, match=r"certificate verify failed|SSL"):
            async with opened(target(case, None, producer={**given, "ssl.ca.location": str(certificates.other_ca)})):
                pass

    certificates = Certificates(tmp_path)
    with Kafka(tls=certificates) as server, topic(server, partitions=1) as case:
        run(test())
        assert seqs(case) == [1, 2, 3]


def test_rights_that_are_missing() -> None:
    async def test() -> None:
        producer = {name: value for name, value in server.sasl.items() if name != "bootstrap.servers"}
        case.address = server.sasl["bootstrap.servers"]
        with pytest.raises(Unusable, match="there is no topic cdcbridge-progress, and Kafka refuses") as raised:
            async with opened(target(case, lane(case), producer=producer)):
                pass
        assert "--create --topic cdcbridge-progress --partitions 1 --replication-factor 1" in (raised.value.hint or "")
        await asyncio.to_thread(server.create_topic, TOPIC, cleanup_policy="delete")
        with pytest.raises(Unusable, match="Kafka refuses the transactional id") as raised:
            async with opened(target(case, lane(case), producer=producer)):
                pass
        assert "kafka-acls.sh" in (raised.value.hint or "")
        case.address = server.bootstrap_servers
        (problem,) = await target(case, lane(case)).check()
        assert (problem.code, problem.object) == ("sink_progress", TOPIC)
        assert "--add-config cleanup.policy=compact" in problem.fix
        async with opened(target(case, None)) as sink:
            assert await sink.deliver(some(case, [1])) == {}
        case.address = server.sasl["bootstrap.servers"]
        async with opened(target(case, None, producer=producer)) as sink:
            failures = await sink.deliver(some(case, [2]))
            assert f"may not write to topic {case.name}" in failures[0].reason

    acl: Any = admin
    settings = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    with Kafka(settings=settings) as server, topic(server) as case:
        allowed = [
            acl.AclBinding(
                kind, name, acl.ResourcePatternType.LITERAL, "User:bridge", "*", operation, acl.AclPermissionType.ALLOW
            )
            for kind, name, operation in (
                (acl.ResourceType.TOPIC, "*", acl.AclOperation.DESCRIBE),
                (acl.ResourceType.BROKER, "kafka-cluster", acl.AclOperation.IDEMPOTENT_WRITE),
            )
        ]
        client = server.client()
        for done in client.create_acls(allowed).values():
            done.result(30)
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


def test_a_progress_that_is_far_from_the_end_is_found(server: Kafka) -> None:
    async def test() -> None:
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(1, 11))) == {}
        async with opened(target(case, lane(case, 1))) as other:
            for seq in range(1, 700):
                assert await other.deliver(some(case, [seq], key="other")) == {}
        async with opened(target(case, lane(case))) as sink:
            assert await sink.position() == 10

    with topic(server) as case:
        run(test())
        assert json.loads(case.messages(TOPIC)[-1][2]) == {"seq": 699, "of": 4}


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


def test_the_mock_cluster_of_librdkafka_takes_messages() -> None:
    """Where no real broker can be installed, this test remains."""

    async def test() -> None:
        client = Producer({"bootstrap.servers": case.address})
        for name in (TOPIC, case.name):
            await asyncio.to_thread(client.list_topics, name, 10)  # the mock cluster creates it
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(1, 11))) == {}

    with MockKafka() as mock:
        case = KafkaCase.__new__(KafkaCase)
        case.name, case.address = "mocked", mock.bootstrap_servers
        run(test())
