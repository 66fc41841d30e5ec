"""Events into batches: positions, restarts, open transactions, oversized messages."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.changes.events import Begin, Change, Commit, LogicalMessage, Relation, Truncate
from cdcbridge.changes.position import START, Position
from cdcbridge.errors import DecodeError, IdentityLost
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.routing.subscription import Subscription

T = Relation("public", "t", "public.t", ("id",), frozenset({"id"}))


def subscription(number: int, *tables: str, **given_: object) -> Subscription:
    return Subscription(number, f"c{number}", tables, frozenset(OPERATIONS), **given_)  # type: ignore[arg-type]


def collector(done: Position = START, *subscriptions: Subscription) -> Collector:
    return Collector(Router(subscriptions or [subscription(1, "public.t")]), 16, done, 0)


def transaction(lsn: int, count: int) -> list[object]:
    changes = [Change("insert", T, {"id": n}) for n in range(count)]
    return [Begin(lsn, 7, 0), *changes, Commit(lsn + 1, lsn)]


def feed(into: Collector, events: list[object]) -> None:
    into.feed(events)  # type: ignore[arg-type]


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_restart_anywhere_gives_each_change_once(cut: int, size: int) -> None:
    """Cut the stream anywhere, take what is there, start again from that position with the transaction sent anew."""
    first = collector()
    feed(first, [*transaction(100, size), *transaction(200, 3)][:cut])
    batch = first.take()
    second = collector(batch.position)
    feed(second, [*transaction(100, size), *transaction(200, 3)])
    again = second.take()
    assert len(batch.rows) + len(again.rows) == size + 3
    assert again.position == (200, 2)


def test_ordinals_count_all_that_the_plugin_sent() -> None:
    one = collector()
    other = Relation("public", "u", "public.u", None, frozenset({"id"}))
    feed(one, [
        Begin(10, 7, 0), Change("insert", other, {}), LogicalMessage(True, "p", b"", 5), Truncate((T,), 3),
        Change("insert", T, {"id": 1}), Commit(11, 10),
    ])  # fmt: skip
    batch = one.take()
    assert [int.from_bytes(row[4:8]) for row in batch.rows] == [2, 5]
    assert (batch.position, batch.end_lsn, batch.open) == ((10, 5), 11, False)


def test_an_open_transaction_is_never_reported_as_ended() -> None:
    one = collector()
    feed(one, [*transaction(10, 1), *transaction(20, 2)[:2]])
    batch = one.take()
    assert (batch.position, batch.end_lsn, batch.open) == ((20, 0), 11, True)


@pytest.mark.parametrize("events", [
    [Change("insert", T, {"id": 1})], [Commit(1, 1)], [Begin(1, 1, 1), Begin(2, 2, 2)], [Begin(None, 1, 1)],
])  # fmt: skip
def test_events_out_of_order_are_a_decode_error(events: list[object]) -> None:
    with pytest.raises(DecodeError):
        feed(collector(), events)


def test_a_table_that_lost_its_identity_ends_the_session() -> None:
    with pytest.raises(IdentityLost, match="has lost its replica identity"):
        feed(collector(), [Begin(1, 1, 1), Relation("public", "t", "public.t", None, frozenset())])


def test_an_oversized_message_dies_for_one_consumer_and_reaches_the_other() -> None:
    one = collector(START, subscription(1, "public.t", max_bytes=30), subscription(2, "public.t"))
    feed(one, transaction(10, 1))
    batch = one.take()
    size = len(orjson.dumps({"op": "insert", "record": {"id": 0}, "old": None, "unchanged": []}))
    assert batch.dead == [(1, 0, f"oversized: data has {size} bytes, max_message_bytes is 30", "0")]
    assert batch.groups == {(2,): [0]}
