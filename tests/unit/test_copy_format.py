"""Rows for COPY."""

from __future__ import annotations

from cdcbridge.routing.copy_format import CHUNK_SIZE, chunk_rows, message_rows


def test_fan_out_rows_are_small_for_small_appends_and_shared_for_large_ones() -> None:
    def rows(count: int) -> int:
        data, position, found = chunk_rows((1,), range(1, count + 1), None, count), 0, 0
        while position < len(data):
            position += 2 + 4 + 4 + 4 + 8
            for _ in range(2):
                size = int.from_bytes(data[position : position + 4], signed=True)
                position += 4 + max(size, 0)
            found += 1
        return found

    assert rows(100) == 100
    assert rows(1000) == 1000 / CHUNK_SIZE


def test_rows_of_a_partition_stand_beside_each_other_where_groups_read_and_keep_their_seqs() -> None:
    rows = [b"<%d>" % n for n in range(5)]
    plain = message_rows(rows, 100)
    grouped = message_rows(rows, 100, [1, 0, 1, 0, 2])
    pieces = {n: plain[plain.index(rows[n]) - 14 : plain.index(rows[n]) + 3] for n in range(5)}
    assert grouped == b"".join(pieces[n] for n in (1, 3, 0, 2, 4))
