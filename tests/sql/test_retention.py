"""Segments of the log go whole, when nobody needs them, and never stop the others for long."""

from __future__ import annotations

import threading
import time

import pytest

from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts, seqs


def fill_segments(queue: StoreQueue) -> list[int]:
    """Three messages in the first segment, three in the next, the log's end in the third."""
    put = queue.append_keys("a", "b", "c", consumers=(1,))
    for start in (1_000_000, 2_000_000):
        queue.session.execute("select setval('cdcbridge.messages_seq', %s)", (start,))
        queue.session.execute("select cdcbridge_internal.create_segments()")
        put += queue.append_keys("a", "b", "c", consumers=(1,))
    return put


def drop(queue: StoreQueue, retention: str = "0") -> tuple[int, str | None]:
    return tuple(
        queue.all("select dropped, held_by from cdcbridge_internal.drop_segments(%s::interval)", retention)[0].values()
    )


def segments(queue: StoreQueue) -> int:
    return int(queue.value("select count(*) from pg_inherits where inhparent = 'cdcbridge.messages'::regclass"))


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_segment_stays_while_a_message_of_it_is_unfinished(queue: StoreQueue, mode: str) -> None:
    queue.declare(mode=mode)
    put = fill_segments(queue)
    assert drop(queue, "1 hour") == (0, None), "too young"
    assert drop(queue) == (0, "c"), "waiting"
    first = queue.receive(3)
    assert drop(queue) == (0, "c"), "in flight"
    queue.ack(*receipts(first[1:]))
    queue.nack(first[0]["receipt"], delay="1 hour")
    assert drop(queue) == (0, "c"), "given back"
    queue.due()
    queue.nack(queue.receive(1)[0]["receipt"], dead=True)
    assert drop(queue) == (1, "c"), "the first is gone, the second has messages that wait"
    assert queue.value("select cdcbridge.redrive('c')") == 1
    rest = queue.receive()
    assert seqs(rest) == [*put[3:], put[0]], "what is redriven carries its data"
    assert rest[-1]["data"]["op"] == "insert"
    queue.ack(*receipts(rest[:-1]))
    assert drop(queue) == (1, None)
    assert queue.ack(rest[-1]["receipt"]) == 1
    assert segments(queue) == 2, "the one that the log is in, and the one made ahead"


def test_nothing_that_can_still_commit_is_dropped(queue: StoreQueue) -> None:
    session = queue.open(autocommit=False)
    queue.value("select cdcbridge.publish('t', null, '1')", session=session)
    queue.session.execute("select setval('cdcbridge.messages_seq', 1000000)")
    queue.session.execute("select cdcbridge_internal.create_segments()")
    assert drop(queue) == (0, None)
    session.commit()
    assert drop(queue) == (1, None)


def test_a_receiver_in_its_transaction_delays_the_drop_and_nobody_else(queue: StoreQueue) -> None:
    queue.declare()
    fill_segments(queue)
    queue.ack(*receipts(queue.receive(3)))
    session = queue.open(autocommit=False)
    assert len(queue.receive(1, session=session)) == 1
    longest = 0.0
    finished = threading.Event()

    def append() -> None:
        nonlocal longest
        while not finished.is_set():
            start = time.monotonic()
            queue.append_keys("x", consumers=(1,))
            longest = max(longest, time.monotonic() - start)

    thread = threading.Thread(target=append)
    thread.start()
    dropper = queue.open()
    for _ in range(10):
        queue.all("select * from cdcbridge_internal.drop_segments('0')", session=dropper)
    assert segments(queue) == 4
    finished.set()
    thread.join()
    assert longest < 1, "an append waits for the lock's timeout at most"
    session.commit()
    assert drop(queue)[0] == 1


def test_claims_go_on_while_segments_are_dropped(queue: StoreQueue) -> None:
    queue.declare()
    fill_segments(queue)
    queue.ack(*receipts(queue.receive(3)))
    dropper = queue.open()
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            queue.all("select * from cdcbridge_internal.drop_segments('0')", session=dropper)

    thread = threading.Thread(target=work)
    thread.start()
    while batch := queue.receive(1):
        queue.ack(*receipts(batch))
    done.set()
    thread.join()
    drop(queue)
    assert segments(queue) == 2


@pytest.mark.parametrize("mode", ["queue", "fifo"])
@pytest.mark.parametrize("appended", [3, 300])
def test_past_max_retention_unfinished_messages_become_dead_letters_with_their_data(
    queue: StoreQueue, mode: str, appended: int
) -> None:
    queue.declare(mode=mode, visibility_timeout="1h")
    put = queue.append_keys(*[f"k{n % 50}" for n in range(appended)])
    late, flying, expired, *_ = queue.receive(3)
    queue.nack(late["receipt"], delay="1 hour", reason="not now")
    for start in (1_000_000, 2_000_000):
        queue.session.execute("select setval('cdcbridge.messages_seq', %s)", (start,))
        queue.session.execute("select cdcbridge_internal.create_segments()")
    young = queue.append_keys("k0", "k1")
    queue.extend("0", expired["receipt"])
    query = "select dropped, held_by, lost, expired from cdcbridge_internal.drop_segments('0', %s::interval)"
    assert queue.all(query, "1 hour") == [{"dropped": 0, "held_by": "c", "lost": 0, "expired": 0}], "too young"
    assert queue.all(query, "0") == [{"dropped": 0, "held_by": "c", "lost": 0, "expired": appended - 1}], (
        "one is in flight"
    )
    assert queue.ack(flying["receipt"]) == 1
    assert queue.all(query, "0") == [{"dropped": 2, "held_by": None, "lost": 0, "expired": 0}]
    dead = queue.all("select * from cdcbridge.dead_messages order by seq")
    assert [row["seq"] for row in dead] == sorted(set(put) - {flying["seq"]})
    assert {row["reason"] for row in dead} == {"expired: older than store.max_retention"}
    assert dead[0]["data"]["record"]["secret"] == "s" and dead[0]["key"] == "k0"
    assert seqs(queue.receive()) == young
    assert queue.value("select count(*) from cdcbridge.consumer_messages") == len(young)


def test_a_message_with_data_of_its_own_expires_with_it(queue: StoreQueue) -> None:
    queue.declare(tables=("public.t",), filter="record.id == 1", on_leave="delete")
    put = queue.append_keys("a", "b", "c")
    left = '{"op":"delete","record":{"id":0},"old":null,"unchanged":[]}'
    for seq in put:
        queue.session.execute("select cdcbridge_internal.keep_own('{1}', %s, '{k}', %s)", ([seq], [left]))
    late, _, _ = queue.receive(3)
    assert late["data"]["op"] == "delete"
    queue.nack(late["receipt"], delay="1 hour")
    queue.expire()
    queue.session.execute("select setval('cdcbridge.messages_seq', 1000000)")
    queue.session.execute("select cdcbridge_internal.create_segments()")
    assert queue.value("select expired from cdcbridge_internal.drop_segments('0', '0')") == 3
    assert queue.all("select data ->> 'op' as op from cdcbridge.dead_messages") == [{"op": "delete"}] * 3
    assert queue.value("select count(*) from cdcbridge_internal.redriven") == 0


def test_a_row_of_fan_out_that_reaches_over_the_segments_end_is_cut(queue: StoreQueue) -> None:
    queue.declare()
    queue.session.execute("select setval('cdcbridge.messages_seq', 999800)")
    put = queue.append(400)
    assert queue.value("select expired from cdcbridge_internal.drop_segments('0', '0')") == 199
    queue.session.execute(
        "select setval('cdcbridge.messages_seq', 2000000); select cdcbridge_internal.create_segments()"
    )
    left = []
    while batch := queue.receive(100):
        left += seqs(batch)
        queue.ack(*receipts(batch))
    assert left == [seq for seq in put if seq >= 1_000_000]


def test_the_log_is_kept_within_its_bytes(queue: StoreQueue) -> None:
    queue.declare()
    fill_segments(queue)
    queue.ack(*receipts(queue.receive(9)))
    size = queue.value("select sum(pg_total_relation_size(inhrelid))::bigint from pg_inherits"
                       " where inhparent = 'cdcbridge.messages'::regclass")  # fmt: skip
    query = "select dropped from cdcbridge_internal.drop_segments('1 day', '30 days', %s)"
    assert queue.value(query, size) == 0
    assert queue.value(query, size - 1) == 1
    assert queue.value(query, 1) == 1
    assert segments(queue) == 2


def test_what_is_too_old_dies_although_an_open_transaction_prevents_the_drop(queue: StoreQueue) -> None:
    queue.declare()
    fill_segments(queue)
    session = queue.open(autocommit=False)
    session.execute("select count(*) from cdcbridge.messages")
    query = "select dropped, held_by, expired from cdcbridge_internal.drop_segments('0', '0')"
    assert queue.all(query) == [{"dropped": 0, "held_by": None, "expired": 6}]
    assert queue.value("select count(*) from cdcbridge.dead_messages") == 6
    session.commit()
    assert queue.all(query) == [{"dropped": 2, "held_by": None, "expired": 0}]
