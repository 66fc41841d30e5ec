"""RabbitMQ of Debian with its stream plugin, and with an Erlang port mapper of its own."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.brokers.amqp import channel
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.server import PATIENCE, Cluster, Server, free_port
from tests.harness.proxy import Proxy
from tests.harness.world import eventually

# The package's wrapper insists on the user rabbitmq. The scripts that it calls do not.
SCRIPTS = Path("/usr/lib/rabbitmq/lib")


class RabbitMQ(Server):
    """One server for AMQP 0.9.1 and for streams.

    Args:
        tls: Certificates for a port that takes TLS alone, beside the plain one.
        settings: Lines of rabbitmq.conf.
    """

    name = "rabbitmq"
    user, password = "bridge", "secret"

    def __init__(self, *, tls: Certificates | None = None, settings: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.stream_port, self.tls_port, self._distribution, self.mapper = (free_port() for _ in range(4))
        self.maps = True  # whether it starts the port mapper, which a cluster shares
        self.certificates = tls
        self.settings = {
            "listeners.tcp.default": self.address,
            "stream.listeners.tcp.1": f"{self.host}:{self.stream_port}",
            # Stream clients go to the address that the server names.
            "stream.advertised_host": self.host,
            "stream.advertised_port": str(self.stream_port),
            "distribution.listener.interface": self.host,
            "distribution.listener.port_range.min": str(self._distribution),
            "distribution.listener.port_range.max": str(self._distribution),
            "default_user": self.user,
            "default_pass": self.password,
            "vm_memory_high_watermark.absolute": "512MB",
            "disk_free_limit.absolute": "50MB",
            "log.console": "true",
            "log.file": "false",
            **(settings or {}),
        }
        if tls is not None:
            self.settings |= {
                "listeners.ssl.default": f"{self.host}:{self.tls_port}",
                "ssl_options.cacertfile": str(tls.ca),
                "ssl_options.certfile": str(tls.server),
                "ssl_options.keyfile": str(tls.server_key),
                "ssl_options.verify": "verify_none",
            }

    @property
    def node(self) -> str:
        """The name of the node."""
        return f"tests{self.port}@localhost"

    @property
    def url(self) -> str:
        """For AMQP, with user and password."""
        return f"amqp://{self.user}:{self.password}@{self.address}/"

    @property
    def tls_url(self) -> str:
        """For AMQP over TLS."""
        return f"amqps://{self.user}:{self.password}@{self.host}:{self.tls_port}/"

    @property
    def stream_url(self) -> str:
        """For streams."""
        return f"rabbitmq-stream://{self.user}:{self.password}@{self.host}:{self.stream_port}/"

    def advertise(self, proxy: Proxy) -> None:
        """Send stream clients through a proxy in front of `stream_port`. Counts from the next start."""
        self.settings["stream.advertised_port"] = str(proxy.port)

    def environment(self) -> Mapping[str, str]:
        return {
            "HOME": str(self.folder),  # of the cookie
            "ERL_EPMD_PORT": str(self.mapper),
            "ERL_EPMD_ADDRESS": self.host,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            # Schedulers that wait for work without spinning: the machine has more to do.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def command(self) -> Sequence[str | Path]:
        lines = "".join(f"{name} = {value}\n" for name, value in self.settings.items())
        (self.folder / "rabbitmq.conf").write_text(lines)
        (self.folder / "enabled_plugins").write_text("[rabbitmq_stream].")
        server = str(_script("rabbitmq-server"))
        if not self.maps:
            return [server]
        # A mapper that is no daemon ends with the group of the server.
        return ["sh", "-c", f"{shlex.join(self.map_ports())} & exec {shlex.quote(server)}"]

    def map_ports(self) -> Sequence[str]:
        """Return the command of the Erlang port mapper."""
        return ["epmd", "-port", str(self.mapper), "-address", self.host]

    def ask(self) -> None:
        asyncio.run(self._ask())

    async def _ask(self) -> None:
        async with asyncio.timeout(5), channel(self.url) as one:
            await one.queue_declare("ready", exclusive=True)
        with socket.create_connection((self.host, self.stream_port), timeout=1):
            pass

    def control(self, *arguments: str) -> str:
        """Run rabbitmqctl, and return its output. It takes a second or more."""
        result = subprocess.run(
            [_script("rabbitmqctl"), *arguments],
            env={**os.environ, **self.environment()},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def fill(self) -> None:
        """Raise the alarm of a full disk: the server reads nothing more from a connection that publishes."""
        self.control("set_disk_free_limit", "1000000GB")
        eventually(lambda: "disk" in self._alarms(), "the alarm rings")

    def make_room(self) -> None:
        """End fill()."""
        self.control("set_disk_free_limit", "50MB")
        eventually(lambda: "disk" not in self._alarms(), "the alarm ends")

    def _alarms(self) -> str:
        return self.control("eval", "rabbit_alarm:get_alarms().")


class RabbitMQCluster(Cluster[RabbitMQ]):
    """Three nodes. A stream has a replica on each, and two of them must have a message before it is confirmed."""

    def __init__(self) -> None:
        super().__init__([RabbitMQ() for _ in range(3)])
        first = self.nodes[0]
        self._mapper: subprocess.Popen[bytes] | None = None
        for node in self.nodes:
            node.mapper, node.maps = first.mapper, False
            node.settings["cluster_formation.peer_discovery_backend"] = "classic_config"
            for number, one in enumerate(self.nodes, 1):
                node.settings[f"cluster_formation.classic_config.nodes.{number}"] = one.node
            cookie = node.folder / ".erlang.cookie"
            cookie.write_text("tests")
            cookie.chmod(0o400)

    def start(self) -> None:
        self._mapper = self._mapper or subprocess.Popen(self.nodes[0].map_ports())
        self.nodes[0].start()  # the others join it
        for node in self.nodes[1:]:
            node.launch()
        for node in self.nodes[1:]:
            node.wait()
        self.wait()

    def leader(self, stream: str) -> RabbitMQ:
        """Return the node that leads a stream."""
        rows = self.nodes[0].control("-q", "list_queues", "--no-table-headers", "name", "leader").splitlines()
        found = dict(row.split("\t") for row in rows)
        return next(node for node in self.nodes if node.node == found[stream])

    def ask(self) -> None:
        running = self.nodes[0].control("eval", "length(rabbit_mnesia:cluster_nodes(running)).")
        assert int(running) == len(self.nodes)

    def remove(self) -> None:
        super().remove()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()


def _script(name: str) -> Path:
    found = sorted(SCRIPTS.glob(f"rabbitmq_server-*/sbin/{name}"))
    assert found, "RabbitMQ is missing: run `make servers`"
    return found[-1]
