"""Gaps of tables whose changes wal2json drops: when they are told, and to whom."""

from __future__ import annotations

import json

import pytest

from cdcbridge.changes.events import Begin
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.dropped_changes import Gap, Missing, add_gap, closing, opening
from cdcbridge.routing.router import OPERATIONS
from cdcbridge.routing.subscription import Subscription


@pytest.mark.parametrize(
    ("last", "told"),
    [(None, {99: True, 100: True, 5000: True}), (200, {100: True, 199: True, 200: False, 201: False})],
)
def test_a_gap_tells_of_what_commits_before_its_end(last: int | None, told: dict[int, bool]) -> None:
    missing = Missing()
    missing.open("public.t", 100)
    if last is not None:
        assert missing.close("public.t", last) == Gap(100, last)
    assert {lsn: missing.tells("public.t", lsn) for lsn in told} == told
    assert not missing.tells("public.u", 100)


def test_gaps_of_one_transaction_are_numbered() -> None:
    missing = Missing()
    assert [missing.open(topic, lsn) for topic, lsn in (("a.a", 5), ("a.b", 5), ("a.c", 6), ("a.d", 5))] == [0, 1, 0, 2]
    assert missing.open("a.a", 6) == 1, "it begins anew"


def test_a_gap_ends_when_the_table_has_an_identity_again_and_once() -> None:
    missing = Missing()
    for topic in ("a.a", "a.b"):
        missing.open(topic, 5)
    assert missing.ended({"a.a"}) == ["a.b"] and missing.ended(()) == ["a.a", "a.b"]
    missing.close("a.b", 9)
    assert missing.ended(()) == ["a.a"]


def test_the_store_gives_back_what_it_got() -> None:
    missing = Missing()
    missing.open("a.a", 5)
    missing.open("a.b", 6)
    missing.close("a.b", 7)
    again = Missing(json.loads(json.dumps(missing.dump())))
    assert again.dump() == missing.dump() == {"missing": {"a.a": [5, None], "a.b": [6, 7]}}
    assert Missing({"publications": {}}).dump() == Missing(None).dump() == {"missing": {}}


def test_its_consumers_get_the_message_and_nobody_else() -> None:
    batch = AppendBatch()
    takers = [
        Subscription(n, f"c{n}", ("a.a",), frozenset(OPERATIONS), reads_log=reads)
        for n, reads in ((1, False), (2, True))
    ]
    for number in range(2):
        add_gap(batch, Begin(256, 7, 0), takers, opening("a.a", 256), number)
    assert batch.gap and batch.groups == {(1,): [0, 1]} and batch.streams == {2}
    assert [int.from_bytes(row[4:8], signed=True) for row in batch.rows] == [-2, -3], "no change has such an ordinal"
    record, names = batch.gaps[0]
    assert names == ["c1", "c2"] and (record["from"], record["to"], record["table"]) == ("0/100", None, "a.a")
    assert b'"op":"gap"' in batch.rows[0] and b"cdcbridge.gap" in batch.rows[0]
    assert "a.a" in closing("a.a") and "had no replica identity" in closing("a.a")
