"""A channel of AMQP 0.9.1 for what a test does itself. No socket and no task is left when it ends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiormq import Connection
from aiormq.abc import AbstractChannel
from aiormq.connection import TransportFactory
from yarl import URL

_GOODBYE = 1.0  # seconds


class _Transport(TransportFactory):
    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        self._opened: asyncio.WriteTransport | None = None

    async def create(self, url: URL, **_: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(url.host, url.port, ssl=self._context)
        self._opened = writer.transport
        return reader, writer

    def abort(self) -> None:
        if self._opened is not None:
            self._opened.abort()


@asynccontextmanager
async def channel(url: str, context: ssl.SSLContext | None = None) -> AsyncIterator[AbstractChannel]:
    """Open a channel whose publications are confirmed.

    The close() of aiormq waits for an answer for two seconds, which a server with a full disk does not give, and tasks
    of it end later. A loop that closes before them leaves a socket open. Therefore the socket is aborted, and the
    tasks are awaited.

    Args:
        url: The server, with user and password.
        context: TLS, if the server wants it.
    """
    transport = _Transport(context)
    before = asyncio.all_tasks()
    connection = Connection(url, transport_factory=transport)
    try:
        await connection.connect()
        yield await connection.channel()
    finally:
        asyncio.get_running_loop().call_later(_GOODBYE, transport.abort)
        await connection.close()
        transport.abort()
        if rest := asyncio.all_tasks() - before:
            await asyncio.wait(rest, timeout=_GOODBYE)
        await asyncio.sleep(0)  # closes the socket
