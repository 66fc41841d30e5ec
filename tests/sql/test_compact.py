"""Compaction keeps each key's latest message, and what groups have yet to hear of keys that are gone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sql.queue import Row, StoreQueue

FOREVER = "1 day"


def compact(queue: StoreQueue, max_retention: str = FOREVER) -> Row:
    query = "select dropped, held_by, lost from cdcbridge_internal.drop_segments('0', %s::interval)"
    return queue.all(query, max_retention)[0]


def read(queue: StoreQueue, count: int = 100, name: str = "s") -> list[Row]:
    rows = queue.all("select * from cdcbridge.read_stream(%s, %s, '1 min')", name, count)
    if rows:
        last = rows[-1]
        queue.value(
            "select cdcbridge.commit_offset(%s, %s, %s, %s)", name, last["partition"], last["seq"], last["receipt"]
        )
    return rows


def drain(queue: StoreQueue, name: str = "s") -> list[Row]:
    rows = []
    while got := read(queue, name=name):
        rows += got
    return sorted(rows, key=lambda row: row["seq"])


def told(rows: list[Row]) -> list[tuple[str, Any]]:
    return [(row["data"]["op"], row["key"]) for row in rows]


def fold(rows: list[Row]) -> dict[str, int]:
    """The state that messages lead to: each key's latest seq."""
    state: dict[str, int] = {}
    for row in rows:
        data = row["data"]
        if data["op"] == "truncate":
            state.clear()
        elif data["op"] == "delete":
            state.pop(row["key"], None)
        else:
            if data["old"]:
                state.pop(data["old"]["id"], None)
            state[row["key"]] = row["seq"]
    return state


def test_each_keys_latest_message_is_kept_where_it_stood(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", compact=True, start="earliest")
    queue.append_changes(("insert", "a", None), ("insert", "b", None), ("insert", "gone", None), ("update", "a", None))
    put = queue.append_changes(("update", "b", None), ("delete", "gone", None))
    drain(queue)
    queue.next_segment()
    queue.append_changes(("update", "a", None))
    queue.next_segment()
    assert compact(queue) == {"dropped": 1, "held_by": None, "lost": 0}
    assert compact(queue) == {"dropped": 1, "held_by": None, "lost": 0}, "one segment at a time"
    assert compact(queue) == {"dropped": 0, "held_by": None, "lost": 0}
    queue.value("select cdcbridge.seek('s', 'earliest')")
    rows = drain(queue)
    assert [row["seq"] for row in rows] == [put[0], 1_000_001], "the delete had been read by everybody"
    assert rows[0]["commit_lsn"] is not None
    last = queue.append_changes(("insert", "c", None))
    assert [row["seq"] for row in drain(queue)] == last
    queue.declare("new", mode="stream", compact=True, start="earliest")
    assert [row["seq"] for row in drain(queue, "new")] == [put[0], 1_000_001, *last]


def test_what_a_group_has_not_read_of_keys_that_are_gone_stays_until_it_has(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", compact=True, start="earliest")
    queue.append_changes(*[("insert", key, None) for key in "abcd"], ("insert", None, None))
    drain(queue)
    queue.append_changes(("delete", "a", None), ("update", "B", "b"), ("update", "B", None), ("insert", None, None))
    queue.next_segment()
    assert compact(queue)["dropped"] == 1
    assert told(drain(queue)) == [("delete", "a"), ("update", "B"), ("update", "B"), ("insert", None)]
    queue.next_segment()
    assert compact(queue)["dropped"] == 1
    queue.value("select cdcbridge.seek('s', 'earliest')")
    assert told(drain(queue)) == [("insert", "c"), ("insert", "d"), ("update", "B")]


def test_removals_older_than_max_retention_are_not_kept_for_a_group_that_never_comes(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", compact=True, start="earliest")
    queue.append_changes(("insert", "a", None), ("insert", "b", None))
    drain(queue)
    queue.append_changes(("delete", "a", None))
    queue.next_segment()
    assert compact(queue, "0") == {"dropped": 1, "held_by": None, "lost": 1}
    with pytest.raises(Exception, match="1 unread messages of partition"):
        drain(queue)
    queue.value("select cdcbridge.seek('s', 'earliest')")
    assert told(drain(queue)) == [("insert", "b")]


def test_topics_of_others_go_whole_and_their_groups_are_told(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", compact=True, start="earliest")
    queue.declare("other", mode="stream", tables=(), topics=("news",), start="earliest")
    queue.append_changes(("insert", "a", None))
    queue.value("select cdcbridge.publish('news', 'a', '1')")
    queue.next_segment()
    assert compact(queue) == {"dropped": 1, "held_by": None, "lost": 1}
    with pytest.raises(Exception, match="slower than the log's retention"):
        drain(queue, "other")
    assert told(drain(queue)) == [("insert", "a")]
    with pytest.raises(Exception, match="is before the beginning of the log"):
        queue.value("select cdcbridge.seek('other', '1')")


def test_published_topics_are_compacted_and_null_takes_a_key_away(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", tables=(), topics=("prices",), compact=True, start="earliest")
    for key, value in (("a", "1"), ("b", "1"), ("a", "2"), ("b", "null")):
        queue.value("select cdcbridge.publish('prices', %s, %s)", key, value)
    drain(queue)
    queue.next_segment()
    assert compact(queue)["dropped"] == 1
    queue.value("select cdcbridge.seek('s', 'earliest')")
    assert [(row["key"], row["data"]["record"]) for row in drain(queue)] == [("a", 2)]


def test_what_a_queue_has_not_finished_is_not_compacted(queue: StoreQueue) -> None:
    queue.declare()
    queue.declare("s", mode="stream", compact=True)
    queue.append_keys("a", "a")
    queue.next_segment()
    assert compact(queue) == {"dropped": 0, "held_by": "c", "lost": 0}
    first = queue.receive()
    queue.ack(*[row["receipt"] for row in first])
    assert compact(queue)["dropped"] == 1
    queue.declare("late", start="earliest")
    assert len(queue.receive(name="late")) == 1
    queue.next_segment()
    queue.append_keys("a")
    queue.next_segment()
    assert compact(queue) == {"dropped": 0, "held_by": "late", "lost": 0}, "a queue that was filled from what was kept"


def test_what_was_kept_goes_when_nobody_compacts_any_more(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", compact=True, start="earliest")
    queue.append_changes(("insert", "a", None))
    queue.next_segment()
    compact(queue)
    queue.declare("s", mode="stream", start="earliest")
    assert compact(queue) == {"dropped": 1, "held_by": None, "lost": 1}
    assert queue.value("select to_regclass('cdcbridge_internal.messages_compacted')") is None


def test_a_reader_in_its_transaction_delays_compaction(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", compact=True, start="earliest")
    put = queue.append_changes(("insert", "a", None))
    queue.next_segment()
    member = queue.open(autocommit=False)
    assert queue.all("select seq from cdcbridge.read_stream('s')", session=member)
    assert compact(queue)["dropped"] == 0
    member.rollback()
    assert compact(queue)["dropped"] == 1
    assert [row["seq"] for row in drain(queue)] == put


def test_a_row_that_was_read_for_one_group_takes_nothing_from_another(queue: StoreQueue) -> None:
    for name in ("s", "r"):
        reader = queue.declare(name, mode="stream", compact=True, start="earliest")
    queue.append_changes(("insert", "a", None))
    queue.value(
        "with m as (insert into cdcbridge.messages (seq, topic, key, partition, data, reader)"
        " select nextval('cdcbridge.messages_seq'), m.topic, m.key, m.partition,"
        " replace(m.data::text, 'insert', 'read')::json, %s from cdcbridge.messages m returning 1) select count(*) from m",
        reader,
    )
    assert told(drain(queue)) == [("insert", "a")]
    assert told(drain(queue, "r")) == [("insert", "a"), ("read", "a")]
    queue.next_segment()
    compact(queue)
    for name, kept in (("s", [("insert", "a")]), ("r", [("insert", "a"), ("read", "a")])):
        queue.value("select cdcbridge.seek(%s, 'earliest')", name)
        assert told(drain(queue, name)) == kept
    queue.append_changes(("update", "a", None))
    for name in ("s", "r"):
        drain(queue, name)
    queue.next_segment()
    compact(queue)
    for name in ("s", "r"):
        queue.value("select cdcbridge.seek(%s, 'earliest')", name)
        assert told(drain(queue, name)) == [("update", "a")]
