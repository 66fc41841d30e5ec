"""Places and times: one way to say them, and what seek(), peek_stream() and nack_failed() answer."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.sql.queue import StoreQueue
from tests.sql.test_publish import publish
from tests.sql.test_queue import receipts

ELSEWHERE = "set timezone = 'Pacific/Auckland'; set datestyle = 'SQL, DMY'; set intervalstyle = 'sql_standard'"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("-1h", "clock_timestamp() - interval '1 hour'"),
        ("-90m", "clock_timestamp() - interval '90 minutes'"),
        ("- 1.5 h", "clock_timestamp() - interval '90 minutes'"),
        ("-1d", "clock_timestamp() - interval '24 hours'"),
        ("-500ms", "clock_timestamp() - interval '0.5 s'"),
        ("+10m", "clock_timestamp() + interval '10 minutes'"),
        ("now", "clock_timestamp()"),
        ("today", "date_trunc('day', now() at time zone 'UTC') at time zone 'UTC'"),
        ("Yesterday", "date_trunc('day', now() at time zone 'UTC') at time zone 'UTC' - interval '24 hours'"),
        ("tomorrow", "date_trunc('day', now() at time zone 'UTC') at time zone 'UTC' + interval '24 hours'"),
        ("2026-05-01 10:00+02", "timestamptz '2026-05-01 08:00+00'"),
    ],
)
def test_times_are_said_in_one_way_whatever_the_session(queue: StoreQueue, said: str, meant: str) -> None:
    session = queue.open()
    session.execute(ELSEWHERE.encode())
    off = queue.value(f"select extract(epoch from cdcbridge.time_of(%s) - ({meant}))", said, session=session)
    assert abs(float(off)) < 5


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ("1h", "'1h' is a duration, not a place in the log", "Add a sign: -1h is in the past, and +1h in the future."),
        ("-1y", "'-1y' is not a place in the log", "A place is earliest, latest, a seq or a time."),
        (
            "--1h",
            "'--1h' is not a place in the log",
            "A time is for example 2026-05-01 10:00+02, -1h (an hour ago) or yesterday.",
        ),
        ("-999999999999999d", "is not a place in the log", "earliest"),
        ("2026-05-01", "has no time zone", "Add one"),
        ("last week", "'last week' is not a place in the log", "-1h"),
    ],
)
def test_what_is_no_time_is_refused_with_what_to_write(queue: StoreQueue, said: str, message: str, hint: str) -> None:
    with pytest.raises(psycopg.DatabaseError) as refused:
        queue.value("select cdcbridge.time_of(%s)", said)
    assert refused.value.sqlstate == "CB004"
    assert message in str(refused.value.diag.message_primary) and hint in str(refused.value.diag.message_hint)


@pytest.fixture
def stream(queue: StoreQueue) -> StoreQueue:
    queue.declare("s", mode="stream", tables=(), topics=("t",), start="earliest")
    return queue


def test_seek_takes_texts_numbers_and_times(stream: StoreQueue) -> None:
    for _ in range(3):
        publish(stream)
    stream.session.execute(ELSEWHERE.encode())
    offset = "select max(seq) as seq from cdcbridge.consumer_group_offsets"
    for target, value, expected in (
        ("'latest'", None, 3), ("'earliest'", None, 0), ("'2'", None, 1), ("3", None, 2), ("%s", "2", 1),
        ("%s", 3, 2), ("now() + interval '1 hour'", None, 3), ("now() - interval '1 hour'", None, 0),
        ("'-1h'", None, 0), ("'yesterday'", None, 0),
    ):  # fmt: skip
        values = () if value is None else (value,)
        moved = stream.session.execute(f"select cdcbridge.seek('s', {target}) as n".encode(), values).fetchone()
        assert moved and moved["n"] == 16, target
        assert stream.value(offset) == expected, target


def test_seek_tells_where_each_partition_went(stream: StoreQueue) -> None:
    seqs = [publish(stream, key) for key in ("a", "a", "b")]
    places = stream.all("select partition, max(seq) as seq from cdcbridge.messages group by partition order by 1")
    stream.value("select cdcbridge.seek('s', 'latest')")
    went = stream.all("select * from cdcbridge.seek_partitions('s', %s)", str(seqs[1]))
    assert [(row["old_seq"], row["new_seq"]) for row in went] == [(seqs[2], seqs[0])] * 16
    assert [row["partition"] for row in went if row["time"] is not None] == [row["partition"] for row in places]
    (one,) = stream.all("select * from cdcbridge.seek_partitions('s', 'latest', 3)")
    assert one == {"partition": 3, "old_seq": seqs[0], "new_seq": seqs[2], "time": None}


def seen(queue: StoreQueue, arguments: str = "") -> list[int]:
    return [row["seq"] for row in queue.all(f"select * from cdcbridge.peek_stream('s'{arguments})")]


def test_a_look_at_a_stream_moves_nothing(stream: StoreQueue) -> None:
    seqs = [publish(stream, f"k{n}") for n in range(6)]
    publish(stream, topic="other")
    assert seen(stream) == seqs and seen(stream) == seqs
    assert seen(stream, ", 2") == seqs[:2]
    assert seen(stream, ", 2, newest => true") == seqs[-2:]
    assert seen(stream, f", place => '{seqs[3]}'") == seqs[3:]
    assert seen(stream, ", place => 'latest'") == [] and seen(stream, ", place => '-1h'") == seqs
    (row,) = stream.all("select * from cdcbridge.read_stream('s', 1)")
    stream.value("select cdcbridge.commit_offset('s', %s, %s)", row["partition"], row["seq"])
    assert seen(stream) == [seq for seq in seqs if seq != row["seq"]], "from the group's offset on, in each partition"
    assert list(row) == list(stream.all("select * from cdcbridge.peek_stream('s', 1)")[0])


def test_a_look_at_a_stream_stops_before_what_can_still_commit(stream: StoreQueue) -> None:
    hung = stream.open(autocommit=False)
    first = publish(stream, session=hung)
    second = publish(stream)
    assert seen(stream) == [] and seen(stream, ", newest => true") == []
    hung.commit()
    assert seen(stream) == [first, second]


def test_the_wrong_mode_names_the_right_functions(stream: StoreQueue) -> None:
    stream.declare("c")
    for call, hint in (
        ("receive('s')", "read_stream()"), ("peek('s')", "`cdcbridge read`"), ("ack('s', '{}')", "Stream.connect()"),
        ("read_stream('c')", "receive()"), ("seek('c', 'latest')", "`cdcbridge receive`"), ("peek_stream('c')", "Queue.connect()"),
    ):  # fmt: skip
        with pytest.raises(psycopg.DatabaseError) as refused:
            stream.value(f"select cdcbridge.{call}")
        assert refused.value.sqlstate == "CB002" and hint in str(refused.value.diag.message_hint), call


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_failed_delivery_tells_what_became_of_it(queue: StoreQueue, mode: str) -> None:
    queue.declare(mode=mode, tables=(), topics=("t",), max_deliveries=2, retry_delay={"initial": "90s", "max": "90s"})
    seq = publish(queue, "a")

    def fail() -> list[dict[str, Any]]:
        (row,) = queue.receive()
        return queue.all("select * from cdcbridge.nack_failed('c', %s, 'ValueError: no')", row["receipt"])

    (first,) = fail()
    assert 88 < first.pop("again_in") <= 90
    assert first == {"deliver_count": 1, "max_deliveries": 2, "dead_id": None}
    queue.due()
    (last,) = fail()
    assert last == {"deliver_count": 2, "max_deliveries": 2, "again_in": None, "dead_id": 1}
    assert queue.value("select seq from cdcbridge.dead_messages where id = 1") == seq
    publish(queue, "b")
    (row,) = queue.receive()
    queue.ack(*receipts([row]))
    assert queue.all("select * from cdcbridge.nack_failed('c', %s, 'x')", row["receipt"]) == [], (
        "it was not ours any more"
    )
