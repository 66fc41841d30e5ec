"""browse_log() shows the log page by page, with bounded work, to roles that may read all of it."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.sql.queue import Row, StoreQueue
from tests.sql.test_rights import session_of

BOUND = 100_000  # messages that one call looks at
NOW = "2026-05-01T10:00:00Z"


def page(queue: StoreQueue, **named: Any) -> tuple[list[Row], int | None]:
    """The messages of a page, and the place of the next one."""
    given = ", ".join(f"{name} => %s" for name in named)
    rows = queue.all(f"select * from cdcbridge.browse_log({given})", *named.values())
    last = rows.pop()["seq"] if rows and rows[-1]["topic"] is None else None
    return rows, last


def seqs(rows: list[Row]) -> list[int]:
    return [row["seq"] for row in rows]


def fill(queue: StoreQueue, count: int) -> None:
    """A log of `count` messages, one each millisecond, with 16 keys of the partitions 0 to 15."""
    queue.session.execute(
        "insert into cdcbridge.messages (seq, topic, key, partition, data, inserted_at) select n, 't', 'k' || n %% 16,"
        f" cdcbridge.partition_of('k' || n %% 16, 16), '{{}}', '{NOW}'::timestamptz + n * interval '1 ms'"
        " from generate_series(1, %s) n",
        [count],
    )
    queue.session.execute("select setval('cdcbridge.messages_seq', %s)", [count])


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_show_each_message_once_in_order(queue: StoreQueue, newest_first: bool) -> None:
    queue.declare()
    put = queue.append(25)
    found: list[int] = []
    place: int | None = None
    for size in (10, 10, 5):
        rows, place = page(queue, from_seq=place, at_most=size, newest_first=newest_first)
        assert len(rows) == size
        found += seqs(rows)
    assert found == sorted(put, reverse=newest_first) and place is None
    assert {"topic", "key", "data", "commit_lsn", "ordinal", "commit_time", "inserted_at"} < rows[0].keys()


def test_topic_and_key_choose(queue: StoreQueue) -> None:
    for topic, key in (("a", "1"), ("a", "2"), ("b", "1"), ("a", None)):
        queue.value("select cdcbridge.publish(%s, %s, '{}'::json)", topic, key)
    assert seqs(page(queue, topic="a")[0]) == [4, 2, 1]
    assert seqs(page(queue, key="1")[0]) == [3, 1]
    assert seqs(page(queue, topic="a", key="1")[0]) == [1]
    assert page(queue, topic="c") == ([], None)


def test_a_search_that_finds_nothing_ends_after_a_bounded_number_of_messages(queue: StoreQueue) -> None:
    fill(queue, 2 * BOUND + 500)
    place, pages = None, []
    for _ in range(3):
        rows, place = page(queue, topic="none", from_seq=place)
        pages.append(place)
        assert rows == []
    assert pages == [BOUND + 500, 500, None]
    assert page(queue, topic="none", newest_first=False)[1] == BOUND + 1


def test_the_history_of_a_key_reads_its_partition_alone(queue: StoreQueue) -> None:
    fill(queue, 3 * BOUND)
    rows, place = page(queue, key="k3", at_most=10_000)
    assert place is not None and len(rows) == BOUND // 16  # without an index: each message of the log
    queue.declare("s", mode="stream")
    history, place = page(queue, key="k3", at_most=10_000)
    assert history[: len(rows)] == rows and place == history[-1]["seq"] - 16
    history += page(queue, key="k3", from_seq=place, at_most=10_000)[0]
    assert len(history) > 2 * len(rows)
    assert page(queue, key="none") == ([], None)  # one call saw all messages of its partition


def test_a_changed_number_of_partitions_hides_no_message_of_a_key(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream")
    before = queue.value("select cdcbridge.publish('t', 'k', '{}'::json)")
    with queue.session.transaction():
        assert queue.value("select cdcbridge_internal.begin_partitions(7)")
    queue.value("select cdcbridge_internal.finish_partitions(7)")
    after = queue.value("select cdcbridge.publish('t', 'k', '{}'::json)")
    assert seqs(page(queue, key="k")[0]) == [after, before]


@pytest.mark.parametrize(
    "moment, newest_first, first",
    [("10:00:02.5Z", True, 2500), ("10:00:02.5Z", False, 2500), ("10:00:02.5001Z", True, 2500),
     ("10:00:02.5001Z", False, 2501), ("11:00Z", True, 5000), ("09:00Z", False, 1)],
)  # fmt: skip
def test_a_time_is_a_place(queue: StoreQueue, moment: str, newest_first: bool, first: int) -> None:
    fill(queue, 5000)
    queue.session.execute("delete from cdcbridge.messages where seq between 1000 and 2000")  # seqs that were not used
    rows, _ = page(queue, from_time=f"2026-05-01T{moment}", newest_first=newest_first, at_most=1)
    assert seqs(rows) == [first]


def test_a_time_before_or_after_the_log_shows_nothing(queue: StoreQueue) -> None:
    assert page(queue, from_time=NOW) == ([], None)
    fill(queue, 10)
    assert page(queue, from_time="2026-05-01T09:00Z") == ([], None)
    assert page(queue, from_time="2026-05-01T11:00Z", newest_first=False) == ([], None)


@pytest.mark.parametrize(
    "named, message",
    [({"at_most": 0}, "at_most is 0, but must be 1 to 10000"), ({"at_most": None}, "at_most is null"),
     ({"from_seq": 1, "from_time": NOW}, "only one of them may be given")],
)  # fmt: skip
def test_values_that_are_not_allowed(queue: StoreQueue, named: Row, message: str) -> None:
    with pytest.raises(psycopg.Error, match=message) as error:
        page(queue, **named)
    assert error.value.sqlstate == "CB004"


def test_a_role_needs_the_right_to_read_the_whole_log(queue: StoreQueue) -> None:
    queue.session.execute("drop role if exists browsing; create role browsing login")
    try:
        queue.declare(role="browsing")
        queue.append(1)
        session = session_of(queue, "browsing")
        call = "select count(*) from cdcbridge.browse_log()"
        with pytest.raises(psycopg.Error, match="the role browsing may not read the log") as error:
            session.execute(call)
        assert error.value.sqlstate == "CB008"
        assert "grant select on cdcbridge.messages to browsing" in str(error.value.diag.message_hint)
        queue.session.execute("grant select on cdcbridge.messages to browsing")
        assert queue.value(call, session=session) == 1
    finally:
        queue.session.execute("drop owned by browsing; drop role browsing")
