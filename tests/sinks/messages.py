"""Messages for the tests of adapters."""

from __future__ import annotations

from collections.abc import Iterable

from cdcbridge.sinks.target import Lane, Outgoing

SYSTEM = "7312345678901234567"


def lane(number: int = 0, of: int = 1, consumer: str = "events") -> Lane:
    return Lane(consumer, SYSTEM, number, of)


def message(
    seq: int, destination: str, *, key: str | None = "42", body: bytes = b'{"a": 1}', topic: str = "public.orders"
) -> Outgoing:
    identity = f"{SYSTEM}/1/0/{seq:X}/0"
    headers = {"cdcbridge-id": identity, "cdcbridge-topic": topic, "cdcbridge-op": "insert"}
    return Outgoing(seq, identity, key, 0, destination, body, headers)


def messages(seqs: Iterable[int], destination: str, *, key: str | None = "42") -> list[Outgoing]:
    return [message(seq, destination, key=key) for seq in seqs]
