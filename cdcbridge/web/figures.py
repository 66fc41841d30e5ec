"""The metrics of `serve` for Prometheus: slot and consumers as `run` shows them, and the figures of the API itself.

However many callers ask, slot and consumers are measured once in five seconds at most, in a thread. Never keeps an old
value for a database that does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from time import monotonic
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import Response

from cdcbridge import __version__
from cdcbridge.config import Config
from cdcbridge.database import database_place
from cdcbridge.errors import CdcbridgeError
from cdcbridge.observe.lag import Lag
from cdcbridge.observe.metrics import Measurements, labelled
from cdcbridge.web.calls import Call, Endpoint, Services
from cdcbridge.web.states import measured

_FRESH: Final = 5.0  # seconds
_PATIENCE: Final = 8.0  # seconds. Prometheus waits for 10
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
log = structlog.get_logger()


class Figures:
    """The metrics of one process.

    Args:
        config: The configuration, which names the source and the slot.
    """

    def __init__(self, config: Config) -> None:
        unlabelled = CollectorRegistry()
        self._requests = Histogram(
            "cdcbridge_api_request_seconds",
            "Time that the API took for requests, with the time that a long poll waited",
            ["method", "path", "status"],
            registry=unlabelled,
            buckets=_SECONDS,
        )
        self._measurements = Measurements(__version__)
        self._running: asyncio.Task[Lag] | None = None
        self._measured_at = -_FRESH
        self._unlabelled = unlabelled
        unlabelled.register(self._measurements)
        name = config.source.name or database_place(config.source_dsn)
        self._registry = labelled(unlabelled, name, config.source.slot)

    def watch(self, services: Services) -> None:
        """Also show how much of these services is in use."""
        self._unlabelled.register(_InUse(services))

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            method: For example GET.
            path: The template of the path, for example /api/consumers/{name}.
            status: The status of the answer.
            seconds: The time that it took.
        """
        self._requests.labels(method, path.replace(":path", ""), status).observe(seconds)

    async def text(self, services: Services, accept: str) -> tuple[bytes, str]:
        """Return all metrics, and their media type."""
        await self._measure(services)
        encoder, media = choose_encoder(accept)
        return encoder(self._registry), media

    async def _measure(self, services: Services) -> None:
        if self._running is None and monotonic() - self._measured_at >= _FRESH:
            self._running = asyncio.create_task(services.beside(measured, services.config))
            self._running.add_done_callback(self._take)
        if self._running is not None:
            done, _ = await asyncio.wait({self._running}, timeout=_PATIENCE)
            if not done:
                self._measurements.not_measured(source=False)

    def _take(self, done: asyncio.Task[Lag]) -> None:
        self._running, self._measured_at = None, monotonic()
        error = None if done.cancelled() else done.exception()
        if error is None and not done.cancelled():
            self._measurements.measured(done.result())
            return
        self._measurements.not_measured(source=False, store=False)
        if not isinstance(error, CdcbridgeError | None):
            log.warning("watch.failed", error=" ".join(str(error).split()))


class _InUse(Collector):
    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        services = self._services
        for name, text, value in (
            ("open_polls", "Long polls and event streams that wait for messages", services.arrivals.waiting),
            ("event_streams", "Streams of server-sent events that are open", len(services.event_streams)),
            ("sessions_in_use", "Sessions on the store that run a statement", services.store.in_use),
            ("sessions_limit", "Sessions on the store that may be open", services.config.api.connections),
        ):
            yield GaugeMetricFamily(f"cdcbridge_api_{name}", text, float(value))


async def metrics(call: Call) -> Response:
    """Return the metrics for Prometheus."""
    call.caller.refuse_restricted("GET /api/consumers lists them.")
    body, media = await call.services.figures.text(call.services, call.headers.get("accept", ""))
    return Response(body, media_type=media, headers={"Cache-Control": "no-store"})


ENDPOINTS = (
    Endpoint("GET", "/metrics", "look", {}, metrics, media="text/plain"),
    Endpoint("GET", "/api/metrics", "look", {}, metrics, media="text/plain"),
)
