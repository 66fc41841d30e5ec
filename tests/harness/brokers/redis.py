"""Redis of Debian, whose writes are on disk before they are answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import redis

from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.server import Server


class Redis(Server):
    """One server.

    Args:
        auth: `password` is one for everybody, `acl` a user with a password of its own.
        tls: Certificates with which the server takes TLS alone.
        settings: Lines of redis.conf, such as {"min-replicas-to-write": "1"}.
    """

    name = "redis"
    user, password = "bridge", "secret"

    def __init__(
        self,
        *,
        auth: Literal["password", "acl"] | None = None,
        tls: Certificates | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.certificates = tls
        self.auth = auth
        self.settings = {
            "bind": self.host,
            "port": str(self.port),
            "dir": str(self.folder),
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory": "256mb",
            "maxmemory-policy": "noeviction",
            **(settings or {}),
        }
        if tls is not None:
            self.settings |= {
                "port": "0",
                "tls-port": str(self.port),
                "tls-cert-file": str(tls.server),
                "tls-key-file": str(tls.server_key),
                "tls-ca-cert-file": str(tls.ca),
                "tls-auth-clients": "no",
            }
        if auth == "password":
            self.settings["requirepass"] = self.password
        elif auth == "acl":
            self.settings["user"] = f"{self.user} on >{self.password} ~* &* +@all"
            self.settings["requirepass"] = "nobody-knows"

    @property
    def url(self) -> str:
        """With user and password, as redis.from_url takes it. The authority of TLS is not part of it."""
        login = {None: "", "password": f":{self.password}@", "acl": f"{self.user}:{self.password}@"}[self.auth]
        return f"{'redis' if self.certificates is None else 'rediss'}://{login}{self.address}/0"

    def client(self) -> redis.Redis:
        """Return a client, for a `with` block."""
        authority: dict[str, Any] = {} if self.certificates is None else {"ssl_ca_certs": str(self.certificates.ca)}
        return redis.Redis.from_url(self.url, socket_timeout=10, **authority)

    def command(self) -> Sequence[str | Path]:
        file = self.folder / "redis.conf"
        file.write_text("".join(f"{name} {value}\n" for name, value in self.settings.items()))
        return ["redis-server", file]

    def ask(self) -> None:
        with self.client() as client:
            client.ping()

    def fill(self) -> None:
        """Leave no memory, so that every write is refused with OOM."""
        with self.client() as client:
            client.config_set("maxmemory", 1)

    def make_room(self) -> None:
        """End fill()."""
        with self.client() as client:
            client.config_set("maxmemory", self.settings["maxmemory"])

    def freeze(self) -> None:
        """Become a replica of nobody that answers, so that every write is refused with READONLY."""
        with self.client() as client:
            client.replicaof(self.host, 1)

    def thaw(self) -> None:
        """End freeze()."""
        with self.client() as client:
            client.replicaof("NO", "ONE")
