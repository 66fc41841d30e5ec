"""read_stream, commit_offset, seek: what each promises, and what each refuses."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.sql.queue import Queue, Row


@pytest.fixture(autouse=True)
def _stream(queue: Queue) -> None:
    queue.declare("s", mode="stream", topics=("news",), start="earliest")


def publish(queue: Queue, *keys: str | None, session: psycopg.Connection[Row] | None = None) -> list[int]:
    return [queue.value("select cdcbridge.publish('news', %s, '1')", key, session=session) for key in keys]


def read(queue: Queue, count: int = 100, lease: str | None = None, *, session: psycopg.Connection[Row] | None = None) -> list[Row]:
    return queue.all("select * from cdcbridge.read_stream('s', %s, %s::interval)", count, lease, session=session)


def commit(queue: Queue, partition: int, seq: int, receipt: str | None = None, *, session: psycopg.Connection[Row] | None = None) -> bool:
    query = "select cdcbridge.commit_offset('s', %s, %s, %s)"
    return bool(queue.value(query, partition, seq, receipt, session=session))


def finish(queue: Queue, rows: list[Row]) -> None:
    assert commit(queue, rows[-1]["partition"], rows[-1]["seq"], rows[-1]["receipt"])


def drain(queue: Queue, count: int = 100) -> list[int]:
    got = []
    while rows := read(queue, count, "1 min"):
        assert len({row["partition"] for row in rows}) == 1
        got += [row["seq"] for row in rows]
        finish(queue, rows)
    return got


def test_a_group_reads_everything_once_in_order_within_each_partition(queue: Queue) -> None:
    put = publish(queue, *[f"k{n}" for n in range(50)], None) + queue.append_keys(*"abcabc", consumers=())
    rows: list[Row] = []
    while batch := read(queue, 4, "1 min"):
        rows += batch
        finish(queue, batch)
    assert sorted(row["seq"] for row in rows) == put
    for partition in {row["partition"] for row in rows}:
        mine = [row["seq"] for row in rows if row["partition"] == partition]
        assert mine == sorted(mine)
    assert read(queue) == []
