"""Redis, for the conformance suite."""

from __future__ import annotations

from typing import Any

from tests.harness.brokers.redis import Redis
from tests.harness.proxy import Proxy
from tests.sinks.case import Case, Received


class RedisCase(Case):
    """Streams whose names begin with that of the case, one for each partition.

    Args:
        server: The server.
        name: The beginning of the streams' names.
        partitions: How many partitions the log has.
        proxy: A proxy in front of the server.
        keys: Further keys of the sink.
    """

    type = "redis"
    exactly_once = True

    def __init__(
        self, server: Redis, name: str, *, partitions: int = 4, proxy: Proxy | None = None, **keys: Any
    ) -> None:
        self.server = server
        self._name = name
        self._partitions = partitions
        self._proxy = proxy
        self._keys = keys

    def sink(self) -> dict[str, Any]:
        url = self.server.url
        if self._proxy is not None:
            url = url.replace(f":{self.server.port}/", f":{self._proxy.port}/")
        return {"type": "redis", "url": url, "stream": f"{self._name}:{{partition}}", **self._keys}

    def received(self) -> list[Received]:
        found = []
        with self.server.client() as client:
            for stream in (f"{self._name}:{number}" for number in range(self._partitions)):
                entries: Any = client.xrange(stream)
                for _, fields in entries:
                    key = fields.get(b"key")
                    found.append(
                        Received(fields[b"id"].decode(), None if key is None else key.decode(), fields[b"body"], stream)
                    )
        return found

    def close(self) -> None:
        with self.server.client() as client:
            for pattern in (f"{self._name}:*", f"cdcbridge:progress:{{{self._name}:*"):
                for key in client.scan_iter(pattern):
                    client.delete(key)
