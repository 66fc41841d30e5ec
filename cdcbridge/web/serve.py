"""Run the API until SIGTERM or SIGINT: a socket, a server, and a graceful end.

A long poll answers at once when the process is asked to end. Never touches the store itself.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import structlog
import uvicorn

from cdcbridge.config import Config
from cdcbridge.errors import UsageError
from cdcbridge.web.app import Application
from cdcbridge.web.connection import HttpConnection

_GRACE: Final = 20  # seconds for requests in progress at the end
_LAST: Final = 2.0  # seconds for threads after that
_BACKLOG: Final = 2048
log = structlog.get_logger()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, api: Application, *, until_stdin_ends: bool) -> None:
        super().__init__(config)
        self._api = api
        self._until_stdin_ends = until_stdin_ends

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._until_stdin_ends:  # nobody writes: it is readable at its end
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._stdin_ended)

    def _stdin_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())  # else the loop is woken all the time
        self.handle_exit(signal.SIGTERM, None)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End well after a signal. The method of uvicorn sends itself the signal again at the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._api.services.arrivals.stop()


def serve(config: Config, *, until_stdin_ends: bool = False) -> None:
    """Answer requests until SIGTERM or SIGINT.

    Args:
        config: The configuration.
        until_stdin_ends: Also end when stdin ends, which is a pipe from the bridge. So the process ends with the
            bridge, however that ends.

    Raises:
        UsageError: The process cannot listen on the address, or cannot read the certificate.
    """
    host, port = config.api.address
    api = Application(config)
    tls = config.api.tls
    try:
        server = _Server(
            uvicorn.Config(
                api.app,
                http=HttpConnection,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE,
                ssl_certfile=None if tls is None else tls.cert,
                ssl_keyfile=None if tls is None else tls.key,
            ),
            api,
            until_stdin_ends=until_stdin_ends,
        )
        server.config.load()
    except OSError as error:
        raise UsageError(f"api.tls: the certificate cannot be read: {error}") from None
    try:
        listening = socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"api.listen: cannot listen on {host}:{port}: {error}",
            hint="Another program, perhaps a second `serve`, may use it. Give another port.",
        ) from None
    # uvicorn writes the head and the body of an answer one after the other. Without this option, the system holds the
    # body back until the caller has confirmed the head, which takes 40 ms. Each connection inherits the option.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _allow_many_files()
    with listening:
        number = listening.getsockname()[1]
        log.info("api.listening", url=f"{'https' if tls else 'http'}://{_shown(host)}:{number}")
        server.run(sockets=[listening])
    log.info("api.stopped")
    _end_at_the_latest()


def _end_at_the_latest() -> None:
    """End this process even if a thread does not end, for example one that measures the lag of a server that hangs.

    Python waits for the threads of an executor. Their results are for callers that have got their answers.
    """
    timer = threading.Timer(_LAST, os._exit, [0])
    timer.daemon = True
    timer.start()


def _allow_many_files() -> None:
    """Raise the limit of open files to the hard one: each waiting call needs a socket, and the default is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
