"""Rows of megabytes in a snapshot: little memory, other consumers on time, and nothing loaded that nobody may have."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdcbridge.backfill.table_reader import MOST_BYTES, Wanted, read_chunk
from cdcbridge.database import connect_source
from cdcbridge.source import shapes
from tests.harness.world import World, eventually

MEMORY = 250  # MB that the bridge may have resident
ADDRESSES = 1536 << 20  # bytes of address space
ROWS, MEGABYTES = 12, 10


class Latency(threading.Thread):
    """Inserts into another table all the time; `worst`: the longest that one took into the log."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._dsn = world.dsn
        self._stopping = threading.Event()
        self.worst, self.count = 0.0, 0

    def run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as session:
            while not self._stopping.wait(0.05):
                self.count += 1
                began = time.monotonic()
                session.execute("insert into live values (%s)", (self.count,))
                while session.execute(_ARRIVED, (str(self.count),)).fetchone() is None:
                    time.sleep(0.005)
                self.worst = max(self.worst, time.monotonic() - began)

    def stop(self) -> float:
        self._stopping.set()
        self.join()
        return self.worst


_ARRIVED = "select from cdcbridge.messages where topic = 'public.live' and key = %s"


def most_memory(pid: int) -> int:
    """In MB, of the whole life of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) >> 10


def fill(
    world: World, kind: str = "text", value: str = f"repeat('x', {MEGABYTES << 20})", key: str = "primary key"
) -> None:
    world.execute(
        f"create table t (id int {key}, n int, big {kind})",
        "alter table t alter big set storage external",
        "create table live (id int primary key)",
        f"insert into t select i, i, {value} from generate_series(1, {ROWS}) i",
    )


@pytest.mark.parametrize("options", [(), ("--consistent",)], ids=["beside the stream", "consistent"])
@pytest.mark.parametrize("key", ["primary key", ""], ids=["key", "pages"])
def test_wide_rows_take_little_memory_and_delay_nobody(world15: World, options: tuple[str, ...], key: str) -> None:
    world = world15
    fill(world, key=key)
    world.consumer("wide", mode="stream", start="snapshot", operations=["insert"])
    world.consumer("live", ("public.live",))
    process = world.start_process(*options, prefix=["prlimit", f"--as={ADDRESSES}"])
    eventually(world.active, patience=60)
    latency = Latency(world)
    latency.start()
    eventually(lambda: world.value("select bool_and(state = 'done') from backfills"), patience=90)
    memory = most_memory(process.pid)
    worst = latency.stop()
    assert worst < 2 or options, "with --consistent the stream begins after the copy"
    assert memory < MEMORY
    sizes = world.rows("select octet_length(data::text) from messages where topic = 'public.t'")
    assert len(sizes) == ROWS and min(sizes)[0] > MEGABYTES << 20
    assert "bridge.retry" not in world.log() and "interrupted" not in world.log(), world.log()


@pytest.mark.parametrize("mode", ["queue", "fifo"])
@pytest.mark.parametrize("kind", ["text", "bytea", "json"])
def test_a_row_that_no_consumer_may_have_is_not_loaded(world15: World, mode: str, kind: str) -> None:
    world = world15
    values = {
        "text": "repeat('x', 3000000)",
        "bytea": "convert_to(repeat('x', 3000000), 'UTF8')",
        "json": "json_build_object('a', repeat('x', 3000000))",
    }
    fill(world, kind, f"case when i % 4 = 0 then {values[kind]} end")
    world.execute("alter table t add status text default 'paid'")
    world.consumer("plain", mode=mode, start="snapshot")
    world.consumer("keyed", mode=mode, start="snapshot", key=["n"])
    world.consumer("filtered", mode=mode, start="snapshot", filter="record.status == 'paid' && record.id != 8")
    world.consumer("needs", mode=mode, start="snapshot", filter="size(record) > 0")
    world.execute("alter table t replica identity full")
    with world.bridge():
        eventually(lambda: world.value("select count(*) = 4 and bool_and(state = 'done') from backfills"), patience=60)
    size = {"text": 3_000_000, "bytea": 6_000_000, "json": 3_000_000}[kind]
    stubs = {"plain": 3, "keyed": 3, "filtered": 2}
    for name, count in stubs.items():
        dead = world.rows(
            "select d.key, d.reason, d.data from dead_messages d join consumers c on c.id = d.consumer_id"
            " where c.name = %s order by (d.data #>> '{record,id}')::int", name
        )  # fmt: skip
        assert len(dead) == count
        for key, reason, data in dead:
            least = int(reason.split("at least ")[1].split()[0])
            assert size <= least < size + 100 and reason.startswith("oversized: data has at least "), reason
            assert "max_message_bytes is 1048576" in reason and "not loaded" in reason
            assert data["op"] == "read" and data["record"]["id"] in (4, 8, 12)
            assert set(data["record"]) | set(data["unchanged"]) == {"id", "n", "big", "status"}
            assert "big" in data["unchanged"]
            assert key == str(data["record"]["n" if name == "keyed" else "id"])
        assert world.value("select pending from consumer_lag() where name = %s", name) == ROWS - 3
    assert world.value("select count(*) from dead_messages where reason not like '%%at least%%'") == 3, (
        "those it needs are loaded"
    )


@pytest.mark.parametrize("kind", ["json", "jsonb", "text[]", "text"])
@pytest.mark.parametrize("key", ["primary key", ""], ids=["key", "pages"])
def test_chunks_are_bounded_although_values_are_compressed(world18: World, kind: str, key: str) -> None:
    """Of compressed values nothing tells how long they are, until they arrive."""
    value = {"json": "json_build_array(repeat('x', 2000000))", "jsonb": "jsonb_build_array(repeat('x', 2000000))",
             "text[]": "array[repeat('x', 2000000)]", "text": "repeat('x', 2000000)"}[kind]  # fmt: skip
    world18.execute(
        f"create table t (id int {key}, big {kind})",
        f"insert into t select i, case when i % 3 > 0 then {value} end from generate_series(1, 60) i",
    )
    with connect_source(world18.dsn) as session:
        shape = shapes.describe(session, "public", "t")
        place: list[Any] = []
        last, rows = False, 0
        while not last:
            with session.transaction():
                session.execute("set transaction isolation level repeatable read, read only")
                part = read_chunk(session, shape, Wanted(condition="id <> 5"), place, 10_000)
                assert session.execute("select count(*) from t").fetchone() == (60,), "the snapshot goes on"
            place, last = part.end, part.last
            rows += len(part.rows)
            assert sum(map(len, part.rows)) <= MOST_BYTES
    assert rows == 59


def test_a_row_that_is_larger_than_any_chunk_is_read_alone(world18: World) -> None:
    world18.execute(
        "create table t (id int primary key, big text)",
        f"insert into t select i, case i when 3 then repeat('x', {MOST_BYTES + 1000}) else 'x' end from generate_series(1, 5) i",
    )
    with connect_source(world18.dsn) as session:
        shape = shapes.describe(session, "public", "t")
        place: list[Any] = []
        counts = []
        last = False
        while not last:
            with session.transaction():
                part = read_chunk(session, shape, Wanted(), place, 100)
            place, last = part.end, part.last
            counts.append(len(part.rows))
    assert counts == [2, 1, 2]
