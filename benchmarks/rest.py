"""Measure the HTTP API: messages/s that clients receive and ack in batches of 100, and the same for clients of SQL.

Both take messages of the same kind from the same store, in turn. The clients of SQL are those of benchmarks/claims.py. The
clients of the API have a connection that stays open, read all messages as JSON, and ack by their receipts.
"""

from __future__ import annotations

import http.client
import multiprocessing
import time
from multiprocessing.synchronize import Barrier
from typing import Any, Final

import orjson

from benchmarks.claims import Case, drain, fill
from benchmarks.common import database, median
from benchmarks.serving import serving
from cdcbridge.demo.embedded import EmbeddedServer

AIM: Final = 0.4
BATCH: Final = 100
CLIENTS: Final = 2
MESSAGES: Final = 100_000
RUNS: Final = 5
PATIENCE: Final = 60.0  # seconds


def measure(server: EmbeddedServer, *, quick: bool) -> dict[str, Any]:
    """Print and return the rates of both."""
    runs, messages = (1, MESSAGES // 10) if quick else (RUNS, MESSAGES)
    case = Case("cdcbridge", "queue", 100_000, BATCH, CLIENTS)
    rates: dict[str, list[float]] = {"sql": [], "rest": []}
    for _ in range(runs):
        with database(server, "bench_rest") as session:
            fill(session, server.dsn("bench_rest"), case, messages)
            rates["sql"].append(drain(session, server.dsn("bench_rest"), case.loop(), CLIENTS)["rate"])
        with database(server, "bench_rest") as session:
            fill(session, server.dsn("bench_rest"), case, messages)
            with serving(server, "bench_rest", [{"name": "c", "tables": ["public.t"]}]) as port:
                rates["rest"].append(_rate(port, messages))
    sql, rest = median(rates["sql"]), median(rates["rest"])
    ratio = median([rest / sql for rest, sql in zip(rates["rest"], rates["sql"], strict=True)])
    print(f"messages/s received and acked, batches of {BATCH}, {CLIENTS} clients, medians of {runs} runs\n")
    print("| SQL | HTTP API | ratio | aim |\n|---|---|---|---|")
    print(f"| {sql:,.0f} | {rest:,.0f} | {ratio:.2f} | {AIM} |", flush=True)
    return {"runs": rates, "ratio": ratio, "aim": AIM}


def _rate(port: int, messages: int) -> float:
    """Return messages/s of the clients that together receive and ack all messages of the queue."""
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(CLIENTS + 1), context.Queue()
    workers = [context.Process(target=_drain, args=(port, barrier, done)) for _ in range(CLIENTS)]
    for worker in workers:
        worker.start()
    barrier.wait(PATIENCE)
    began = time.monotonic()
    acked = sum(done.get() for _ in workers)
    seconds = time.monotonic() - began
    for worker in workers:
        worker.join()
    if acked != messages:
        raise RuntimeError(f"{acked} of {messages} messages were acked")
    return messages / seconds


def _drain(port: int, barrier: Barrier, done: Any) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    _call(client, "ack", {"receipts": []}, port)
    barrier.wait(PATIENCE)
    acked = 0
    while found := _call(client, "receive", {"max_messages": BATCH}, port)["messages"]:
        acked += _call(client, "ack", {"receipts": [one["receipt"] for one in found]}, port)["acked"]
    done.put(acked)


def _call(client: http.client.HTTPConnection, action: str, body: dict[str, Any], port: int) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer t"}
    client.request("POST", f"/api/consumers/c/{action}", orjson.dumps(body), headers)
    answer = client.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{action} on port {port}: {answer.status} {content.decode()}")
    return orjson.loads(content)
