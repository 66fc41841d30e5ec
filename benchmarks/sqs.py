"""Measure the SQS endpoint: messages/s of a client that receives and deletes batches of 10, and the same for two other servers.

All servers answer the same clients of boto3 in the same run. ministack and moto keep their queues in memory. The limit is
a server that answers with prepared bytes, so no server can be faster with these clients.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from typing import Any, Final

import boto3
from botocore.config import Config as ClientConfig

from benchmarks.common import database, median
from benchmarks.serving import serving
from benchmarks.sqs_limit import limit_server
from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.brokers.sqs import REGION, Ministack, Moto

BODY: Final = '{"id": 17, "note": "' + "x" * 200 + '"}'
AIMS: Final = {"ministack": 3.0, "moto": 20.0}
MESSAGES: Final = {"cdcbridge": 10_000, "ministack": 10_000, "moto": 600, "limit": 10_000}
CLIENTS: Final = (1, 2)
RUNS: Final = 3
PATIENCE: Final = 60.0  # seconds


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:
    """Print and return a row for each number of clients."""
    runs = 1 if quick else RUNS
    print(f"messages/s received and deleted in batches of 10 with boto3, medians of {runs} runs\n")
    print("| clients | cdcbridge | ministack | ratio | moto | ratio | limit | share of the limit |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    kinds: dict[str, Callable[[], Any]] = {
        "cdcbridge": lambda: _bridge(server),
        "ministack": lambda: _other(Ministack()),
        "moto": lambda: _other(Moto()),
        "limit": lambda: limit_server(BODY),
    }
    results = []
    for clients in CLIENTS:
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(runs):
            for name, start in kinds.items():
                with start() as connection:
                    rates[name].append(_rate(connection, MESSAGES[name] // (10 if quick else 1), clients))
        row: dict[str, Any] = {
            "clients": clients,
            "aims": AIMS,
            **{name: median(found) for name, found in rates.items()},
        }
        row["ratios"] = {name: row["cdcbridge"] / row[name] for name in AIMS}
        results.append(row)
        print(
            f"| {clients} | {row['cdcbridge']:,.0f} | {row['ministack']:,.0f} | {row['ratios']['ministack']:.1f}"
            f" | {row['moto']:,.0f} | {row['ratios']['moto']:.0f}"
            f" | {row['limit']:,.0f} | {row['cdcbridge'] / row['limit']:.0%} |",
            flush=True,
        )
    return results


@contextmanager
def _other(made: Ministack | Moto) -> Iterator[dict[str, Any]]:
    with made:
        made.create_queue("billing")
        yield made.connection


@contextmanager
def _bridge(server: EmbeddedServer) -> Iterator[dict[str, Any]]:
    """Run `serve` on a store with one queue."""
    with (
        database(server, "bench_sqs"),
        serving(server, "bench_sqs", [{"name": "billing", "topics": ["t"]}]) as port,
    ):
        yield {
            "endpoint_url": f"http://127.0.0.1:{port}",
            "region_name": REGION,
            "aws_access_key_id": "testing",
            "aws_secret_access_key": "testing",
        }


def _rate(connection: dict[str, Any], messages: int, clients: int) -> float:
    """Return messages/s of so many clients that together receive and delete the messages of a full queue."""
    client = _client(connection)
    url = client.get_queue_url(QueueName="billing")["QueueUrl"]
    entries = [{"Id": str(n), "MessageBody": BODY} for n in range(10)]
    for _ in range(messages // 10):
        client.send_message_batch(QueueUrl=url, Entries=entries)
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(clients + 1), context.Queue()
    workers = [
        context.Process(target=_drain, args=(connection, url, messages // clients, barrier, done))
        for _ in range(clients)
    ]
    for worker in workers:
        worker.start()
    barrier.wait(PATIENCE)
    began = time.monotonic()
    for _ in workers:
        done.get()
    seconds = time.monotonic() - began
    for worker in workers:
        worker.join()
    client.close()
    return messages // clients * clients / seconds


def _drain(connection: dict[str, Any], url: str, messages: int, barrier: Barrier, done: Any) -> None:
    client = _client(connection)
    client.list_queues()
    barrier.wait(PATIENCE)
    while messages > 0:
        found = client.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1).get("Messages", [])
        if found:
            entries = [{"Id": str(n), "ReceiptHandle": one["ReceiptHandle"]} for n, one in enumerate(found)]
            client.delete_message_batch(QueueUrl=url, Entries=entries)
        messages -= len(found)
    done.put(True)


def _client(connection: dict[str, Any]) -> Any:
    return boto3.client("sqs", **connection, config=ClientConfig(retries={"total_max_attempts": 1}))
