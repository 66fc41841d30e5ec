"""Serve /metrics, /live and /ready over HTTP, and notify systemd's watchdog.

All answers are made from values in memory, because a database that hangs must not make them hang. This module never
changes anything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from cdcbridge.background import Background
from cdcbridge.errors import UsageError
from cdcbridge.observe.health import Health
from cdcbridge.observe.metrics import Metrics

StartResponse = Callable[..., Any]
_HELP: Final = b"cdcbridge: /metrics for Prometheus, /live and /ready for whoever restarts or routes\n"
log = structlog.get_logger()


class HttpServer(Background):
    """The HTTP server, which answers from entry to exit of its `with` block.

    Raises:
        UsageError: The server cannot listen on the address.
    """

    def __init__(self, address: tuple[str, int], health: Health, metrics: Metrics) -> None:
        super().__init__("http")
        self._health = health
        self._metrics = make_wsgi_app(metrics.registry)
        server: type[WSGIServer] = _V6 if ":" in address[0] else ThreadingWSGIServer
        try:
            self._server = make_server(*address, self._answer, server, _Quiet)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"http.listen: cannot listen on {address[0]}:{address[1]}: {error}",
                hint="Another program, perhaps a second bridge, may use it. Give another port, or `http: null` for no"
                " endpoint.",
            ) from None

    @property
    def port(self) -> int:
        return self._server.server_port

    def stop(self) -> None:
        super().stop()
        if self.started:
            self._server.shutdown()  # waits until the thread has stopped serving
        self._server.server_close()

    def _work(self) -> None:
        self._server.serve_forever(0.2)

    def _answer(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            body: Iterable[bytes] = self._metrics(environ, start)
            return body
        if path in ("/live", "/ready"):
            good, what = self._health.alive() if path == "/live" else self._health.ready()
            return _text(start, "200 OK" if good else "503 Service Unavailable", f"{what}\n".encode())
        return _text(start, "200 OK" if path == "/" else "404 Not Found", _HELP)


class _V6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    """A request handler that logs requests for debugging only, instead of writing a line for each."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        log.debug("http.request", request=format % args)


def _text(start: StartResponse, status: str, body: bytes) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]


class Watchdog(Background):
    """The thread that reports to systemd that the bridge works, for as long as it does.

    Without a NOTIFY_SOCKET, systemd has not asked for reports, and there is no thread. READY=1 is sent once the bridge
    streams or is a standby.

    Source: sd_notify(3) and sd_watchdog_enabled(3). A report is a datagram to NOTIFY_SOCKET.
    """

    def __init__(self, health: Health, environment: dict[str, str] | None = None) -> None:
        super().__init__("watchdog")
        given = dict(os.environ) if environment is None else environment
        self._health = health
        self._address = given.get("NOTIFY_SOCKET", "")
        timeout = int(given.get("WATCHDOG_USEC", "0")) / 1e6
        self._interval = timeout / 3 if timeout else 1.0

    def start(self) -> None:
        if self._address:
            super().start()

    def stop(self) -> None:
        super().stop()
        if self._address:
            self._notify("STOPPING=1")

    def _work(self) -> None:
        told = ""
        while not self._stop.wait(0 if not told else self._interval):
            alive, _ = self._health.alive()
            ready, what = self._health.ready()
            lines = [f"STATUS={what}"]
            if alive:
                lines.append("WATCHDOG=1")
            if ready and "READY=1" not in told:
                lines.append("READY=1")
            told = told if "READY=1" in told else "\n".join(lines)
            self._notify("\n".join(lines))

    def _notify(self, text: str) -> None:
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.sendto(text.encode(), address)
        except OSError as error:
            log.warning("watchdog.unheard", error=str(error))
