"""Measure each decoder alone: without a server, on the message of one row that is repeated in memory."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.common import median
from cdcbridge.changes.events import Begin, Event, Relation
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.wal2json import TableShape, Wal2jsonDecoder
from cdcbridge.demo.embedded import EmbeddedServer

COLUMNS = (("id", 20), ("customer", 23), ("status", 25), ("amount", 1700), ("note", 25), ("at", 1184))
VALUES = (b"123456", b"42", b"paid", b"52.50", b"x" * 150, b"2024-02-29 12:34:56.789+00")


class _Catalog:
    relation = Relation("public", "t", "public.t", ("id",), frozenset({"id"}))

    def captures(self, schema: str, table: str) -> bool:  # noqa: ARG002 - one table
        return True

    def advance(self, begin: Begin) -> bool:  # noqa: ARG002 - no DDL
        return False

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:  # noqa: ARG002 - one table
        return TableShape(self.relation, captured=True)


def measure(server: EmbeddedServer, *, quick: bool) -> list[dict[str, Any]]:  # noqa: ARG001 - as the others
    """Print and return a row per decoder."""
    count = 20_000 if quick else 300_000
    results = []
    print("| decoder | bytes/event | events/s | MB/s |\n|---|---|---|---|")
    for name, (events, message) in {"wal2json": _wal2json(), "pgoutput": _pgoutput()}.items():
        rates = []
        for _ in range(3):
            started = time.perf_counter()
            for _ in events(itertools.repeat(message, count)):
                pass
            rates.append(count / (time.perf_counter() - started))
        rate = median(rates)
        results.append({"decoder": name, "bytes": len(message), "events_per_s": rate})
        print(f"| {name} | {len(message)} | {rate:,.0f} | {rate * len(message) / 1e6:,.0f} |", flush=True)
    return results


def _wal2json() -> tuple[Callable[[Iterable[bytes]], Iterator[Event]], bytes]:
    quoted = {25, 1184}
    columns = ",".join(
        f'{{"name":"{name}","typeoid":{oid},"value":{f"{chr(34)}{v.decode()}{chr(34)}" if oid in quoted else v.decode()}}}'
        for (name, oid), v in zip(COLUMNS, VALUES, strict=True)
    )
    head = '"xid":1234,"timestamp":"2024-02-29 12:34:56.789012+00","lsn":"0/12345678","schema":"public","table":"t"'
    return Wal2jsonDecoder(Types(), _Catalog()).events, f'{{"action":"I",{head},"columns":[{columns}]}}'.encode()


def _pgoutput() -> tuple[Callable[[Iterable[bytes]], Iterator[Event]], bytes]:
    decoder = PgoutputDecoder(Types(), _Catalog())
    relation = b"R" + struct.pack("!I", 5) + b"public\0t\0d" + struct.pack("!H", len(COLUMNS))
    for name, oid in COLUMNS:
        relation += bytes([name == "id"]) + name.encode() + b"\0" + struct.pack("!Ii", oid, -1)
    list(decoder.events([relation]))
    fields = b"".join(b"t" + struct.pack("!I", len(value)) + value for value in VALUES)
    return decoder.events, b"I" + struct.pack("!I", 5) + b"N" + struct.pack("!H", len(VALUES)) + fields
