"""follow_stream() shows all messages of a stream in order of seq, and misses none."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.sql.queue import Row, StoreQueue
from tests.sql.test_browse import BOUND


@pytest.fixture(autouse=True)
def _stream(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", topics=("news",), start="earliest")


def publish(queue: StoreQueue, *keys: str, session: psycopg.Connection[Row] | None = None, topic: str = "news") -> int:
    for key in keys:
        last = queue.value("select cdcbridge.publish(%s, %s, '1')", topic, key, session=session)
    return int(last)


def follow(queue: StoreQueue, after: int | None = None, **named: Any) -> tuple[list[int], int]:
    """The seqs, and the next position."""
    given = "".join(f", {name} => %s" for name in named)
    rows = queue.all(f"select * from cdcbridge.follow_stream('s', %s{given})", after, *named.values())
    assert rows[-1]["topic"] is None
    return [row["seq"] for row in rows[:-1]], rows[-1]["seq"]


def test_each_message_is_shown_once_in_order_and_no_offset_moves(queue: StoreQueue) -> None:
    publish(queue, *"abcdefg")
    publish(queue, "a", topic="other")
    assert follow(queue, place="earliest", max_messages=5) == ([1, 2, 3, 4, 5], 5)
    assert follow(queue, 5) == ([6, 7], 8)
    assert follow(queue, 8) == ([], 8) == follow(queue)
    assert sum(row["messages"] for row in queue.all("select * from cdcbridge.group_lag('s')")) == 7


def test_a_message_that_commits_late_is_not_missed(queue: StoreQueue) -> None:
    late = queue.open(autocommit=False)
    publish(queue, "late", session=late)
    publish(queue, "early")
    assert follow(queue, 0) == ([], 0)
    late.commit()
    assert follow(queue, 0) == ([1, 2], 2)


@pytest.fixture
def _changes(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", tables=("public.t",), topics=(), start="earliest")


@pytest.mark.usefixtures("_changes")
def test_a_publisher_delays_no_changes_of_tables(queue: StoreQueue) -> None:
    late = queue.open(autocommit=False)
    publish(queue, "late", session=late, topic="other")
    changes = queue.append_changes(("insert", "1", None), ("insert", "2", None))
    assert follow(queue, 0) == (changes, changes[-1])
    assert follow(queue, changes[0]) == (changes[1:], changes[-1])
    publish(queue, "between", topic="other")
    assert follow(queue, changes[-1]) == ([], changes[-1]), "not beyond a seq that may be a change"
    late.commit()
    assert follow(queue, changes[-1]) == ([], changes[-1] + 1)


def test_a_call_looks_at_a_bounded_number_of_messages(queue: StoreQueue) -> None:
    queue.session.execute(
        "insert into cdcbridge.messages (seq, topic, partition, data)"
        " select n, case n when %(last)s then 'news' else 'other' end, 0, '1' from generate_series(1, %(last)s) n",
        {"last": BOUND + 10},
    )
    queue.session.execute("select setval('cdcbridge.messages_seq', %s)", [BOUND + 10])
    assert follow(queue, 0) == ([], BOUND)
    assert follow(queue, BOUND) == ([BOUND + 10], BOUND + 10)


def test_dropped_messages_are_told(queue: StoreQueue) -> None:
    publish(queue, "a")
    queue.next_segment()
    last = publish(queue, "b")
    queue.session.execute("drop table cdcbridge_internal.messages_000000")
    with pytest.raises(psycopg.Error, match="before the beginning of the log") as error:
        follow(queue, 1)
    assert error.value.sqlstate == "CB009"
    assert follow(queue, place="earliest") == ([last], last)


@pytest.mark.parametrize(
    "after, named, told",
    [(7, {}, "seq 7 is after the end of the log"), (None, {"place": "nowhere"}, "nowhere"),
     (0, {"max_messages": 0}, "max_messages is 0")],
)  # fmt: skip
def test_values_that_are_not_allowed(queue: StoreQueue, after: int | None, named: Row, told: str) -> None:
    with pytest.raises(psycopg.Error, match=told) as error:
        follow(queue, after, **named)
    assert error.value.sqlstate == "CB004"


def test_an_older_snapshot_is_refused(queue: StoreQueue) -> None:
    session = queue.open(autocommit=False)
    session.execute("set transaction isolation level repeatable read")
    with pytest.raises(psycopg.Error) as error:
        queue.all("select * from cdcbridge.follow_stream('s')", session=session)
    assert error.value.sqlstate == "CB005"
