"""Apache Kafka in KRaft mode: one node, or three with three replicas. Also the mock cluster of librdkafka."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.server import PATIENCE, Cluster, Server, free_port
from tests.harness.proxy import Proxy

JARS = Path(sys.prefix) / "kafka"
# The virtual machine: small, and quick to start.
JAVA = ("java", "-Xmx256m", "-Xms64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:CICompilerCount=1",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{JARS}/*")  # fmt: skip
CLUSTER_ID = "AAAAAAAAAAAAAAAAAAAAAQ"
# What a new node begins with: the versions of its features, and the users of SCRAM.
BOOTSTRAP = JARS / "bootstrap.checkpoint"
# The classes of a running node, ready for the virtual machine: a start needs half the time.
CLASSES = JARS / "classes.jsa"


def installed() -> bool:
    """Return whether `make servers` could fetch the broker."""
    return (JARS / ".installed").exists()


def prepare() -> None:
    """Do once what would cost each start of a node a second: after it both files above are there."""
    node = Kafka()
    made = CLASSES.with_suffix(f".{os.getpid()}")
    node.machine = [f"-XX:ArchiveClassesAtExit={made}"]
    with node:
        node.stop()
    made.replace(CLASSES)


class Kafka(Server):
    """One node, which is broker and controller.

    It has three addresses for clients: `bootstrap_servers` takes everybody, `sasl` asks for user and password, `proxied`
    is for a proxy in front of `proxied_port`. With certificates, `tls` asks for both TLS and a password.

    Args:
        tls: Certificates for the address with TLS.
        settings: Keys of server.properties.
    """

    name = "kafka"
    user, password = "bridge", "secret"

    def __init__(self, *, tls: Certificates | None = None, settings: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.sasl_port, self.tls_port, self.proxied_port, self.controller_port = (free_port() for _ in range(4))
        self.node_id = 1
        self.certificates = tls
        self._advertised = self.proxied_port
        self.voters = [f"1@{self.host}:{self.controller_port}"]
        self.settings = {"min.insync.replicas": "1", **(settings or {})}
        self.replicas = 1
        self.machine = [f"-XX:SharedArchiveFile={CLASSES}"] if CLASSES.exists() else []

    @property
    def bootstrap_servers(self) -> str:
        """The address for clients without a password."""
        return self.address

    @property
    def sasl(self) -> dict[str, str]:
        """The properties of a client that says who it is, by SCRAM-SHA-256. PLAIN and SCRAM-SHA-512 work too."""
        return self._login(self.sasl_port, "SASL_PLAINTEXT")

    @property
    def tls(self) -> dict[str, str]:
        """The properties of a client that uses TLS and says who it is."""
        assert self.certificates is not None
        return {**self._login(self.tls_port, "SASL_SSL"), "ssl.ca.location": str(self.certificates.ca)}

    def _login(self, port: int, protocol: str) -> dict[str, str]:
        return {
            "bootstrap.servers": f"{self.host}:{port}",
            "security.protocol": protocol,
            "sasl.mechanism": "SCRAM-SHA-256",
            "sasl.username": self.user,
            "sasl.password": self.password,
        }

    def advertise(self, proxy: Proxy) -> None:
        """Send the clients that come through a proxy in front of `proxied_port` back through it. Call it before start()."""
        self._advertised = proxy.port

    def client(self) -> AdminClient:
        """Return a client of the administrator."""
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "socket.timeout.ms": 5000, **QUIET})

    def create_topic(self, name: str, partitions: int = 1, **settings: str) -> None:
        """Create a topic and wait until it is there."""
        _create_topic(self.client(), name, partitions, self.replicas, settings)

    def command(self) -> Sequence[str | Path]:
        file = self.folder / "server.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in self._properties().items()))
        if not (self.folder / "data" / "meta.properties").exists():
            self._format(file)
        return [*JAVA, *self.machine, "kafka.Kafka", file]

    def _properties(self) -> dict[str, str]:
        ports = {"PLAIN": self.port, "SASL": self.sasl_port, "PROXIED": self.proxied_port}
        protocols = {"PLAIN": "PLAINTEXT", "SASL": "SASL_PLAINTEXT", "PROXIED": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}
        if self.certificates is not None:
            ports["TLS"] = self.tls_port
            protocols["TLS"] = "SASL_SSL"
        listeners = {**ports, "CONTROLLER": self.controller_port}
        advertised = {**ports, "PROXIED": self._advertised}
        return {
            "process.roles": "broker,controller",
            "node.id": str(self.node_id),
            "controller.quorum.voters": ",".join(self.voters),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAIN",
            "listeners": ",".join(f"{name}://{self.host}:{port}" for name, port in listeners.items()),
            "advertised.listeners": ",".join(f"{name}://{self.host}:{port}" for name, port in advertised.items()),
            "listener.security.protocol.map": ",".join(f"{name}:{value}" for name, value in protocols.items()),
            "log.dirs": str(self.folder / "data"),
            **self._security(),
            **{f"{topic}.replication.factor": str(self.replicas) for topic in INTERNAL},
            **SMALL,
            **self.settings,
        }

    def _security(self) -> dict[str, str]:
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        plain = (
            "org.apache.kafka.common.security.plain.PlainLoginModule required "
            f'user_{self.user}="{self.password}" user_nobody="nothing";'
        )
        found = {"sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512"}
        for listener in ("sasl", "tls"):
            found[f"listener.name.{listener}.plain.sasl.jaas.config"] = plain
            for size in (256, 512):
                found[f"listener.name.{listener}.scram-sha-{size}.sasl.jaas.config"] = scram
        if self.certificates is not None:
            both = self.folder / "server.pem"
            both.write_bytes(self.certificates.server_key.read_bytes() + self.certificates.server.read_bytes())
            found |= {
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(both),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self.certificates.ca),
            }
        return found

    def _format(self, file: Path) -> None:
        """Do what the storage tool does. It runs once, because it needs a second for what is the same for all nodes."""
        data = self.folder / "data"
        data.mkdir()
        if not BOOTSTRAP.exists():
            login = (f"SCRAM-SHA-{size}=[name={self.user},password={self.password}]" for size in (256, 512))
            users = [argument for one in login for argument in ("--add-scram", one)]
            command = [*JAVA, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(file), *users]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            made = shutil.copy(data / BOOTSTRAP.name, BOOTSTRAP.with_suffix(f".{os.getpid()}"))
            Path(made).replace(BOOTSTRAP)
        shutil.copy(BOOTSTRAP, data)
        directory = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        lines = ("version=1", f"cluster.id={CLUSTER_ID}", f"node.id={self.node_id}", f"directory.id={directory}")
        (data / "meta.properties").write_text("\n".join(lines) + "\n")

    def ask(self) -> None:
        metadata = self.client().list_topics(timeout=2)
        assert self.node_id in metadata.brokers


class KafkaCluster(Cluster[Kafka]):
    """Three nodes. A topic has three replicas, and a write needs two of them."""

    def __init__(self) -> None:
        super().__init__([Kafka(settings={"min.insync.replicas": "2"}) for _ in range(3)])
        voters = [f"{number}@{node.host}:{node.controller_port}" for number, node in enumerate(self.nodes, 1)]
        for number, node in enumerate(self.nodes, 1):
            node.node_id, node.voters, node.replicas = number, voters, len(voters)

    @property
    def bootstrap_servers(self) -> str:
        """The addresses of all nodes."""
        return ",".join(node.address for node in self.nodes)

    def client(self) -> AdminClient:
        """Return a client of the administrator."""
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "socket.timeout.ms": 5000, **QUIET})

    def create_topic(self, name: str, partitions: int = 1, **settings: str) -> None:
        """Create a topic and wait until it is there on all nodes."""
        _create_topic(self.client(), name, partitions, len(self.nodes), settings)

    def leader(self, topic: str, partition: int = 0) -> Kafka:
        """Return the node that leads a partition."""
        number = self.client().list_topics(topic, timeout=PATIENCE).topics[topic].partitions[partition].leader
        return self.nodes[number - 1]

    def stop(self) -> None:
        """Let two nodes end in good order, and kill the last one, which would wait for a majority."""
        *others, last = self.nodes
        for node in others:
            node.stop()
        last.kill()

    def ask(self) -> None:
        assert len(self.client().list_topics(timeout=2).brokers) == len(self.nodes)


class MockKafka:
    """The cluster inside librdkafka. It creates topics by itself, hides no aborted transaction, and knows no users."""

    def __init__(self, nodes: int = 1) -> None:
        self._owner: Producer | None = None
        self._nodes = nodes
        self.bootstrap_servers = ""

    def __enter__(self) -> Self:
        self._owner = Producer({"test.mock.num.brokers": self._nodes, **QUIET})
        brokers = self._owner.list_topics(timeout=PATIENCE).brokers.values()
        self.bootstrap_servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        return self

    def __exit__(self, *_: object) -> None:
        self._owner = None


# Without a group to wait for, with few threads and small topics of its own.
INTERNAL = ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")
SMALL = {
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "num.network.threads": "1",
    "num.io.threads": "4",
    "log.cleaner.dedupe.buffer.size": str(8 << 20),
    "controller.quorum.election.timeout.ms": "500",
    "controller.quorum.election.backoff.max.ms": "300",
    "controller.quorum.fetch.timeout.ms": "1000",
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "replica.lag.time.max.ms": "3000",
    "auto.create.topics.enable": "false",
    "controlled.shutdown.enable": "true",
}
QUIET: dict[str, Any] = {"log_level": 0}


def _create_topic(client: AdminClient, name: str, partitions: int, replicas: int, settings: Mapping[str, str]) -> None:
    config = {key.replace("_", "."): value for key, value in settings.items()}
    # After a pause the broker first has to find the controller again, so the patience of a start holds here too.
    topics = [NewTopic(name, partitions, replicas, config=config)]
    client.create_topics(topics, request_timeout=PATIENCE)[name].result(PATIENCE)


if __name__ == "__main__":
    prepare()
