"""Compaction against a model: whoever reads on from wherever it stood comes to the state that all the changes lead to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import store_database
from tests.sql.queue import Row, StoreQueue
from tests.sql.test_compact import compact, drain, fold, read

KEYS = "abcd"
key = st.sampled_from(KEYS)
change = st.one_of(
    st.tuples(st.sampled_from(["insert", "update", "delete"]), key, st.none()),
    st.tuples(st.just("update"), key, key).filter(lambda c: c[1] != c[2]),
    st.just(("truncate", None, None)),
)
step = st.one_of(change, change, st.sampled_from(["read", "segment", "compact"]))
examples = itertools.count()


@pytest.fixture(scope="module")
def queue(pg15: EmbeddedServer) -> Iterator[StoreQueue]:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        yield made
        made.close()


@pytest.mark.timeout(300)
@given(st.lists(step, min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
@example([("insert", "a", None), ("update", "b", "a")])  # an update takes the key a away
@example([("insert", "a", None), "read", ("delete", "a", None), "segment", "compact"])  # has not read that a is gone
def test_a_reader_comes_to_the_state_wherever_it_stood(queue: StoreQueue, steps: list[Any]) -> None:
    prefix = f"{next(examples)}-"
    if queue.all("select from cdcbridge.consumers"):
        queue.value("select cdcbridge_internal.remove_consumer('s')")
    queue.declare("s", mode="stream", compact=True)
    everything: list[Row] = []
    heard: list[Row] = []
    for one in [*steps, "segment", "compact"]:
        if one == "read":
            heard += read(queue, 2)
        elif one == "segment":
            queue.next_segment()
        elif one == "compact":
            compact(queue)
        else:
            op, new, old = one
            (seq,) = queue.append_changes((op, new and prefix + new, old and prefix + old))
            everything += queue.all("select seq, key, data from cdcbridge.messages where seq = %s", seq)
    heard += drain(queue)
    state = fold(everything)
    assert fold(sorted(heard, key=lambda row: row["seq"])) == state
    queue.next_segment()
    while compact(queue)["dropped"]:  # a segment at a time
        pass
    queue.value("select cdcbridge.seek('s', 'earliest')")
    kept = [row for row in drain(queue) if (row["key"] or "").startswith(prefix)]
    assert {row["key"]: row["seq"] for row in kept} == state, "and nothing else, once all was read"
