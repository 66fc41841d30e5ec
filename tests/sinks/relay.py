"""A TCP relay that cuts a connection at a byte, or withholds the answers of the server. It runs in the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self


class Relay:
    """From entry to exit of its `async with` block.

    Attributes:
        port: The port that clients connect to.
        deaf: While it is true, bytes from the server are dropped.
        limit: All connections are cut when so many more bytes have been sent to the server. None: never.
        sent: How many bytes were sent to the server.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.deaf = False
        self.limit: int | None = None
        self.sent = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        self.cut()
        await asyncio.sleep(0)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError):
                server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
                self._writers.add(to_server)
                answers = asyncio.create_task(self._answers(server, writer))
                try:
                    await self._requests(reader, to_server)
                finally:
                    answers.cancel()
                    to_server.transport.abort()
                    self._writers.discard(to_server)
        finally:
            writer.transport.abort()
            self._writers.discard(writer)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 12):
            if self.limit is not None:
                data, rest = data[: self.limit], data[self.limit :]
                self.limit -= len(data)
                if rest or not self.limit:
                    writer.write(data)
                    self.sent += len(data)
                    await writer.drain()
                    self.limit = None
                    await asyncio.sleep(0.05)  # the server reads the part that it gets
                    self.cut()
                    return
            writer.write(data)
            self.sent += len(data)
            await writer.drain()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if not self.deaf:
                    writer.write(data)
                    await writer.drain()
            writer.transport.abort()
