"""Times, keys, claims and histories at their limits: refused where they are given, or handled in linear time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts, seqs

TOO_LONG = ["31 days", "3000000 days"]


def refused(queue: StoreQueue, query: str, *args: Any) -> str:
    with pytest.raises(psycopg.Error) as raised:
        queue.all(query, *args)
    assert raised.value.sqlstate == "CB004", raised.value
    return str(raised.value.diag.message_primary)


@pytest.mark.parametrize("span", TOO_LONG)
def test_nothing_is_put_off_for_longer_than_max_retention(queue: StoreQueue, span: str) -> None:
    queue.declare()
    queue.declare("s", mode="stream", topics=("news",))
    queue.append(3)
    (row,) = queue.receive(1)
    receipt = [row["receipt"]]
    limit = "but must be at most 30 days"
    assert limit in refused(queue, "select * from cdcbridge.receive('c', 1, %s::interval)", span)
    assert limit in refused(queue, "select cdcbridge.extend('c', %s, %s::interval)", receipt, span)
    assert limit in refused(queue, "select cdcbridge.nack('c', %s, %s::interval)", receipt, span)
    assert limit in refused(queue, "select * from cdcbridge.read_stream('s', 10, %s::interval)", span)
    assert limit in refused(queue, "select cdcbridge.publish('news', 'k', '1', now() + %s::interval)", span)
    queue.session.execute("select cdcbridge_internal.set_max_retention('1 day')")
    assert "at most 1 day" in refused(queue, "select cdcbridge.extend('c', %s, '25 hours')", receipt)
    assert queue.extend("24 hours", *receipt) == 1
    assert queue.nack(*receipt, delay="23:59:00") == 1
    assert len(queue.receive(1, "23:59:00")) == 1
    assert queue.receive(1, "0")[0]["deliver_count"] == 1


@pytest.mark.parametrize("at", ["infinity", "-infinity"])
def test_a_message_is_never_delivered_at_infinity(queue: StoreQueue, at: str) -> None:
    queue.declare(topics=("news",))
    assert at in refused(queue, "select cdcbridge.publish('news', 'k', '1', %s::timestamptz)", at)
    assert queue.value("select count(*) from cdcbridge.messages") == 0
    queue.all("select cdcbridge.publish('news', 'k', '1', '2001-01-01Z')")
    assert len(queue.receive()) == 1, "a time that has passed is now"


def test_a_wait_of_before_the_limit_does_not_stop_pollers(queue: StoreQueue) -> None:
    queue.declare(topics=("news",))
    queue.all("select cdcbridge.publish('news', 'k', '1', now() + interval '1 day')")
    queue.session.execute("update cdcbridge_internal.delayed set visible_at = 'infinity'")
    assert queue.value("select cdcbridge.next_visible('c')") == pytest.approx(86400, abs=60)


@pytest.mark.parametrize("queue", ["pg18"], indirect=True)  # PostgreSQL 17 brought infinite intervals
def test_infinite_intervals(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(1)
    receipt = receipts(queue.receive())
    assert "infinity" in refused(queue, "select * from cdcbridge.receive('c', 1, 'infinity'::interval)")
    assert "infinity" in refused(queue, "select cdcbridge.extend('c', %s, 'infinity'::interval)", receipt)
    assert "infinity" in refused(queue, "select cdcbridge.nack('c', %s, 'infinity'::interval)", receipt)
    refused(queue, "select cdcbridge.extend('c', %s, '-infinity'::interval)", receipt)


def incompressible(number: int, length: int) -> str:
    return "".join(f"{(n * 2654435761 + number * 97) % 16**8:08x}" for n in range(length // 8))


@pytest.mark.parametrize("mode", ["queue", "fifo"])
@pytest.mark.parametrize("length", [2704, 10_000, 300_000])
def test_keys_of_any_length_are_given_back_with_their_neighbours(queue: StoreQueue, mode: str, length: int) -> None:
    queue.declare(mode=mode, topics=("news",), max_deliveries=3)
    long = incompressible(1, length)
    almost = long[:-1] + "x"
    put = [queue.value("select cdcbridge.publish('news', %s, '1')", key) for key in (long, "k", almost, long)]
    batch = queue.receive(10)
    assert [row["key"] for row in batch] == [long, "k", almost, long]
    assert queue.nack(*receipts(batch[:3]), delay="0") == 3
    again = queue.receive(10)
    assert sorted(seqs(again)) == (put if mode == "fifo" else put[:3])
    if mode == "fifo":
        first = next(row for row in again if row["seq"] == put[0])
        assert queue.nack(first["receipt"], delay="1 hour") == 1
        assert put[3] not in seqs(queue.receive(10)), "its key waits with it"
    queue.expire()
    assert queue.receive(10)
    assert queue.value("select count(*) from cdcbridge.message_key_seqs") == (3 if mode == "fifo" else 0)


def test_long_keys_of_the_consumers_own(queue: StoreQueue) -> None:
    queue.declare(mode="fifo", topics=("news",), key=("name",))
    long = incompressible(2, 20_000)
    for _ in range(2):
        queue.all("select cdcbridge.publish('news', 'k', %s::json)", json.dumps({"name": long}))
    batch = queue.receive(1)
    assert batch[0]["key"] == long
    assert queue.nack(batch[0]["receipt"], delay="1 hour") == 1
    assert queue.receive() == []
    queue.due()
    assert len(queue.receive()) == 2


def test_dedup_ids_are_found_by_an_index_and_so_have_a_length(queue: StoreQueue) -> None:
    queue.declare(topics=("news",))
    query = "select cdcbridge.publish(%s, 'k', '1', null, %s)"
    assert "has 1025 bytes" in refused(queue, query, "news", "x" * 1025)
    assert "has 1026 bytes" in refused(queue, query, "news", "ä" * 513)
    assert "dedup_id is empty" in refused(queue, query, "news", "")
    assert "has 1025 bytes" in refused(queue, query, "n" * 1025, "x")
    topic, dedup_id = incompressible(3, 1024), incompressible(4, 1024)
    assert queue.value(query, topic, dedup_id) == queue.value(query, topic, dedup_id)
    assert queue.value(query, "news", "x") != queue.value(query, "news", None)


def processor_time(queue: StoreQueue) -> float:
    """Seconds of the session's server process: what else the machine does is not in it."""
    return int(Path(f"/proc/{queue.session.info.backend_pid}/schedstat").read_text().split()[0]) / 1e9


def settled_in_parts(queue: StoreQueue, mode: str, size: int, statistics: str) -> dict[str, float]:
    """The processor time of each step of a claim that is settled in parts.

    The statistics of the tables are those of a moment: "never" analyzed, "empty", with "one" message given back, or with those
    of "another" consumer.
    """
    name = f"{mode}{size}"
    for table in ("delayed", "leases", "settled", "redriven"):
        queue.session.execute(f"alter table cdcbridge_internal.{table} set (autovacuum_enabled = false)")
    consumer = queue.declare(name, mode=mode, max_in_flight=100_000)
    if statistics == "empty":
        analyze(queue)
    if statistics == "another":
        another = queue.declare("another", mode=mode, max_in_flight=100_000)
        queue.append_keys(*map(str, range(size)), consumers=(another,))
        given_back = receipts(queue.receive(size, "1 hour", name="another"))[: size // 2]
        assert queue.value("select cdcbridge.nack('another', %s, '0')", given_back) == size // 2
        analyze(queue)
    queue.append_keys(*map(str, range(size)), consumers=(consumer,))
    given = receipts(queue.receive(size, "1 hour", name=name))
    half = size // 2
    steps: dict[str, float] = {}

    def timed(step: str, count: int, query: str, *args: Any) -> None:
        before = processor_time(queue)
        assert queue.value(query, name, *args) == count, step
        steps[step] = processor_time(queue) - before

    timed("ack", half, "select cdcbridge.ack(%s, %s)", given[:half])
    assert queue.value("select cdcbridge.nack(%s, %s, '0')", name, given[-1:]) == 1
    if statistics == "one":
        analyze(queue)
    timed("nack", half - 100, "select cdcbridge.nack(%s, %s, '0')", given[half:-100])
    receive = "select count(*) from cdcbridge.receive(%s, %s, '1 hour')"
    timed("receive what was given back", half - 99, receive, size)
    queue.expire()
    timed("receive what expired", half, receive, size)
    held = queue.all(
        "select u.seq || '-' || l.claim_id as receipt from cdcbridge_internal.leases l cross join lateral unnest(l.seqs) as u (seq)"
        " where l.consumer_id = %s and l.not_visible_until > now()",
        consumer,
    )
    timed("dead", half, "select cdcbridge.nack(%s, %s, dead => true)", [row["receipt"] for row in held])
    timed("redrive", half, "select cdcbridge.redrive(%s)")
    timed("receive what was redriven", half, receive, size)
    return steps


def analyze(queue: StoreQueue) -> None:
    for table in ("delayed", "leases", "settled", "redriven"):
        queue.session.execute(f"analyze cdcbridge_internal.{table}")
    queue.session.execute("analyze cdcbridge.dead_messages")


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_settling_a_part_of_a_large_claim_is_linear(queue: StoreQueue, mode: str) -> None:
    small = settled_in_parts(queue, mode, 4_000, "never")
    large = settled_in_parts(queue, mode, 32_000, "never")
    for step, one in small.items():
        assert large[step] < 24 * max(one, 0.02), f"{step}: {large[step]} s for 32,000, {one} s for 4,000"


@pytest.mark.parametrize("statistics", ["empty", "one", "another"])
@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_no_plan_is_good_for_a_few_messages_only(queue: StoreQueue, mode: str, statistics: str) -> None:
    for step, seconds in settled_in_parts(queue, mode, 16_000, statistics).items():
        assert seconds < 3, (
            f"{step}: {seconds} s for 8,000 messages; over all pairs it takes 2 to 50 s more than the usual 0.5 s"
        )


def test_what_waits_for_a_time_costs_the_claims_of_others_nothing(queue: StoreQueue) -> None:
    """A claim in order does not walk along the messages that were given back for later, to see if a barrier is among them."""
    consumer = queue.declare(mode="fifo", max_in_flight=100_000)
    queue.append_keys(*map(str, range(20_000)), consumers=(consumer,))
    given = receipts(queue.receive(20_000, "1 hour"))
    assert queue.value("select cdcbridge.nack('c', %s, '1 hour')", given) == 20_000
    queue.append_keys(*(f"new {n}" for n in range(200)), consumers=(consumer,))
    before = processor_time(queue)
    for _ in range(200):
        assert len(queue.receive(1)) == 1
    seconds = processor_time(queue) - before
    assert seconds < 1, f"{seconds} s for 200 claims beside 20,000 that wait; a walk for each takes 0.6 s more"


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_acking_a_part_of_a_large_claim_is_linear_above_read_committed(queue: StoreQueue, level: str) -> None:
    queue.declare(max_in_flight=100_000, visibility_timeout="10m")
    took = []
    for count in (1_000, 8_000):
        queue.append(count)
        given = receipts(queue.receive(count))[::2]
        session = queue.open(autocommit=False)
        session.execute(f"set transaction isolation level {level}".encode())
        start = time.monotonic()
        assert queue.ack(*given, session=session) == count // 2
        took.append(time.monotonic() - start)
        session.commit()
    assert took[1] < 24 * max(took[0], 0.1), took


def test_a_history_keeps_the_first_and_the_last_and_counts_the_others(queue: StoreQueue) -> None:
    queue.declare(max_deliveries=1000, retry_delay={"initial": "0s"})
    queue.append(1)
    for n in range(1, 25):
        queue.nack(queue.receive()[0]["receipt"], delay="0", reason=f"{n} " + "x" * (n == 1) * 3000)
    queue.receive()
    queue.expire()
    for n in range(26, 101):
        queue.nack(queue.receive()[0]["receipt"], delay="0", reason=f"{n} ", dead=n == 100)
    (dead,) = queue.all("select history, reason, deliver_count from cdcbridge.dead_messages")
    history = dead["history"]
    assert [line.get("deliver_count") for line in history] == [1, 2, 3, 4, 5, None, *range(81, 101)]
    assert history[5] == {"left_out": 75}
    assert len(history[0]["reason"]) == 2003
    assert (dead["deliver_count"], dead["reason"]) == (100, "nacked: 100 ")


def test_a_long_history_of_an_earlier_version_is_shortened(queue: StoreQueue) -> None:
    lines = "(select jsonb_agg(jsonb_build_object('deliver_count', n)) from generate_series(1, 60) n)"
    row = f"(null, null, null, 1, null, false, 61, {lines}, now(), now(), now(), 1, 0)::cdcbridge_internal.delivery"
    queue.session.execute("set search_path = cdcbridge, cdcbridge_internal")
    history = queue.value(f"select (with_note(with_note({row}, now(), 'a'), now(), 'b')).history")
    assert history[5] == {"left_out": 37}
    assert len(history) == 26
    assert [line["reason"] for line in history[-2:]] == ["a", "b"]
    assert [line["deliver_count"] for line in history[:5] + history[6:24]] == [1, 2, 3, 4, 5, *range(43, 61)]
