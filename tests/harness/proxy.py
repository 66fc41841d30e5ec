"""A TCP relay in front of a server that makes everything late, silent or away, for the tests of bad networks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Self


class Proxy:
    """From entry to exit of its `with` block.

    `delay` is how many seconds each piece waits, in either direction. While it is `silent` it takes connections and bytes
    and passes nothing on; those connections end when it speaks again.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._socket = socket.create_server(("0.0.0.0", 0))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)
        self._ended = threading.Event()
        self.port = int(self._socket.getsockname()[1])
        self.delay = 0.0
        self.silent = False
        self._away = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def away(self) -> bool:
        """While it is, all connections are reset, and new ones as well."""
        return self._away

    @away.setter
    def away(self, value: bool) -> None:
        self._away = value
        if value and self._loop is not None:
            self._loop.call_soon_threadsafe(self._reset)

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._relay, sock=self._socket)
        await asyncio.to_thread(self._ended.wait)
        server.close()
        for _ in range(100):  # a relay that is cancelled before its end would complain
            if not self._writers:
                break
            self._reset()
            await asyncio.sleep(0.01)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError):
                if self._away:
                    return
                await self._until_it_speaks()
                server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
                writers.append(to_server)
                await self._both_ways((reader, to_server), (server, writer))
        finally:
            for one in writers:
                one.transport.abort()
            self._writers.discard(writer)

    async def _both_ways(self, *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        tasks = [asyncio.create_task(self._pass(*way)) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _until_it_speaks(self) -> bool:
        """Whether it was silent."""
        was = self.silent
        while self.silent and not self._ended.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.01)
        return was

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if await self._until_it_speaks():
                    return
                writer.write(data)
                await writer.drain()
