"""NATS with JetStream: one node or a cluster of three, from the Python index."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import nats
import nkeys
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nats.js.api import StreamConfig

from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.server import Cluster, Server, free_port

PROGRAM = Path(sys.prefix) / "bin" / "nats-server"
ACCOUNT, OPERATOR, USER = (nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_USER)


class Nats(Server):
    """One server with JetStream.

    Args:
        auth: How clients say who they are. `connection` has what nats.connect needs for it.
        tls: Certificates with which the server takes TLS alone.
        settings: Keys of the server's configuration, such as {"max_payload": 1024}.
    """

    name = "nats"
    user, password, token = "bridge", "secret", "s3cr3t"

    def __init__(
        self,
        *,
        auth: Literal["user", "token", "creds"] | None = None,
        tls: Certificates | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = dict(settings or {})
        self.connection: dict[str, Any] = {}
        self.credentials = self.folder / "bridge.creds"
        self.certificates = tls
        if tls is not None:
            self.settings["tls"] = {"cert_file": str(tls.server), "key_file": str(tls.server_key)}
        if auth == "user":
            self.settings["authorization"] = {"user": self.user, "password": self.password}
            self.connection = {"user": self.user, "password": self.password}
        elif auth == "token":
            self.settings["authorization"] = {"token": self.token}
            self.connection = {"token": self.token}
        elif auth == "creds":
            self.settings |= _operator_mode(self.credentials)
            self.connection = {"user_credentials": str(self.credentials)}

    @property
    def url(self) -> str:
        """For example nats://127.0.0.1:4222."""
        return f"{'nats' if self.certificates is None else 'tls'}://{self.address}"

    def command(self) -> Sequence[str | Path]:
        settings = {
            "server_name": f"node{self.port}",
            "host": self.host,
            "port": self.port,
            "jetstream": {"store_dir": str(self.folder), "max_memory_store": 64 << 20, "max_file_store": 4 << 30},
            **self.settings,
        }
        file = self.folder / "nats.conf"
        file.write_text(json.dumps(settings))
        return [PROGRAM, "--config", file]

    def environment(self) -> Mapping[str, str]:
        return {"GOMEMLIMIT": "128MiB", "GOMAXPROCS": "2"}

    def ask(self) -> None:
        asyncio.run(_ask([self], replicas=0))


class NatsCluster(Cluster[Nats]):
    """Three nodes. Streams have three replicas where their configuration says num_replicas=3."""

    def __init__(self) -> None:
        super().__init__([Nats() for _ in range(3)])
        ports = [free_port() for _ in self.nodes]
        routes = [f"nats://127.0.0.1:{port}" for port in ports]
        for node, port in zip(self.nodes, ports, strict=True):
            node.settings["cluster"] = {
                "name": "tests",
                "host": node.host,
                "port": port,
                "routes": routes,
                "no_advertise": True,  # clients know the addresses that they were given, for example of a proxy
            }

    @property
    def urls(self) -> list[str]:
        """The addresses of all nodes."""
        return [node.url for node in self.nodes]

    def start(self) -> None:
        # A node answers for JetStream when it has a leader, so the nodes are asked together.
        for node in self.nodes:
            node.launch()
        self.wait()

    def ask(self) -> None:
        asyncio.run(_ask(self.nodes, replicas=len(self.nodes)))


async def _ask(nodes: Sequence[Nats], *, replicas: int) -> None:
    """Read the account, and in a cluster make a stream with a replica on each node."""
    first = nodes[0]
    tls = None if first.certificates is None else first.certificates.client_context()
    client = await nats.connect(
        [node.url for node in nodes],
        allow_reconnect=False,
        connect_timeout=2,
        reconnect_time_wait=0,
        error_cb=_ignore,
        tls=tls,
        **first.connection,
    )
    try:
        stream = client.jetstream(timeout=5)
        await stream.account_info()
        if replicas:
            made = await stream.add_stream(StreamConfig("READY", subjects=["ready"], num_replicas=replicas))
            await stream.publish("ready", b"")
            info = await stream.stream_info("READY")
            assert info.cluster is not None and info.cluster.replicas is not None
            whole = all(peer.current and not peer.offline for peer in info.cluster.replicas)
            assert made.config.num_replicas == replicas and whole
            await stream.delete_stream("READY")
    finally:
        await client.close()


async def _ignore(_: Exception) -> None:
    """Say nothing: the caller tries again."""


def _operator_mode(credentials: Path) -> dict[str, Any]:
    """Write the credentials of a user, and return settings that accept users of the same account by their signature."""
    operator, account, system, user = (_new_key(kind) for kind in (OPERATOR, ACCOUNT, ACCOUNT, USER))
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    may = {"type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
    preload = {
        _name(account): _token(operator, account, {"type": "account", "limits": {**unlimited, **storage}}),
        _name(system): _token(operator, system, {"type": "account", "limits": unlimited}),
    }
    credentials.write_text(
        f"-----BEGIN NATS USER JWT-----\n{_token(account, user, may)}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.decode()}\n------END USER NKEY SEED------\n"
    )
    return {
        "operator": _token(operator, operator, {"type": "operator"}),
        "system_account": _name(system),
        "resolver": "MEMORY",
        "resolver_preload": preload,
    }


def _new_key(kind: int) -> bytes:
    raw = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    seed: bytes = nkeys.encode_seed(raw, kind)
    return seed


def _name(seed: bytes) -> str:
    """Return the public key, by which NATS names whoever has the seed."""
    public: bytes = nkeys.from_seed(bytearray(seed)).public_key
    return public.decode()


def _token(issuer: bytes, subject: bytes, claims: Mapping[str, Any]) -> str:
    """Return a JSON web token as NATS reads them, about one seed's owner and signed with another seed."""
    about = {"sub": _name(subject), "name": _name(subject)[:8], "nats": {"version": 2, **claims}}
    body = {"iat": int(time.time()), "iss": _name(issuer), **about}
    digest = hashlib.sha256(json.dumps(body).encode()).digest()
    body["jti"] = base64.b32encode(digest).decode().rstrip("=")
    signed = ".".join(_base64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body))
    return f"{signed}.{_base64(nkeys.from_seed(bytearray(issuer)).sign(signed.encode()))}"


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")
