"""The harness's HTTP server as a webhook."""

from __future__ import annotations

import json
from typing import Any

from tests.harness.brokers.http import HttpTarget
from tests.harness.proxy import Proxy
from tests.sinks.case import Case, Received


class HttpCase(Case):
    type = "http"
    exactly_once = False

    def __init__(
        self, server: HttpTarget, name: str, *, partitions: int = 4, batch: bool = False, proxy: Proxy | None = None
    ) -> None:
        self.server = server
        self._path = f"{name}/{{topic}}"
        self._batch = batch
        self._base = server.url if proxy is None else f"http://127.0.0.1:{proxy.port}/"

    def sink(self) -> dict[str, Any]:
        return {
            "type": "http", "url": f"{self._base}{self._path}", **({"batch": {"max_messages": 100}} if self._batch else {})
        }  # fmt: skip

    def received(self) -> list[Received]:
        found = []
        for request in self.server.requests:
            if not request.path.startswith(f"/{self._path.partition('/')[0]}/"):
                continue
            body = json.loads(request.body)
            for value in body if self._batch else [body]:
                one = value["id"] if self._batch else request.headers["webhook-id"]
                text = json.dumps(value).encode() if self._batch else request.body
                found.append(Received(one, value.get("key"), text, request.path))
        return found

    def close(self) -> None:
        pass
