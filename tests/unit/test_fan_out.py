"""Who gets which message: rows for COPY, read back as the server would read them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.fan_out import barrier_rows, between, waiting_rows

FIRST = 100
Got = dict[int, list[tuple[int, str | None]]]


def fields(rows: bytes) -> Iterator[list[bytes | None]]:
    position = 0
    while position < len(rows):
        (count,) = struct.unpack_from("!H", rows, position)
        position += 2
        found: list[bytes | None] = []
        for _ in range(count):
            (size,) = struct.unpack_from("!i", rows, position)
            position += 4
            found.append(None if size < 0 else rows[position : position + size])
            position += max(size, 0)
        yield found


def array(value: bytes) -> list[bytes | None]:
    """The elements of a binary array."""
    (found,) = fields(struct.pack("!H", struct.unpack_from("!i", value, 12)[0]) + value[20:])
    return found


def received(batch: AppendBatch) -> Got:
    """(seq, key) of each message, by consumer, in the order of the rows. The key is None where it is left to the log."""
    got: Got = {}
    for consumer, ord_, seqs, keys in fields(waiting_rows(batch, FIRST)):
        assert consumer and ord_ and seqs
        numbers = [int.from_bytes(seq or b"") for seq in array(seqs)]
        texts = [None if key is None else key.decode() for key in array(keys)] if keys else [None] * len(numbers)
        assert int.from_bytes(ord_) == numbers[0], "rows are ordered by their first message"
        got.setdefault(int.from_bytes(consumer), []).extend(zip(numbers, texts, strict=True))
    return got


def batch(count: int = 4, **given_: object) -> AppendBatch:
    return AppendBatch(rows=[b""] * count, keys=[f"k{n}" for n in range(count)], **given_)  # type: ignore[arg-type]


def test_queues_leave_the_keys_to_the_log_and_fifo_consumers_do_not() -> None:
    found = received(batch(groups={(1, 2): [0, 2]}, in_order=frozenset({2})))
    assert found == {1: [(100, None), (102, None)], 2: [(100, "k0"), (102, "k2")]}


def test_a_key_of_its_own_goes_to_both_modes() -> None:
    keyed = {1: ([0, 1], ["x", None]), 2: ([1], ["y"])}
    assert received(batch(keyed=keyed, in_order=frozenset({2}))) == {1: [(100, "x"), (101, None)], 2: [(101, "y")]}


def test_a_consumer_of_several_groups_gets_its_messages_once_and_in_order() -> None:
    assert received(batch(groups={(1, 2): [1, 3], (1,): [0, 2]})) == {
        1: [(100, None), (101, None), (102, None), (103, None)],
        2: [(101, None), (103, None)],
    }


def test_a_barrier_is_a_row_of_its_own_for_fifo_consumers_alone() -> None:
    one = batch(groups={(1, 2): [0, 1, 2]}, in_order=frozenset({2}), barriers=[1])
    assert received(one) == {1: [(100, None), (101, None), (102, None)], 2: [(100, "k0"), (102, "k2")]}
    assert barrier_rows(one, FIRST) == [(2, 101)]
    assert barrier_rows(batch(groups={(1,): [0]}), FIRST) == []


def test_what_is_delivered_later_is_left_out_in_order() -> None:
    one = batch(groups={(2,): [0, 1]}, in_order=frozenset({2}), later=[(2, 1, "k1", "2026-01-01T00:00:00+00:00")])
    assert received(one) == {2: [(100, "k0")]}


@given(st.integers(0, 400), st.sets(st.integers(0, 400)), st.booleans())
def test_everything_arrives_once_whatever_the_size(count: int, barriers: set[int], ordered: bool) -> None:
    barriers = {n for n in barriers if n < count}
    one = batch(count, groups={(1,): list(range(count))} if count else {}, barriers=sorted(barriers))
    one.in_order = frozenset({1} if ordered else ())
    got = [seq for seq, _ in received(one).get(1, [])]
    alone = [seq for _, seq in barrier_rows(one, FIRST)]
    assert sorted(got + alone) == list(range(FIRST, FIRST + count)) and got == sorted(got)
    assert alone == ([FIRST + n for n in sorted(barriers)] if ordered else [])


@given(st.lists(st.integers(0, 50), unique=True).map(sorted), st.sets(st.integers(0, 50)))
def test_no_run_reaches_over_a_barrier(numbers: list[int], barriers: set[int]) -> None:
    runs = list(between(numbers, [str(n) for n in numbers], barriers))
    assert [n for run, _ in runs for n in run] == [n for n in numbers if n not in barriers]
    for run, keys in runs:
        assert run and keys == [str(n) for n in run]
        assert not any(run[0] < barrier < run[-1] for barrier in barriers & set(numbers))
