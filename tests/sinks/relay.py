"""A relay in the loop of a test that cuts a connection at a byte that the test chose."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self


class Relay:
    """Passes bytes to a port of this machine and back, in an `async with` block.

    Args:
        target: The port of the server.

    Attributes:
        port: The port that clients connect to.
        up: How many more bytes reach the server. With the byte after them, all connections are cut. None: all.
        mute: While true, no answer reaches the client.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.up: int | None = None
        self.mute = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        with suppress(OSError):
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers |= {writer, to_server}
            await asyncio.gather(self._upwards(reader, to_server), self._downwards(from_server, writer))

    async def _upwards(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self.up is not None:
                data, self.up = data[: self.up], self.up - len(data)
            writer.write(data)
            await writer.drain()
            if self.up is not None and self.up < 0:
                self.up = None
                writer.close()  # the server gets what was written, and then the end
                self._writers.discard(writer)
                self.cut()
                return
        writer.transport.abort()

    async def _downwards(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if not self.mute:
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
