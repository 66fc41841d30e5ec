"""Requests of an attacker: injection, traversal, oversized headers, and many connections that do nothing."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from urllib.parse import quote, urlsplit

import httpx
import pytest

from tests.harness.world import World
from tests.web.conftest import client, problem
from tests.web.test_rest import C, publish, receive

HOSTILE = (
    "billing'; drop table cdcbridge.consumers; --",
    'billing"',
    "billing\\",
    "$$; select pg_sleep(100); $$",
    "%s%s%s%(name)s",
    "{0.__class__}",
    "../../../../etc/passwd",
    "\u202e\u0000",
    "x" * 5000,
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_never_code(world18: World, http: httpx.Client, text: str) -> None:
    publish(http, {"data": 1})
    path = quote(text, safe="")
    for answer in (
        http.post(f"/api/consumers/{path}/receive", json={}),
        http.get(f"/api/consumers/{path}"),
        http.post(f"/api/streams/{path}/read", json={}),
        http.get("/api/log", params={"from": text}),
        http.post("/api/streams/audit/seek", json={"target": text}),
        http.post(f"{C}/ack", json={"receipts": [text]}),
    ):
        assert answer.status_code in (404, 422), answer.text
        problem(answer, answer.status_code)
    assert http.get("/api/log", params={"topic": text, "key": text}).status_code in (200, 422)
    assert http.get(f"{C}/dead", params={"reason": text}).status_code in (200, 422)
    nack = http.post(f"{C}/nack", json={"receipts": [], "reason": text})
    assert nack.status_code in (200, 422)
    assert [one["data"]["record"] for one in receive(http)] == [1]
    assert world18.value("select count(*) from cdcbridge.consumers") == 3


@pytest.mark.parametrize(
    "target", ["/api/../../etc/passwd", "/../cdcbridge.yaml", "/api/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/.env"]
)
def test_no_path_leads_to_a_file(url: str, target: str) -> None:
    answer = exchange(url, f"GET {target} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ") and b"root:" not in answer and b"dsn" not in answer


@pytest.mark.parametrize(
    "request_text",
    [
        "GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + "x" * 1_000_000 + "\r\n\r\n",
        "GET /" + "x" * 1_000_000 + " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        "GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "nonsense\r\n\r\n",
        "POST /api/consumers/billing/receive HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_a_request_that_is_no_http(url: str, request_text: str) -> None:
    assert exchange(url, request_text).startswith(b"HTTP/1.1 400 ")


def test_many_connections_that_do_nothing(url: str) -> None:
    host, port = urlsplit(url).netloc.split(":")
    with ExitStack() as opened:
        for _ in range(500):
            opened.enter_context(socket.create_connection((host, int(port))))
        with client(url) as http:
            publish(http, {"data": 1})
            assert len(receive(http)) == 1


def exchange(url: str, text: str) -> bytes:
    """The answer to these bytes, until the server closes the connection."""
    host, port = urlsplit(url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        found = bytearray()
        try:
            raw.sendall(text.encode())
            while piece := raw.recv(65536):
                found += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
        return bytes(found)
