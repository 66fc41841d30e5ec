"""A connection of the HTTP server that ends if its peer keeps it open without taking part.

A peer that sends its request byte by byte, or reads no answer, would hold a connection and its memory for ever. Never
limits the time that a request takes.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios
from contextlib import suppress
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_HEADERS: Final = 15.0  # seconds for the line and the headers of a request
_MOST_HEADERS: Final = 65_536  # bytes of them that are kept while they are incomplete
_READING: Final = 60.0  # seconds in which the peer reads nothing, while more than 64 kB wait
_AT_THE_END: Final = 2.0  # the same, when the process is asked to end


class HttpConnection(HttpToolsProtocol):
    """A connection with limits for the times in which the peer sends and reads nothing, and for its headers."""

    _head = 0  # bytes since the last headers that were complete, or the last part of a body
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        cycle: RequestResponseCycle | None = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if self._head > _MOST_HEADERS:
            self._refuse_headers(answering)
        if answering:
            self._expect_nothing()
        elif self._late is None:
            self._expect_request()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head = 0

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head = 0

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.resume_writing()
        self._expect_nothing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading(self._unread())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def shutdown(self) -> None:
        super().shutdown()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = self.loop.call_later(_AT_THE_END, self.transport.abort)

    def _refuse_headers(self, answering: bool) -> None:
        if answering:  # the headers of a next request must not end up in the middle of this answer
            self.transport.abort()
        elif not self.transport.is_closing():
            self.send_400_response("The headers of the request are too large.")

    def _expect_request(self) -> None:
        self._late = self.loop.call_later(_HEADERS, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _expect_reading(self, unread: int) -> None:
        self._stalled = self.loop.call_later(_READING, self._look_at_reader, unread)

    def _look_at_reader(self, before: int) -> None:
        """End the connection if the peer has read nothing since the last look."""
        unread = self._unread()
        if unread < before:
            self._expect_reading(unread)
        else:
            self.transport.abort()

    def _unread(self) -> int:
        """Return the number of bytes that the peer has not received, in this process and in the kernel."""
        queued = array.array("i", [0])
        with suppress(OSError):  # not Linux. Then the peer has to read what is in the kernel within the time
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self.transport.get_write_buffer_size() + queued[0]
