"""A TCP relay in front of a server that makes everything late, for the tests of slow networks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Self


class Proxy:
    """From entry to exit of its `with` block. `delay`: seconds that each piece waits, in either direction."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._socket = socket.create_server(("0.0.0.0", 0))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)
        self._ended = threading.Event()
        self.port = int(self._socket.getsockname()[1])
        self.delay = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._relay, sock=self._socket)
        await asyncio.to_thread(self._ended.wait)
        server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        with contextlib.suppress(OSError):
            server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(to_server)
            ways = [asyncio.create_task(self._pass(reader, to_server)), asyncio.create_task(self._pass(server, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
        for one in writers:
            one.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
