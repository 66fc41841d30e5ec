"""The transport of nats-py, which here can end at once and demand TLS.

The library sends the bytes that wait before it closes a connection. A sink that has ended must not deliver any more.
It also sends the password in clear text to a server that does not require TLS, even if TLS was configured.

Never lets the library log in before the demanded encryption, and never sends anything after end().
"""

from __future__ import annotations

import contextlib
import ssl

import nats.errors
import orjson
from nats.aio.transport import TcpTransport


class NatsWire(TcpTransport):
    """The transport of one connection.

    Args:
        host: The name of the server, which its certificate must have.
        context: How the connection must be encrypted. None: only if the server wants it.
    """

    def __init__(self, host: str, context: ssl.SSLContext | None) -> None:
        super().__init__()
        self._host, self._demanded = host, context

    def __bool__(self) -> bool:
        return True  # else the library would make a transport of its own

    def end(self) -> None:
        """Disconnect at once. Bytes that were not sent yet are dropped, and so is everything that is written later."""
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    async def readline(self) -> bytes:
        """Read a line. After the first one, which tells what the server can do, encrypt if that is demanded."""
        line: bytes = await super().readline()
        if self._demanded is not None and line:
            context, self._demanded = self._demanded, None
            server = orjson.loads(line.removeprefix(b"INFO "))
            if not server.get("tls_required"):  # else the library encrypts
                if not server.get("tls_available"):
                    raise nats.errors.SecureConnWantedError
                await self.connect_tls(self._host, context, 0, None)  # type: ignore[arg-type]
        return line

    async def drain(self) -> None:
        with contextlib.suppress(OSError):  # the library's reader sees it, too, and ends everything in order
            await super().drain()
