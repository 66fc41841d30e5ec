"""The Kafka sink and what Kafka refuses: sizes, missing topics, passwords and rights."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import admin

from cdcbridge.sinks.target import Unusable
from cdcbridge.sinks.targets.kafka_progress import TOPIC
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.kafka import Kafka
from tests.sinks.kafka import lane, opened, run, seqs, some, target, topic

pytestmark = pytest.mark.needs_kafka


@pytest.mark.parametrize("lanes", [True, False], ids=["lane", "claims"])
def test_a_message_that_is_larger_than_the_topic_or_the_producer_takes(own_kafka: Kafka, lanes: bool) -> None:
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

    with topic(own_kafka, partitions=1, max_message_bytes="10000") as case:
        run(test())
        expected = [i for first in (1, 101) for i in range(first, first + 10) if i != first + 4]
        found = seqs(case)
        assert found == expected if lanes else list(dict.fromkeys(found)) == expected


def test_a_topic_whose_limit_cannot_be_read(own_kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with topic(own_kafka, partitions=1, max_message_bytes="10000") as case:
        run(test())
        assert seqs(case) == [1, 2, 3, 4, *range(101, 105), *range(106, 111)]


def test_a_batch_that_is_larger_than_the_topic_takes(own_kafka: Kafka) -> None:
    """Kafka refuses many small messages together, because librdkafka sends them together."""

    async def test() -> None:
        async with opened(target(case, lane(case))) as sink:
            assert await sink.deliver(some(case, range(1, 201), body=b"x" * 300)) == {}

    with topic(own_kafka, partitions=1, max_message_bytes="10000") as case:
        run(test())
        assert seqs(case) == list(range(1, 201))


def test_what_is_missing_is_named_with_the_command_that_creates_it(own_kafka: Kafka) -> None:
    async def test() -> None:
        with pytest.raises(Unusable, match="there is no topic none") as raised:
            async with opened(target(case, lane(case), topic="none")):
                pass
        create = f"kafka-topics.sh --bootstrap-server {own_kafka.address} --create --topic none --partitions 4"
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

    with topic(own_kafka) as case:
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
