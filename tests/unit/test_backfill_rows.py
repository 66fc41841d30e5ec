"""Rows that a backfill read, on their way into a batch."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from cdcbridge.changes.keys import partition_of
from cdcbridge.changes.position import Position
from cdcbridge.routing.backfill_rows import inject
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.filters import Filter
from cdcbridge.routing.overtaken import Chunk, Snapshot, Watch
from cdcbridge.routing.router import OPERATIONS
from cdcbridge.routing.subscription import Subscription

BEHIND = Position(500, 7)


def field(value: bytes | None) -> bytes:
    return b"\xff\xff\xff\xff" if value is None else struct.pack("!I", len(value)) + value


def data(number: int, size: int = 1) -> bytes:
    message: dict[str, Any] = {"op": "read", "record": {"id": number, "v": "x" * size}, "old": None, "unchanged": []}
    return json.dumps(message).encode()


def chunk(*rows: bytes, sized: bool = False, **wanted: Any) -> Chunk:
    given = {"tables": ("public.t",), "operations": frozenset(OPERATIONS), **wanted}
    watch = Watch(Subscription(1, "c", **given), "public.t")
    return Chunk(watch, 3, Snapshot.parse("100:100:"), list(rows), [], len(rows), True, lambda: None, sized)


def row(number: int, size: int = 1, *more: bytes | None) -> bytes:
    return field(b"%d" % number) + field(data(number, size)) + b"".join(map(field, more))


def put(one: Chunk, batch: AppendBatch | None = None) -> AppendBatch:
    batch = batch or AppendBatch()
    before = len(batch.rows)
    end = inject(batch, one, BEHIND, None, 16)
    assert end == (500, 7 + len(batch.rows) - before) and batch.chunks[-1] == (one, len(batch.rows) - before)
    assert one.rows == [], "memory has no place for two copies"
    return batch


def ordinals(batch: AppendBatch) -> list[int]:
    return [int.from_bytes(row[4:8]) for row in batch.rows]


WAYS: list[dict[str, Any]] = [{}, {"filter": Filter("true")}]  # as it is, and looked at closer
both_ways = pytest.mark.parametrize("way", WAYS, ids=["plain", "looked at"])


@both_ways
def test_rows_stand_behind_the_position(way: dict[str, Any]) -> None:
    batch = put(chunk(row(1), row(2), **way))
    assert ordinals(batch) == [8, 9] and batch.keys == ["1", "2"] and batch.groups == {(1,): [0, 1]}
    assert batch.partitions == [partition_of(b"1", 16), partition_of(b"2", 16)]
    again = put(chunk(row(3), **way), batch)
    assert again.groups == {(1,): [0, 1, 2]} and again.size >= sum(map(len, again.rows))


def test_both_ways_make_the_same_rows() -> None:
    one, other = (put(chunk(row(1), field(None) + field(data(2)), **way)) for way in WAYS)
    assert (one.rows, one.keys, one.partitions, one.groups) == (other.rows, other.keys, other.partitions, other.groups)
    assert one.keys == ["1", None] and one.partitions[1] == 0


@both_ways
def test_what_the_stream_has_overtaken_stays_out(way: dict[str, Any]) -> None:
    one = chunk(row(1), row(2), row(3), **way)
    one.watch.early = frozenset()
    one.watch.note("update", ("2", None), 200)  # which the snapshot does not see
    one.watch.note("update", ("3", None), 99)  # and this it does
    assert put(one).keys == ["1", "3"]


@both_ways
def test_the_first_chunk_of_all_tells_what_came_before_it(way: dict[str, Any]) -> None:
    one = chunk(row(1), row(2), **way)
    one.watch.note("insert", ("1", None), 50)
    assert put(one).keys == ["2"] and set(one.early or ()) == {"1", None}


@both_ways
def test_what_is_too_large_becomes_a_dead_letter(way: dict[str, Any]) -> None:
    limit = len(data(1, 10))
    batch = put(chunk(row(1, 10), row(2, 11), row(3, 1), max_bytes=limit, **way))
    reason = f"oversized: data has {limit + 1} bytes, max_message_bytes is {limit}"
    assert batch.dead == [(1, 1, reason, "2")] and batch.groups == {(1,): [0, 2]} and len(batch.rows) == 3


def test_a_row_that_was_not_loaded_says_its_least_size() -> None:
    batch = put(chunk(row(1, 1, (5000).to_bytes(8)), row(2, 1, None), sized=True, max_bytes=1000))
    assert [(index, key) for _, index, _, key in batch.dead] == [(0, "1")] and batch.groups == {(1,): [1]}
    assert "data has at least 5000 bytes, max_message_bytes is 1000: the row was not loaded" in batch.dead[0][2]


def test_a_filter_passes_rows_and_its_failure_is_a_dead_letter() -> None:
    batch = put(
        chunk(row(1), row(2), row(3), filter=Filter("record.id == 1 ? 1 / (record.id - 1) == 0 : record.id == 3"))
    )
    assert batch.keys == ["1", "3"] and ordinals(batch) == [8, 9]
    assert batch.groups == {(1,): [1]}
    (consumer, index, reason, key) = batch.dead[0]
    assert (consumer, index, key) == (1, 0, "1") and reason.startswith("filter_error: ")


def test_a_key_of_its_own_comes_with_the_row() -> None:
    batch = put(chunk(row(1, 1, b"x"), row(2, 1, None), key=("v",)))
    assert batch.keyed == {1: ([0, 1], ["x", None])} and batch.keys == ["1", "2"] and batch.groups == {}
    left = put(chunk(row(1), on_leave=True, filter=Filter("record.id == 1")))
    assert left.keyed == {1: ([0], ["1"])}, "a row that leaves later has the key that it had before"


def test_a_stream_reads_the_log_itself() -> None:
    batch = put(chunk(row(1, 5000), reads_log=True, max_bytes=10))
    assert batch.streams == {1} and batch.groups == {} and batch.dead == [] and len(batch.rows) == 1
