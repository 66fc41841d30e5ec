"""The brokers of the tests do what the tests of sinks need of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from confluent_kafka import KafkaError, KafkaException
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from cdcbridge.sinks.targets.rabbitmq_stream_connection import StreamConnection
from cdcbridge.sinks.targets.rabbitmq_url import Address
from tests.brokers import talk
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.kafka import Kafka, KafkaCluster, MockKafka
from tests.harness.brokers.nats import Nats, NatsCluster
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.harness.brokers.redis import Redis
from tests.harness.brokers.server import Server, listening
from tests.harness.brokers.sqs import Ministack, Moto, SqsServer
from tests.harness.proxy import Proxy
from tests.harness.world import eventually

pytestmark = pytest.mark.timeout(240)
kafka = pytest.mark.needs_kafka
STORES: list[Any] = [
    pytest.param(Nats, talk.make_nats, talk.put_nats, talk.get_nats, id="nats"),
    pytest.param(Redis, None, talk.put_redis, talk.get_redis, id="redis"),
    pytest.param(RabbitMQ, talk.make_rabbitmq, talk.put_rabbitmq, talk.get_rabbitmq, id="rabbitmq"),
    pytest.param(Kafka, lambda server: server.create_topic("talk"), talk.put_kafka, talk.get_kafka, id="kafka", marks=kafka),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "make", "put", "get"), STORES)
def test_a_message_survives_a_kill_and_a_pause(
    kind: type[Server], make: Callable[[Any], None] | None, put: Callable[..., None], get: Callable[[Any], list[str]]
) -> None:
    with kind() as server:
        port = server.port
        if make:
            make(server)
        put(server, "a")
        assert 0 < server.megabytes < 500
        server.kill()
        assert not listening(port)
        server.restart()
        assert server.port == port and get(server) == ["a"]
        server.pause()
        writer = threading.Thread(target=put, args=(server, "b"))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive(), "a paused server answers nothing"
        server.resume()
        writer.join()
        assert get(server) == ["a", "b"]
        server.stop()
        server.restart()
        assert get(server) == ["a", "b"]
        assert subprocess.run(["pgrep", "-g", str(server.running.pid)], capture_output=True, check=False).stdout
        group = server.running.pid
    assert not server.folder.exists() and not listening(port)
    eventually(lambda: not _living(group), "the whole group of processes is gone")


def _living(group: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False)
    return any(not state.startswith("Z") for state in listed.stdout.split())


@pytest.mark.parametrize("kind", [Nats, Redis, RabbitMQ, pytest.param(Kafka, marks=kafka), Moto, Ministack])
def test_a_server_listens_on_loopback_alone(kind: type[Server]) -> None:
    """A server on all addresses of the machine would answer on every address of the loopback network, too."""
    with kind() as server:
        lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
        group = subprocess.run(["pgrep", "-g", str(server.running.pid)], capture_output=True, text=True, check=False)
        own = [line.split()[3] for line in lines if any(f"pid={pid}," in line for pid in group.stdout.split())]
    assert any(address.endswith(f":{server.port}") for address in own)
    assert all(address.startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:", "[::1]:")) for address in own), own


def test_three_nodes_of_nats_lose_one_and_go_on() -> None:
    with NatsCluster() as cluster:
        talk.make_nats(cluster)
        talk.put_nats(cluster, "a")
        leader = talk.leader_of_nats(cluster)
        leader.kill()
        eventually(lambda: _done(talk.put_nats, cluster, "b"), "two nodes choose a leader")
        leader.restart()
        cluster.wait()
        assert {"a", "b"} == set(talk.get_nats(cluster))


@kafka
def test_three_nodes_of_kafka_lose_one_and_go_on() -> None:
    with KafkaCluster() as cluster:
        cluster.create_topic("talk")
        talk.put_kafka(cluster, "a")
        cluster.create_topic("strict", min_insync_replicas="3")
        leader = cluster.leader("talk")
        leader.kill()
        talk.put_kafka(cluster, "b")
        with pytest.raises(KafkaException) as refused:
            talk.put_kafka(cluster, "c", 8.0, "strict")
        assert refused.value.args[0].code() in (KafkaError.NOT_ENOUGH_REPLICAS, KafkaError._MSG_TIMED_OUT)
        assert talk.get_kafka(cluster) == ["a", "b"]
        leader.restart()
        cluster.wait()
        cluster.stop()
        cluster.restart()
        assert talk.get_kafka(cluster) == ["a", "b"]


def _done(call: Callable[..., None], *arguments: Any) -> bool:
    with contextlib.suppress(NatsError):
        call(*arguments)
        return True
    return False


@pytest.mark.parametrize("auth", ["user", "token", "creds", None])
def test_nats_knows_its_users(auth: Any, certificates: Certificates) -> None:
    with Nats(auth=auth, tls=None if auth else certificates) as server:
        talk.make_nats(server)
        talk.put_nats(server, "a")
        assert talk.get_nats(server) == ["a"]
        if auth is None:
            with socket.create_connection((server.host, server.port)) as plain:
                assert b'"tls_required":true' in plain.recv(4096)
            return
        server.connection = {}
        with pytest.raises(NatsError):
            talk.put_nats(server, "b")


def test_nats_refuses_what_does_not_fit() -> None:
    with Nats() as server:
        talk.make_nats(server, max_bytes=1000, discard="new")
        talk.put_nats(server, "a")
        with pytest.raises(APIError, match="maximum bytes"):
            talk.put_nats(server, "b" * 1000)


@pytest.mark.parametrize("auth", ["password", "acl", None])
def test_redis_knows_its_users(auth: Any, certificates: Certificates) -> None:
    with Redis(auth=auth, tls=None if auth else certificates) as server:
        talk.put_redis(server, "a")
        assert talk.get_redis(server) == ["a"]
        stranger = redis.Redis(port=server.port)
        with stranger, pytest.raises(redis.RedisError):
            stranger.xadd("talk", {"text": "b"})


def test_redis_is_full_and_frozen_on_demand() -> None:
    with Redis() as server:
        server.fill()
        with pytest.raises(redis.OutOfMemoryError):
            talk.put_redis(server, "a")
        server.make_room()
        talk.put_redis(server, "b")
        server.freeze()
        with pytest.raises(redis.ReadOnlyError):
            talk.put_redis(server, "c")
        server.thaw()
        assert talk.get_redis(server) == ["b"]


def test_rabbitmq_with_tls_users_an_alarm_and_streams_behind_a_proxy(certificates: Certificates) -> None:
    server = RabbitMQ(tls=certificates)
    with Proxy(server.stream_port) as proxy:
        server.advertise(proxy)
        with server:
            talk.put_rabbitmq(server, "a", server.tls_url, context=certificates.client_context())
            with pytest.raises(Exception, match="REFUSED"):
                talk.put_rabbitmq(server, "b", server.url.replace(server.password, "wrong"))
            assert asyncio.run(_stream(server, proxy.port)) == 3
            proxy.away = True
            with pytest.raises(OSError, match="closed"):
                asyncio.run(_open(server, proxy.port))
            proxy.away = False
            server.fill()
            with pytest.raises(TimeoutError):
                talk.put_rabbitmq(server, "c", timeout=0.5)
            server.make_room()
            talk.put_rabbitmq(server, "d")
            assert [text for text in talk.get_rabbitmq(server) if text != "c"] == ["a", "d"]


async def _open(server: RabbitMQ, port: int) -> None:
    """Open a connection of the sink, because a Producer of rstream leaves its socket open if it is cancelled."""
    address = Address(server.host, port, server.user, server.password, "/", secure=False, tls=None)
    connection = StreamConnection(address, "numbers")
    try:
        async with asyncio.timeout(30):
            await connection.open()
    finally:
        await connection.close()


async def _stream(server: RabbitMQ, port: int) -> int:
    """Publish three messages with publishing ids, and return the last id that the server knows."""
    from rstream import Producer, RawMessage

    async with asyncio.timeout(30):
        async with Producer(server.host, port, username=server.user, password=server.password) as producer:
            await producer.create_stream("numbers", exists_ok=True)
            for number in (1, 2, 3):
                await producer.send_wait("numbers", RawMessage(b"x", number), publisher_name="sink")
            client = await producer.default_client
            return int(await client.query_publisher_sequence("numbers", "sink"))


@kafka
def test_kafka_with_tls_users_and_a_proxy(certificates: Certificates) -> None:
    server = Kafka(tls=certificates)
    with Proxy(server.proxied_port) as proxy:
        server.advertise(proxy)
        with server:
            server.create_topic("talk")
            for mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
                for login in (server.sasl, server.tls):
                    client: dict[str, Any] = {**login, "sasl.mechanism": mechanism}
                    talk.put_kafka(server, mechanism, **client)
            wrong: list[dict[str, Any]] = [
                {**server.sasl, "sasl.password": "x"},
                {**server.tls, "ssl.ca.location": str(certificates.other_ca)},
            ]
            for client in wrong:
                with pytest.raises(KafkaException):
                    talk.put_kafka(server, "stranger", 2.0, **client)
            through: dict[str, Any] = {"bootstrap.servers": f"127.0.0.1:{proxy.port}"}
            talk.put_kafka(server, "through", **through)
            proxy.away = True
            with pytest.raises(KafkaException):
                talk.put_kafka(server, "away", 2.0, **through)
            proxy.away = False
            assert talk.get_kafka(server, **through)[-1] == "through"


def test_a_shared_kafka_cannot_be_stopped(kafka_broker: Kafka) -> None:
    kafka_broker.ask()
    with pytest.raises(AssertionError, match="not started by this object"):
        kafka_broker.kill()


def test_the_mock_cluster_takes_a_message(kafka_mock: MockKafka) -> None:
    talk.put_kafka(kafka_mock, "a")
    assert talk.get_kafka(kafka_mock) == ["a"]


@pytest.mark.parametrize("kind", [Moto, Ministack])
def test_sqs_takes_and_forgets_messages(kind: type[SqsServer]) -> None:
    with kind() as server, contextlib.closing(server.client()) as client:
        queue = server.create_queue("talk.fifo")
        send = {"QueueUrl": queue, "MessageBody": "a", "MessageGroupId": "g", "MessageDeduplicationId": "1"}
        client.send_message(**send)
        client.send_message(**send)
        received = client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10)["Messages"]
        assert [message["Body"] for message in received] == ["a"]
        server.kill()
        server.restart()
        assert "QueueUrls" not in client.list_queues() or not client.list_queues()["QueueUrls"]


def test_sqs_refuses_strangers() -> None:
    with Moto(check_keys=True) as server:
        server.create_queue("talk")
        server.secret_key = "wrong"
        with pytest.raises(Exception, match=r"SignatureDoesNotMatch|InvalidClientTokenId|signature"):
            server.create_queue("other")


def test_one_server_serves_a_run_and_ends_with_it(tmp_path: Path) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from tests.harness.brokers.shared import shared\n"
        "with ThreadPoolExecutor(2) as pool: found = list(pool.map(shared, ['redis', 'redis']))\n"
        "print(*(server.port for server in found))\n"
        "found[0].ask()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    environment["TMPDIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, second = map(int, run.stdout.split())
    assert first == second
    eventually(lambda: not listening(first), "the server ends with its run")
    eventually(lambda: not list(tmp_path.iterdir()), "nothing is left")
