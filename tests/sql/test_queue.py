"""receive, ack, nack, extend, redrive: what each promises, and what each refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.sql.queue import StoreQueue


def receipts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["receipt"] for row in rows]


def seqs(rows: list[dict[str, Any]]) -> list[int]:
    return [row["seq"] for row in rows]


@pytest.mark.parametrize("size", [10, 500])
def test_messages_come_once_in_log_order_and_in_full_batches(queue: StoreQueue, size: int) -> None:
    queue.declare()
    put = queue.append(size)
    got: list[int] = []
    while batch := queue.receive(7):
        got += seqs(batch)
        assert len(batch) == 7 or len(got) == size
        assert queue.ack(*receipts(batch)) == len(batch)
    assert got == put
    assert queue.states() == {"pending": 0, "in_flight": 0, "dead": 0}
    assert queue.value("select count(*) from cdcbridge.consumer_messages") == 0


def test_receive_has_the_columns_that_it_promises(queue: StoreQueue) -> None:
    queue.declare(columns={"exclude": ["secret"]})
    queue.append(1)
    (row,) = queue.receive()
    assert list(row) == [
        "receipt", "seq", "topic", "key", "data", "deliver_count", "not_visible_until", "commit_lsn", "ordinal",
        "commit_time", "inserted_at",
    ]  # fmt: skip
    assert row["data"] == {"op": "insert", "record": {"id": 0}, "old": None, "unchanged": []}
    assert (row["topic"], row["key"], row["deliver_count"], row["ordinal"]) == ("public.t", "0", 1, 0)


@pytest.mark.parametrize(
    ("before", "durable", "commits"),
    [(None, "true", "on"), (None, "false", "off"), ("create table public.mine ()", "false", "on")],
)
def test_a_claim_commits_asynchronously_where_that_is_asked_and_nothing_else_is_lost(
    queue: StoreQueue, before: str | None, durable: str, commits: str
) -> None:
    queue.declare()
    queue.append(2)
    session = queue.open()
    session.execute("set synchronous_commit = on")
    setting = "select current_setting('synchronous_commit')"
    with session.transaction():
        if before:
            session.execute(before.encode())
        assert len(queue.all(f"select * from cdcbridge.receive('c', 1, durable => {durable})", session=session)) == 1
        assert queue.value(setting, session=session) == commits
    assert queue.value(setting, session=session) == "on", "for this transaction alone"


def test_consumer_messages_tells_the_truth_at_each_step(queue: StoreQueue) -> None:
    consumer = queue.declare()
    queue.append(200)
    view = "select count(*) n, count(distinct seq) seqs, min(key::int) k, max(deliver_count) d"
    rows = f"{view} from cdcbridge.consumer_messages where consumer_id = {consumer}"
    assert list(queue.all(rows)[0].values()) == [200, 200, 0, 0]
    first = queue.receive(10)
    assert list(queue.all(rows)[0].values()) == [200, 200, 0, 1]
    queue.nack(first[0]["receipt"])
    queue.ack(*receipts(first[1:]))
    assert list(queue.all(rows)[0].values()) == [191, 191, 0, 1]
    assert queue.value("select not_visible_until > now() from cdcbridge.consumer_messages where seq = 1") is True


def test_a_receiver_that_stays_in_its_transaction_does_not_stop_others(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(10)
    one, two = queue.open(autocommit=False), queue.open()
    first = queue.receive(5, session=one)
    second = queue.receive(5, session=two)
    assert len(first) == len(second) == 5
    assert not set(seqs(first)) & set(seqs(second))
    one.rollback()
    assert seqs(queue.receive(10)) == seqs(first)


def test_many_receivers_get_each_message_once_and_never_more_than_max_in_flight(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=40)
    put = queue.append(800)
    got: list[int] = []
    worst: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        session = queue.open()
        idle = 0
        while idle < 50:
            batch = queue.receive(7, session=session)
            idle = 0 if batch else idle + 1
            count = queue.value("select in_flight from cdcbridge.consumer_lag()", session=session)
            with lock:
                got.extend(seqs(batch))
                worst.append(count)
            if batch:
                queue.ack(*receipts(batch), session=session)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == put
    assert max(worst) <= 40


def test_max_in_flight_holds_for_one_receiver_and_frees_with_each_ack(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=3)
    queue.append(10)
    batch = queue.receive(10)
    assert len(batch) == 3
    assert queue.receive(10) == []
    queue.ack(batch[0]["receipt"])
    assert len(queue.receive(10)) == 1


def test_a_receipt_is_good_for_one_delivery(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(1)
    (old,) = queue.receive()
    queue.expire()
    assert queue.ack(old["receipt"]) == 0, "expired"
    assert queue.extend("1 min", old["receipt"]) == 0
    assert queue.nack(old["receipt"]) == 0
    (new,) = queue.receive()
    assert new["deliver_count"] == 2
    assert new["receipt"] != old["receipt"]
    assert queue.ack(old["receipt"]) == 0, "redelivered"
    assert queue.ack(new["receipt"], new["receipt"]) == 1, "the same receipt twice counts once"
    assert queue.ack(new["receipt"]) == 0, "acked before"


def test_a_strict_ack_rolls_the_effect_back_with_it(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(2)
    batch = queue.receive()
    queue.session.execute("create table effect (v int)")
    assert queue.ack(batch[1]["receipt"]) == 1
    session = queue.open(autocommit=False)
    session.execute("insert into effect values (1)")
    with pytest.raises(psycopg.errors.DatabaseError, match="stale receipt for consumer 'c': 2-") as raised:
        queue.ack(*receipts(batch), strict=True, session=session)
    assert raised.value.sqlstate == "CB006"
    session.rollback()
    assert queue.value("select count(*) from effect") == 0
    assert queue.states()["in_flight"] == 1, "the valid one is in flight as before"


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 1, 2]])
@pytest.mark.parametrize("end", ["ack", "nack", "dead"])
def test_a_claim_of_which_a_part_was_extended_ends_as_a_whole(queue: StoreQueue, order: list[int], end: str) -> None:
    queue.declare(max_in_flight=400)
    put = queue.append(4)
    batch = queue.receive()
    assert queue.extend("1 hour", batch[0]["receipt"], batch[2]["receipt"]) == 2
    given = [batch[n]["receipt"] for n in order]
    done = queue.ack(*given) if end == "ack" else queue.nack(*given, delay="0", dead=end == "dead")
    assert done == 4
    assert queue.value("select count(*) from cdcbridge_internal.leases") == 0
    assert queue.value("select count(*) from cdcbridge_internal.settled") == 0
    assert queue.states() == {"pending": 4 * (end == "nack"), "in_flight": 0, "dead": 4 * (end == "dead")}
    assert sorted(seqs(queue.receive())) == (put if end == "nack" else [])


def test_extend_counts_from_now_and_zero_gives_back(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(1)
    (row,) = queue.receive(1, "1 s")
    assert queue.extend("1 hour", row["receipt"]) == 1
    assert queue.value("select not_visible_until > now() + interval '59 min' from cdcbridge_internal.leases") is True
    assert queue.extend("0", row["receipt"]) == 1
    assert queue.receive()[0]["deliver_count"] == 2


def test_a_zero_visibility_timeout_makes_it_visible_at_once(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(1)
    queue.receive(1, "0")
    assert queue.receive()[0]["deliver_count"] == 2


def test_a_zero_visibility_timeout_delivers_once_a_call(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=10)
    queue.append(1)
    assert [row["deliver_count"] for row in queue.receive(10, "0")] == [1]
    assert [row["deliver_count"] for row in queue.receive(10, "0")] == [2]


def test_many_receivers_may_stay_in_their_transactions(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(40)
    sessions = [queue.open(autocommit=False) for _ in range(40)]
    assert [len(queue.receive(1, session=session)) for session in sessions] == [1] * 40
    for session in sessions:
        session.rollback()


def test_nack_delays_by_the_consumers_back_off(queue: StoreQueue) -> None:
    queue.declare(retry_delay={"initial": "2s", "factor": 3, "max": "10s"}, max_deliveries=9)
    queue.append(1)
    delays = []
    for _ in range(4):
        (row,) = queue.receive()
        assert queue.nack(row["receipt"], reason="later") == 1
        assert queue.receive() == []
        seconds = "select extract(epoch from visible_at - clock_timestamp())::float8 from cdcbridge_internal.delayed"
        delays.append(round(queue.value(seconds)))
        queue.due()
    assert delays == [2, 6, 10, 10]


def test_a_back_off_never_overflows(queue: StoreQueue) -> None:
    config = '{"retry_delay": {"initial": 1e6, "factor": 100, "max": 600}}'
    assert queue.value("select extract(epoch from cdcbridge_internal.retry_delay(%s, 10000))::int", config) == 600
    config = '{"retry_delay": {"initial": 0, "factor": 1, "max": 0}}'
    assert queue.value("select extract(epoch from cdcbridge_internal.retry_delay(%s, 10000))::int", config) == 0


def test_nack_with_a_delay_of_zero_comes_first_again(queue: StoreQueue) -> None:
    queue.declare()
    put = queue.append(3)
    (row,) = queue.receive(1)
    queue.nack(row["receipt"], delay="0")
    assert seqs(queue.receive()) == put


def test_the_nack_of_the_last_delivery_kills_at_once_with_history(queue: StoreQueue) -> None:
    queue.declare(max_deliveries=2)
    queue.append(1)
    queue.nack(queue.receive()[0]["receipt"], delay="0", reason="first")
    assert queue.nack(queue.receive()[0]["receipt"], delay="0", reason="second") == 1
    (dead,) = queue.all("select * from cdcbridge.dead_messages")
    assert dead["reason"] == "max_deliveries: nacked after delivery 2 of 2: second"
    assert [(h["deliver_count"], h["reason"]) for h in dead["history"]] == [(1, "first"), (2, "second")]
    assert (dead["seq"], dead["deliver_count"], dead["data"]["op"], dead["ordinal"]) == (1, 2, "insert", 0)
    assert queue.states() == {"pending": 0, "in_flight": 0, "dead": 1}


def test_an_expired_last_delivery_dies_at_the_next_receive_or_by_the_bridge(queue: StoreQueue) -> None:
    queue.declare(max_deliveries=1)
    queue.append(2)
    queue.receive(1)
    queue.expire()
    assert seqs(queue.receive(1)) == [2]
    queue.expire()
    assert queue.value("select cdcbridge_internal.bury_expired()") == 1
    assert [r["reason"][:15] for r in queue.all("select reason from cdcbridge.dead_messages")] == [
        "max_deliveries:"
    ] * 2


def test_nack_dead_kills_at_once(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(1)
    assert queue.nack(queue.receive()[0]["receipt"], dead=True, reason="poison") == 1
    assert queue.value("select reason from cdcbridge.dead_messages") == "nacked: poison"


def test_redriven_messages_come_after_what_waits_with_a_fresh_count_and_their_origin(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(3)
    for row in queue.receive(2):
        queue.nack(row["receipt"], dead=True)
    late = queue.append(1)
    assert queue.value("select cdcbridge.redrive('c')") == 2
    latest = queue.append(1)
    got = queue.receive()
    assert seqs(got) == [3, *late, 1, 2, *latest]
    assert {row["deliver_count"] for row in got} == {1}
    assert [row["key"] for row in got] == ["2", "0", "0", "1", "0"]
    assert queue.value("select count(*) from cdcbridge.messages") == 5, "not logged again"
    assert queue.ack(*receipts(got)) == 5
    assert queue.value("select count(*) from cdcbridge_internal.redriven") == 0


def test_a_redriven_message_works_after_its_segment_is_gone(queue: StoreQueue) -> None:
    queue.declare(max_deliveries=1)
    queue.append(1)
    queue.nack(queue.receive()[0]["receipt"])
    queue.session.execute("truncate cdcbridge.messages")
    assert queue.value("select cdcbridge.redrive('c')") == 1
    (row,) = queue.receive()
    assert (row["topic"], row["data"]["op"], row["ordinal"]) == ("public.t", "insert", 0)
    queue.nack(row["receipt"])
    assert queue.value("select data ->> 'op' from cdcbridge.dead_messages") == "insert"


def test_redrive_and_purge_take_some_or_all_and_know_a_wrong_id(queue: StoreQueue) -> None:
    queue.declare()
    queue.append(3)
    for row in queue.receive():
        queue.nack(row["receipt"], dead=True)
    ids = [row["id"] for row in queue.all("select id from cdcbridge.dead_messages order by id")]
    assert queue.value("select cdcbridge.redrive('c', %s)", ids[:1]) == 1
    assert queue.value("select cdcbridge.purge('c', %s)", ids[1:2]) == 1
    for function in ("redrive", "purge"):
        with pytest.raises(psycopg.errors.DatabaseError, match="no dead letter 99999") as raised:
            queue.value(f"select cdcbridge.{function}('c', %s)", [99999])
        assert raised.value.sqlstate == "CB007"
    assert queue.value("select cdcbridge.purge('c')") == 1


def test_pause_stops_receive_with_a_notice_and_not_the_fan_out(queue: StoreQueue) -> None:
    queue.declare()
    queue.session.execute("update cdcbridge.consumers set paused = true")
    notices: list[str] = []
    queue.session.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    queue.append(2)
    assert queue.receive() == []
    assert notices == ["consumer 'c' is paused"]
    assert queue.states()["pending"] == 2


def test_consumers_are_independent_and_one_is_dropped_at_once(queue: StoreQueue) -> None:
    one, two = queue.declare(), queue.declare("other")
    queue.append(5, one, two)
    queue.ack(*receipts(queue.receive(3)))
    assert len(queue.receive(10, name="other")) == 5
    queue.session.execute("select cdcbridge_internal.remove_consumer('other')")
    assert queue.value("select count(*) from cdcbridge.consumer_messages") == 2
    assert queue.value("select to_regclass('cdcbridge_internal.waiting_2') is null") is True


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_each_of_many_consumers_gets_its_own(queue: StoreQueue, mode: str) -> None:
    """Also those that came while sessions had others in use already, and when some have gone."""
    names = [f"c{n}" for n in range(9)]
    ids = {name: queue.declare(name, mode=mode) for name in names[:7]}
    for gone in ("c0", "c3", "c6"):
        queue.receive(name="c1")
        queue.session.execute("select cdcbridge_internal.remove_consumer(%s)", (gone,))
    ids |= {name: queue.declare(name, mode=mode) for name in names[7:]}
    left = [name for name in names if name not in ("c0", "c3", "c6")]
    put = {name: queue.append_keys("a", "b", consumers=(ids[name],)) for name in left}
    assert {name: seqs(queue.receive(name=name)) for name in left} == put
    for name in left:
        queue.session.execute("select cdcbridge_internal.remove_consumer(%s)", (name,))
    with pytest.raises(psycopg.Error, match="no consumer named 'c1'"):
        queue.receive(name="c1")


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_consumer_that_comes_while_a_transaction_is_open(queue: StoreQueue, mode: str) -> None:
    one = queue.declare("one", mode=mode)
    queue.append_keys("a", consumers=(one,))
    session = queue.open(autocommit=False)
    assert len(queue.receive(name="one", session=session)) == 1
    two = queue.declare("two", mode=mode)
    put = queue.append_keys("a", "b", consumers=(two,))
    assert seqs(queue.receive(name="two", session=session)) == put
    session.commit()


@pytest.mark.parametrize("count", [4, 6, 40])
def test_redriven_messages_come_whole_between_fresh_ones(queue: StoreQueue, count: int) -> None:
    """A receive that finds all in one walk along the log must not take them for what stands there."""
    queue.declare()
    first = queue.append(3)
    queue.nack(*receipts(queue.receive(3)), dead=True)
    queue.append(4)
    queue.value("select cdcbridge.redrive('c')")
    last = queue.append(4)
    order = [*range(first[-1] + 1, first[-1] + 5), *first, *last]
    got = queue.receive(count)
    assert seqs(got) == order[:count]
    assert all(row["data"]["record"] for row in got)
    assert queue.ack(*receipts(got)) == min(count, len(order))
    assert seqs(queue.receive(40)) == order[count:]


def test_a_row_of_a_claim_that_goes_leaves_the_marks_of_the_others(queue: StoreQueue) -> None:
    """One claim, two rows of leases: one message of the second is acked alone, then all of the first."""
    queue.declare()
    queue.append(1)
    queue.nack(*receipts(queue.receive()), delay="0")
    queue.append(3)
    again, first, *others = queue.receive(4)
    assert queue.ack(first["receipt"]) == 1
    assert queue.ack(again["receipt"]) == 1
    assert queue.states() == {"pending": 0, "in_flight": 2, "dead": 0}
    queue.expire()
    assert seqs(queue.receive()) == seqs(others)


def test_peek_takes_nothing(queue: StoreQueue) -> None:
    queue.declare()
    put = queue.append(100)
    (row,) = queue.receive(1)
    queue.nack(row["receipt"], delay="0")
    seen = queue.all("select * from cdcbridge.peek('c', 5)")
    assert seqs(seen) == put[:5]
    assert {row["receipt"] for row in seen} == {None}
    assert queue.states() == {"pending": 100, "in_flight": 0, "dead": 0}


CALLS: tuple[tuple[str, str, str], ...] = (
    ("select cdcbridge.receive('nobody')", "CB001", "no consumer named 'nobody'"),
    ("select cdcbridge.ack('nobody', '{}')", "CB001", "no consumer named 'nobody'"),
    ("select cdcbridge.nack('nobody', '{}')", "CB001", "no consumer named 'nobody'"),
    ("select cdcbridge.extend('nobody', '{}', '1 s')", "CB001", "no consumer named 'nobody'"),
    ("select cdcbridge.redrive('nobody')", "CB001", "no consumer named 'nobody'"),
    ("select cdcbridge.peek('nobody')", "CB001", "no consumer named 'nobody'"),
    ("select cdcbridge.receive(null)", "CB001", "no consumer named NULL"),
    ("select cdcbridge.ack('c', '{rubbish}')", "CB003", "'rubbish' is not a receipt"),
    ("select cdcbridge.ack('c', '{1-2-3}')", "CB003", "'1-2-3' is not a receipt"),
    ("select cdcbridge.nack('c', array[null])", "CB003", "NULL is not a receipt"),
    ("select cdcbridge.receive('c', 0)", "CB004", "max_messages is 0"),
    ("select cdcbridge.receive('c', 1, '-1 s')", "CB004", "visibility_timeout is -00:00:01"),
    ("select cdcbridge.nack('c', '{}', '-1 s')", "CB004", "delay is -00:00:01"),
    ("select cdcbridge.extend('c', '{}', null)", "CB004", "visibility_timeout is null"),
)


@pytest.mark.parametrize(("call", "state", "message"), CALLS)
def test_bad_input_has_a_sqlstate_and_names_the_value(queue: StoreQueue, call: str, state: str, message: str) -> None:
    queue.declare()
    with pytest.raises(psycopg.errors.DatabaseError, match=message) as raised:
        queue.all(call)
    assert raised.value.sqlstate == state


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_receive_refuses_an_isolation_level_where_it_cannot_be_safe(queue: StoreQueue, level: str) -> None:
    queue.declare()
    session = queue.open()
    session.execute(f"set default_transaction_isolation = '{level}'")
    with pytest.raises(psycopg.errors.DatabaseError, match=level.upper()) as raised:
        queue.receive(session=session)
    assert raised.value.sqlstate == "CB005"


RACES: dict[str, Callable[[StoreQueue, str, psycopg.Connection[Any]], int]] = {
    "ack": lambda queue, receipt, session: queue.ack(receipt, session=session),
    "nack": lambda queue, receipt, session: queue.value(
        "select cdcbridge.nack('c', %s, '1 hour')", [receipt], session=session
    ),
    "extend": lambda queue, receipt, session: queue.value(
        "select cdcbridge.extend('c', %s, '1 hour')", [receipt], session=session
    ),
}


@pytest.mark.parametrize("first", RACES)
@pytest.mark.parametrize("second", RACES)
def test_two_sessions_settle_one_delivery(queue: StoreQueue, first: str, second: str) -> None:
    """The second waits for the first; a message is never in two states, nor gone twice."""
    queue.declare()
    queue.append(1)
    (row,) = queue.receive()
    one, two = queue.open(autocommit=False), queue.open()
    assert RACES[first](queue, row["receipt"], one) == 1
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(RACES[second](queue, row["receipt"], two)))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "it waits for the first"
    one.commit()
    thread.join()
    assert result == [1 if first == "extend" else 0]
    assert sum(queue.states().values()) == (0 if "ack" in (first, second) and first != "nack" else 1)


def test_a_claim_is_never_a_sequential_scan_of_the_log(queue: StoreQueue) -> None:
    queue.declare()
    for _ in range(4):
        queue.append(5000)
    batch = queue.receive(10)
    session = queue.open(autocommit=False)
    queue.receive(100, session=session)
    queue.ack(*receipts(batch), session=session)
    scans = "select relname, seq_tup_read from pg_stat_xact_user_tables where seq_tup_read > 0"
    assert queue.all(scans, session=session) == []
