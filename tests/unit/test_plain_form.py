"""The fast way of shaping gives the same messages as the way that judges each one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.config import Consumer
from cdcbridge.routing.subscription import Subscription
from cdcbridge.sinks.log_row import LogRow
from cdcbridge.sinks.message import Origin, SinkMessage
from cdcbridge.sinks.plain_form import plain_form
from cdcbridge.sinks.reading import judge
from cdcbridge.sinks.shaper import Names, Shaper, Unshaped
from cdcbridge.sinks.target import Outgoing
from cdcbridge.store.consumers import stored_config
from tests.harness.shaping import INSERT, LSN, ORIGIN, TIME, consumer, row

TEXTS = st.text(max_size=20).filter(lambda text: "\0" not in text and text.isascii() | text.isprintable())
DATA = st.sampled_from(
    [
        INSERT,
        '{"op":"read","record":{"id":7},"old":null,"unchanged":[]}',
        '{"op": "delete",\n"record": {"id": 7}, "old": null, "unchanged": []}',
        '{"op":"gap","from_lsn":"0/1"}',
        '{"total":\r\n1}',
        "[1]",
        '"é"',
    ]
)
ROWS = st.builds(
    LogRow,
    st.integers(1, 2**40),
    st.one_of(st.just("public.orders"), TEXTS),
    st.none() | TEXTS,
    st.integers(0, 15),
    DATA,
    st.none(),
    st.none() | st.integers(0, 2**63 - 1),
    st.none() | st.integers(0, 2**31 - 1),
    st.none() | st.integers(1, 2**40),
    st.none() | st.integers(0, 10**17),
    st.integers(0, 10**17),
    st.none() | TEXTS,
)
TIMELINES = Origin("7412", "shop", "slot", [0, 1000, 2**30], [1, 2, 5])


def both(rows: list[LogRow], origin: Origin, **settings: Any) -> tuple[Any, list[Any]]:
    """The messages of the fast way, and those of the other one."""
    chosen: Consumer = consumer(**settings)
    wanted = Subscription.from_config(1, "events", chosen.mode, stored_config(chosen))
    shaper = Shaper(chosen, Names("shop", "shopdb"), None)
    assert shaper.plain_place is not None
    found: list[Outgoing | Unshaped | None] = []
    for one in rows:
        said = judge(one, wanted, origin, projected=False)
        shaped = shaper.shape(said) if isinstance(said, SinkMessage) else said
        found += [shaped] if shaped is None or isinstance(shaped, Unshaped) else shaped
    return plain_form(rows, origin, shaper.plain_place, wanted.max_bytes), found


@given(st.lists(ROWS, max_size=6))
def test_the_messages_are_the_same(rows: list[LogRow]) -> None:
    fast, judged = both(rows, TIMELINES)
    assert fast == judged


@pytest.mark.parametrize("path", ["out/{topic}", "out/{op}-{partition}", "out/{key}"])
def test_destinations_are_the_same(path: str) -> None:
    fast, judged = both([row(), row(seq=6, key="8", partition=2), row(seq=7, topic="s.t")], ORIGIN, sink={"path": path})
    assert fast == judged
    assert len({one.destination for one in fast}) == 2


def test_a_row_without_a_destination_needs_a_judgement() -> None:
    fast, judged = both([row(), row(seq=6, topic="published")], ORIGIN, sink={"path": "out/{schema}"})
    assert fast is None
    assert isinstance(judged[1], Unshaped)


def test_a_row_that_may_be_too_large_needs_a_judgement() -> None:
    fast, judged = both([row()], ORIGIN, max_message_bytes=len(INSERT) * 4 - 1)
    assert fast is None
    assert isinstance(judged[0], Outgoing)


@pytest.mark.parametrize(
    "sink", [{"format": "debezium"}, {"format": "cloudevents"}, {"mask": {"email": "hash"}}, {"transform": "{'a': 1}"}]
)
def test_other_contents_have_no_fast_way(sink: dict[str, Any]) -> None:
    assert Shaper(consumer(sink=sink), Names("shop", "shopdb"), None).plain_place is None


def test_rows_of_one_transaction_differ_only_in_their_own_values() -> None:
    rows = [row(seq=n, ordinal=n, key=str(n)) for n in (5, 6)] + [row(seq=7, commit_lsn=LSN + 1, commit_time=TIME + 1)]
    fast, judged = both(rows, ORIGIN)
    assert fast == judged
    assert [one.id for one in fast] == ["7412/1/0/16B3748/5", "7412/1/0/16B3748/6", "7412/1/0/16B3749/2"]
