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

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_HEADERS: Final = 15.0  # seconds for the line and the headers of a request
_READING: Final = 60.0  # seconds in which the peer reads nothing, while more than 64 kB wait
_AT_THE_END: Final = 2.0  # the same, when the process is asked to end


class HttpConnection(H11Protocol):
    """A connection with limits for the times in which the peer sends and reads nothing."""

    transport: asyncio.Transport
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._expect_nothing()
        elif self._late is None:
            self._expect_request()

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
