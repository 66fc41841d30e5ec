"""An HTTP server in a thread that answers as a test tells it, and records the requests."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from aiohttp import web

from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.server import free_port, listening
from tests.harness.world import eventually


@dataclass(frozen=True)
class Request:
    """A request that has arrived. The names of headers are lower case. `at`: time.monotonic() of its arrival."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float


@dataclass(frozen=True)
class Answer:
    """How to answer one request.

    Attributes:
        delay: Seconds to wait before the answer.
        cut: Reset the connection before the answer begins, or in the middle of its body.
        drips: Send a byte of the body again and again, without an end.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: Literal["before", "middle"] | None = None
    drips: bool = False


Script = Answer | Callable[[Request], Answer]


class HttpTarget:
    """A server from entry to exit of its `with` block.

    Example:
        `target.answer(Answer(503, headers={"Retry-After": "1"}))` refuses the next request, and takes those after it.

    Args:
        token: Answer 401 where the request has another bearer token.
        tls: Certificates with which the server speaks HTTPS.
    """

    def __init__(self, *, token: str | None = None, tls: Certificates | None = None) -> None:
        self.port = free_port()
        self.token = token
        self.otherwise: Script = Answer()
        self._tls = tls
        self._scripts: list[Script] = []
        self._requests: list[Request] = []
        self._arrived = threading.Condition()
        self._speaking = threading.Event()
        self._speaking.set()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """For example http://127.0.0.1:8080/."""
        return f"http{'' if self._tls is None else 's'}://127.0.0.1:{self.port}/"

    @property
    def requests(self) -> list[Request]:
        """All requests since the beginning, also those that were refused or cut."""
        with self._arrived:
            return list(self._requests)

    def answer(self, *scripts: Script) -> None:
        """Answer the next requests so, one script each. `otherwise` answers all after them."""
        with self._arrived:
            self._scripts += scripts

    def wait(self, count: int, patience: float = 30.0) -> list[Request]:
        """Return the requests when there are at least so many. Raises AssertionError after `patience` seconds."""
        with self._arrived:
            found = self._arrived.wait_for(lambda: len(self._requests) >= count, patience)
            assert found, f"{len(self._requests)} of {count} requests arrived in {patience} s"
            return list(self._requests)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._speaking.set()
        self.stop()

    def start(self) -> None:
        """Listen on the port. The requests of earlier starts are kept."""
        assert self._thread is None, "the server is running"
        self._ended.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="http-target", daemon=True)
        self._thread.start()
        eventually(lambda: listening(self.port), "the HTTP target listens")

    def stop(self) -> None:
        """Close all connections and refuse new ones."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    kill = stop

    def restart(self) -> None:
        """Listen again on the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Take requests and answer none."""
        self._speaking.clear()

    def resume(self) -> None:
        """Answer the requests of the pause, and those after it."""
        self._speaking.set()

    async def _serve(self) -> None:
        server = web.Server(self._handle)
        runner = web.ServerRunner(server, shutdown_timeout=0.0)
        await runner.setup()
        context = None if self._tls is None else self._tls.server_context()
        listener = socket.create_server(("127.0.0.1", self.port))
        await web.SockSite(runner, listener, ssl_context=context).start()
        await asyncio.to_thread(self._ended.wait)
        # asyncio leaks a connection that it accepted just before its server was closed. So it accepts none first.
        asyncio.get_running_loop().remove_reader(listener)
        await _turns()
        await runner.cleanup()
        await _turns()  # closes the sockets

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        arrived = Request(request.method, request.path_qs, headers, body, time.monotonic())
        script = self._next(arrived)
        while not (self._speaking.is_set() or self._ended.is_set()):  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.01)
        answer = script(arrived) if callable(script) else script
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            answer = Answer(401)
        await asyncio.sleep(answer.delay)
        return await (self._drip(request) if answer.drips else self._send(request, answer))

    async def _drip(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while not self._ended.is_set():
            await response.write(b".")
            await asyncio.sleep(0.1)
        return response

    def _next(self, request: Request) -> Script:
        with self._arrived:
            self._requests.append(request)
            self._arrived.notify_all()
            return self._scripts.pop(0) if self._scripts else self.otherwise

    @staticmethod
    async def _send(request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
        if answer.cut is None:
            return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        if answer.cut == "middle":
            response.content_length = len(answer.body) + 1
            await response.prepare(request)
            await response.write(answer.body[: len(answer.body) // 2] or b"{")
        if request.transport is not None:
            request.transport.abort()
        return response


async def _turns() -> None:
    """Let asyncio finish what it does in its own tasks and callbacks, which nobody can await."""
    for _ in range(5):
        await asyncio.sleep(0)
