"""Shared handling of a request by the API and the pages: its address, its body with limits, its line in the log.

Never logs a token, a body or a query.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

import structlog
from starlette.requests import ClientDisconnect, Request

from cdcbridge.web.access import Caller
from cdcbridge.web.problems import RequestRefused

_UPLOAD: Final = 30.0  # seconds for the body of a request
log = structlog.get_logger()


def address_of(request: Request) -> str:
    """Return the IP address of the caller."""
    return "" if request.client is None else request.client.host


async def body_of(request: Request, most: int) -> bytes:
    """Return the body of a request.

    Args:
        request: The request.
        most: The largest body in bytes.

    Raises:
        RequestRefused: 413 or 408. The body is too large, or was not complete within 30 seconds.
    """
    if int(request.headers.get("content-length") or 0) > most:
        raise _too_large(most)
    found = bytearray()
    try:
        async with asyncio.timeout(_UPLOAD):
            while (message := await request.receive())["type"] == "http.request":
                found += message.get("body", b"")
                if len(found) > most:
                    raise _too_large(most)
                if not message.get("more_body", False):
                    return bytes(found)
    except TimeoutError:
        raise RequestRefused(408, f"the request was not complete within {_UPLOAD:g} s") from None
    raise ClientDisconnect


def _too_large(most: int) -> RequestRefused:
    return RequestRefused(413, f"the request is larger than {most} bytes", hint="`api.max_body` is the limit.")


async def has_gone(request: Request) -> bool:
    """Return whether the caller has disconnected. The body must have been read.

    The server's function for the next message waits until the caller disconnects. Therefore it runs up to the point
    where it would wait, and no further. The same function of starlette makes and cancels a scope of anyio each time.
    """
    step = request.receive().__await__()
    try:
        next(step)
    except StopIteration as end:
        return bool(end.value["type"] == "http.disconnect")
    step.close()
    return False


def log_request(request: Request, status: int, began: float, caller: Caller | None, **more: str) -> float:
    """Log a request that was answered.

    Args:
        request: The request.
        status: The status of the answer.
        began: When the request arrived, of the monotonic clock.
        caller: Who called, or None if that is unknown.
        more: Further fields of the line.

    Returns:
        The seconds that the answer took.
    """
    seconds = monotonic() - began
    log.info(
        "api.request",
        method=request.method,
        path=request.scope["path"],  # request.url also reads the header Host, which may be no address
        **more,
        status=status,
        seconds=round(seconds, 4),
        caller=None if caller is None else caller.name,
        address=address_of(request),
    )
    return seconds
