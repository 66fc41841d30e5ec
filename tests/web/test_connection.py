"""Peers that keep a connection open without taking part are disconnected, and the others are not."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from cdcbridge.web import connection
from cdcbridge.web.connection import HttpConnection

LIMIT = 1.0  # seconds
CALM = 3.0  # seconds: a request or an answer that is slower than the limit


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer /slow after a while, and /much with 50 MB."""
    if scope["path"] == "/slow":
        await asyncio.sleep(CALM)
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(50 if scope["path"] == "/much" else 1):
        await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
    await send({"type": "http.response.body", "body": b"end"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connection, "_HEADERS", LIMIT)
    monkeypatch.setattr(connection, "_READING", LIMIT)
    server = uvicorn.Server(
        uvicorn.Config(app, http=HttpConnection, log_config=None, lifespan="off", timeout_graceful_shutdown=20)
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "a peer delays the end"


def opened(port: int) -> socket.socket:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(15)
    raw.connect(("127.0.0.1", port))
    return raw


def read_all(raw: socket.socket) -> bytes:
    """What the server sends until it closes or resets the connection."""
    found = bytearray()
    try:
        while piece := raw.recv(1 << 20):
            found += piece
    except ConnectionResetError:
        pass
    return bytes(found)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_peer_that_sends_no_whole_request(port: int, sent: bytes) -> None:
    with opened(port) as raw:
        raw.sendall(sent)
        assert read_all(raw) == b""


def test_a_peer_that_sends_a_header_now_and_then(port: int) -> None:
    with opened(port) as raw, pytest.raises(OSError):
        raw.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(100):
            time.sleep(0.2)
            raw.sendall(b"X-Slow: 1\r\n")


LONG = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(300))


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n" + LONG, b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000])
def test_incomplete_headers_are_bounded(port: int, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEADERS", 600.0)
    with opened(port) as raw:
        for place in range(0, len(sent), 10_000):
            try:
                raw.sendall(sent[place : place + 10_000])
            except OSError:
                break
            if select.select([raw], [], [], 0.01)[0]:
                break
        assert read_all(raw).startswith(b"HTTP/1.1 400 ")


def test_the_headers_of_a_next_request_are_bounded_too(port: int) -> None:
    with opened(port) as raw:
        raw.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n")
        with suppress(OSError):
            raw.sendall(LONG)
        assert read_all(raw) == b"", "the connection ends before the answer of the first"


def test_a_long_body_is_no_header(port: int) -> None:
    with opened(port) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000000\r\n\r\n")
        raw.sendall(b"x" * 1_000_000)
        assert read_all(raw).endswith(b"end\r\n0\r\n\r\n")


def test_the_second_request_of_a_connection_has_the_same_limit(port: int) -> None:
    with opened(port) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while b"end\r\n0\r\n\r\n" not in raw.recv(1 << 20):
            pass
        raw.sendall(b"GET / HT")
        assert read_all(raw) == b""


def test_a_peer_that_reads_nothing(port: int) -> None:
    with opened(port) as raw:
        raw.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(CALM)
        assert len(read_all(raw)) < 50_000_000


def test_an_answer_that_takes_its_time_is_not_cut(port: int) -> None:
    with opened(port) as raw:
        raw.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(raw).endswith(b"end\r\n0\r\n\r\n")


def test_a_slow_reader_that_reads_gets_all(port: int) -> None:
    with opened(port) as raw:
        raw.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        began, size = time.monotonic(), 0
        while piece := raw.recv(1 << 16):
            size += len(piece)
            if time.monotonic() - began < CALM:
                time.sleep(LIMIT / 20)
        assert size > 50_000_000


@pytest.fixture
def kept() -> Iterator[list[socket.socket]]:
    """Sockets that are closed after the server has ended."""
    made: list[socket.socket] = []
    yield made
    for raw in made:
        raw.close()


def test_a_peer_that_reads_nothing_does_not_delay_the_end(
    kept: list[socket.socket], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_READING", 600.0)
    kept.append(raw := opened(port))
    raw.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
    assert select.select([raw], [], [], 15)[0], "the answer has begun"
