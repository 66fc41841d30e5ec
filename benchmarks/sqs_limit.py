"""A server that answers clients of SQS with prepared bytes and does nothing else: the fastest that these clients can be.

It reads no parameter, checks no signature and keeps no message. Each receive gets the same ten messages.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.harness.brokers.server import free_port
from tests.harness.brokers.sqs import REGION

BATCH = 10


@contextmanager
def limit_server(body: str) -> Iterator[dict[str, Any]]:
    """Run the server in a process of its own, and return the parameters of a client.

    Args:
        body: The body of each message.
    """
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as listening:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listening, port, body), daemon=True)
        process.start()
        try:
            yield {
                "endpoint_url": f"http://127.0.0.1:{port}",
                "region_name": REGION,
                "aws_access_key_id": "testing",
                "aws_secret_access_key": "testing",
            }
        finally:
            process.kill()
            process.join()


def _serve(listening: socket.socket, port: int, body: str) -> None:
    answers = _answers(port, body)
    while True:
        client, _ = listening.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_talk, args=(client, answers), daemon=True).start()


def _talk(client: socket.socket, answers: dict[bytes, bytes]) -> None:
    data = b""
    while piece := client.recv(1 << 16):
        data += piece
        head, end, rest = data.partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0)
        if end and len(rest) >= length:
            action = head.partition(b"X-Amz-Target: AmazonSQS.")[2].partition(b"\r\n")[0]
            client.sendall(answers[action])
            data = rest[length:]


def _answers(port: int, body: str) -> dict[bytes, bytes]:
    md5 = hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()
    ids = [str(n) for n in range(BATCH)]
    messages = [{"MessageId": f"m{n}", "ReceiptHandle": "x" * 24, "MD5OfBody": md5, "Body": body} for n in ids]
    sent = [{"Id": n, "MessageId": f"m{n}", "MD5OfMessageBody": md5} for n in ids]
    return {
        action.encode(): _answer(json.dumps(answer).encode())
        for action, answer in {
            "GetQueueUrl": {"QueueUrl": f"http://127.0.0.1:{port}/000000000000/billing"},
            "ListQueues": {},
            "SendMessageBatch": {"Successful": sent, "Failed": []},
            "ReceiveMessage": {"Messages": messages},
            "DeleteMessageBatch": {"Successful": [{"Id": n} for n in ids], "Failed": []},
        }.items()
    }


def _answer(content: bytes) -> bytes:
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nx-amzn-RequestId: 1\r\nContent-Length: "
    return f"{head}{len(content)}\r\n\r\n".encode() + content
