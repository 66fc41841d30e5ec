"""The marker by which a transaction says that a mirror applied it, and what the collector makes of it."""

from __future__ import annotations

import pytest

from cdcbridge.changes.events import Begin, Change, Commit, LogicalMessage, Relation
from cdcbridge.changes.position import START
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.mirror_marks import MARKER_PREFIX, PROBE_PREFIX, Marker, TransactionMark, source_identity
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription

MARKER = Marker("7412345678901234567/16384", 0x16B374D848, "to_a")
TABLE = Relation("public", "t", "public.t", ("id",), frozenset({"id"}))
TWO_WAY = Subscription(1, "to_b", ("public.t",), frozenset({"insert"}), reads_log=True, two_way=True)


def collector(*subscriptions: Subscription, effective_time: int = 0) -> Collector:
    return Collector(Router(subscriptions), 16, START, 0, effective_time=effective_time)


def message(prefix: str, content: str, *, transactional: bool = True) -> LogicalMessage:
    return LogicalMessage(transactional, prefix, content.encode(), 150)


def test_a_marker_is_read_as_it_was_written() -> None:
    assert Marker.read(MARKER.dump().encode()) == MARKER
    assert source_identity("7412345678901234567", 16384) == MARKER.source


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", "{}", '{"source": 1}', '{"source": "a", "lsn": "0/1"}', '{"source": "a", "lsn": "x"}', "\xff"],
)
def test_other_content_is_no_marker(content: str) -> None:
    assert Marker.read(content.encode("latin-1")) is None


def test_a_marked_transaction_is_noted_even_if_it_has_no_rows() -> None:
    made = collector(TWO_WAY)
    made.feed([Begin(200, 7, 1000), message(MARKER_PREFIX, MARKER.dump()), Commit(210)])
    assert made.waiting
    assert made.take().marks == {200: TransactionMark(200, MARKER, None)}
    assert not made.waiting


def test_a_commit_time_never_decreases() -> None:
    made = collector(TWO_WAY, effective_time=5000)
    row = Change("insert", TABLE, {"id": 1})
    made.feed([Begin(200, 7, 1000), row, Commit(210), Begin(300, 8, 6000), row, Commit(310)])
    made.feed([Begin(400, 9, 5999), row, Commit(410)])
    batch = made.take()
    assert batch.marks == {200: TransactionMark(200, None, 5000), 400: TransactionMark(400, None, 6000)}
    assert batch.effective_time == 6000


def test_without_a_second_direction_no_time_is_noted() -> None:
    one_way = Subscription(1, "to_b", ("public.t",), frozenset({"insert"}), reads_log=True)
    made = collector(one_way, effective_time=5000)
    made.feed([Begin(200, 7, 1000), Change("insert", TABLE, {"id": 1}), Commit(210)])
    assert made.take().marks == {}


def test_a_probe_moves_the_end_of_the_log() -> None:
    made = collector(TWO_WAY)
    made.feed([message(PROBE_PREFIX, "", transactional=False)])
    assert made.waiting
    assert made.take().end_lsn == 150
