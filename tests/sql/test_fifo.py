"""Order by key: what a fifo consumer's receivers get, whatever they do to it."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from typing import Any

import psycopg
import pytest

from tests.harness.world import eventually
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts, seqs


def keys(rows: list[dict[str, Any]]) -> list[str]:
    return [row["key"] for row in rows]


@pytest.fixture(autouse=True)
def _fifo(queue: StoreQueue) -> None:
    queue.declare(mode="fifo")


def test_several_messages_of_a_key_go_out_in_one_batch_in_order(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "a", "c", "a")
    batch = queue.receive()
    assert seqs(batch) == put
    assert queue.receive() == []
    assert queue.ack(*receipts(batch)) == 5
    assert queue.value("select count(*) from cdcbridge.consumer_messages") == 0


def test_a_key_in_flight_holds_back_its_messages_and_no_others(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "a", "b", "a", "c", "b")
    (first,) = queue.receive(1)
    assert seqs(queue.receive(10)) == [put[2], put[4], put[5]]
    assert queue.receive() == []
    queue.ack(first["receipt"])
    assert seqs(queue.receive(10)) == [put[1], put[3]]


def test_a_key_is_free_when_all_of_it_is_acked_though_its_claim_holds_others(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "a")
    first = queue.receive()
    later = queue.append_keys("a", "b")
    assert queue.ack(first[0]["receipt"]) == 1
    assert queue.receive() == [], "one of a is still in flight"
    assert queue.ack(first[2]["receipt"]) == 1
    assert queue.value("select count(*) from cdcbridge_internal.leases where cardinality(seqs) > 1") == 1, (
        "a row for both keys"
    )
    assert seqs(queue.receive()) == later[:1]
    assert queue.ack(first[1]["receipt"]) == 1
    assert seqs(queue.receive()) == later[1:]
    assert put == seqs(first)


def test_batches_are_full_while_another_receivers_transaction_is_open(queue: StoreQueue) -> None:
    queue.append_keys(*"abcabc", *"defdef", *"ghighi")
    one, two = queue.open(autocommit=False), queue.open()
    assert keys(queue.receive(4, session=one)) == ["a", "b", "c", "a"]
    assert keys(queue.receive(6, session=two)) == [*"defdef"], "b and c wait before them, locked or not"
    one.rollback()
    assert keys(queue.receive(10, session=two)) == [*"abcabc", *"ghig"]


def test_a_rolled_back_claim_leaves_the_order_as_it_was(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "a")
    session = queue.open(autocommit=False)
    assert seqs(queue.receive(1, session=session)) == put[:1]
    assert seqs(queue.receive()) == put[1:2]
    session.rollback()
    assert seqs(queue.receive()) == [put[0], put[2]]


def test_messages_without_a_key_wait_for_nobody(queue: StoreQueue) -> None:
    put = queue.append_keys("a", None, "a", None)
    queue.receive(1)
    assert seqs(queue.receive()) == [put[1], put[3]]


def test_nack_gives_back_the_key_from_there_on(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "a", "a")
    batch = queue.receive()
    queue.ack(batch[0]["receipt"])
    assert queue.nack(batch[2]["receipt"], delay="0") == 1
    assert queue.ack(batch[3]["receipt"]) == 0, "it went back with the one before it"
    assert queue.ack(batch[1]["receipt"]) == 1, "another key's"
    again = queue.receive()
    assert seqs(again) == put[2:]
    assert [row["deliver_count"] for row in again] == [2, 2]


def test_a_delayed_message_blocks_its_key_and_no_other(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "a")
    (first,) = queue.receive(1)
    queue.nack(first["receipt"], delay="1 hour")
    later = queue.append_keys("a", "c")
    assert seqs(queue.receive()) == [put[1], later[1]]
    queue.due()
    assert seqs(queue.receive()) == [put[0], put[2], later[0]]


def test_poison_blocks_its_key_only_until_it_is_dead(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "a")
    (first,) = queue.receive(1)
    queue.nack(first["receipt"], dead=True, reason="poison")
    assert seqs(queue.receive()) == put[1:]


def test_killing_one_leaves_the_later_ones_of_the_batch_in_flight(queue: StoreQueue) -> None:
    queue.append_keys("a", "a")
    one, two = queue.receive()
    queue.nack(one["receipt"], dead=True)
    assert queue.ack(two["receipt"]) == 1


def test_expired_deliveries_come_again_in_order_and_before_later_ones(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "a", "a")
    queue.receive(3)
    queue.expire()
    assert seqs(queue.receive()) == put


def test_one_by_one_expired_deliveries_keep_their_order(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "a", "a")
    queue.receive(3)
    queue.expire()
    for seq in put:
        (row,) = queue.receive(1)
        assert row["seq"] == seq
        assert queue.receive() == []
        queue.ack(row["receipt"])


def test_an_expired_delivery_that_was_delivered_alone_stays_the_first(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "a")
    assert seqs(queue.receive(2)) == put
    queue.expire()
    assert seqs(queue.receive(1)) == put[:1], "the second stays with its older claim"
    queue.expire()
    assert seqs(queue.receive(2)) == put


def test_an_expired_delivery_does_not_overtake_one_that_was_given_back(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "a")
    queue.receive(2)
    queue.expire()
    (first,) = queue.receive(1)
    queue.nack(first["receipt"], delay="1 h")
    assert queue.receive() == []
    queue.due()
    (first,) = queue.receive(1)
    assert first["seq"] == put[0]
    queue.nack(first["receipt"], delay="0")
    (first,) = queue.receive()
    assert first["seq"] == put[0]
    queue.ack(first["receipt"])
    assert seqs(queue.receive()) == put[1:]


def test_extending_one_message_extends_its_keys_others_in_the_batch(queue: StoreQueue) -> None:
    queue.append_keys("a", "a", "b")
    batch = queue.receive(3, "10 s")
    assert queue.extend("0", batch[1]["receipt"]) == 1
    assert keys(queue.receive()) == ["a", "a"]


def test_a_truncate_is_a_barrier(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "!", "c", "a")
    first = queue.receive()
    assert seqs(first) == put[:2]
    assert queue.receive() == [], "the barrier waits for all before it"
    queue.ack(first[0]["receipt"])
    assert queue.receive() == []
    queue.ack(first[1]["receipt"])
    (barrier,) = queue.receive()
    assert (barrier["seq"], barrier["data"]["op"]) == (put[2], "truncate")
    assert queue.receive() == [], "and all behind it wait for the barrier"
    queue.nack(barrier["receipt"], delay="1 hour")
    assert queue.receive() == []
    queue.due()
    (barrier,) = queue.receive()
    queue.ack(barrier["receipt"])
    assert seqs(queue.receive()) == put[3:]


def test_a_barrier_is_not_passed_while_its_claim_is_not_committed(queue: StoreQueue) -> None:
    queue.append_keys("!", "a")
    session = queue.open(autocommit=False)
    assert len(queue.receive(session=session)) == 1
    assert queue.receive() == []
    session.rollback()
    assert [row["data"]["op"] for row in queue.receive()] == ["truncate"]


def test_redriven_messages_keep_their_order(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "a", "a")
    for _ in range(2):
        (row,) = queue.receive(1)
        queue.nack(row["receipt"], dead=True)
    assert queue.value("select cdcbridge.redrive('c')") == 2
    later = queue.append_keys("a")
    batch = queue.receive()
    assert seqs(batch) == [put[2], put[0], put[1], *later]
    queue.nack(batch[0]["receipt"], delay="0")
    assert seqs(queue.receive()) == [put[2], put[0], put[1], *later]


def test_the_same_key_of_two_consumers_is_two_keys(queue: StoreQueue) -> None:
    other = queue.declare("other", mode="fifo")
    put = queue.append_keys("a", "a", consumers=(1, other))
    queue.receive(1)
    assert seqs(queue.receive(1, name="other")) == put[:1]


def test_one_hot_key_does_not_hide_the_others(queue: StoreQueue) -> None:
    hot = queue.append_keys(*["hot"] * 3000)
    other = queue.append_keys("x", "y")
    (first,) = queue.receive(1)
    assert seqs(queue.receive()) == other
    queue.ack(first["receipt"])
    assert seqs(queue.receive(100)) == hot[1:101]


def test_message_key_seqs_has_each_keys_head(queue: StoreQueue) -> None:
    put = queue.append_keys("a", "b", "a", None)
    query = "select key, seq from cdcbridge.message_key_seqs order by key"
    assert [tuple(row.values()) for row in queue.all(query)] == [("a", put[0]), ("b", put[1])]
    (row,) = queue.receive(1)
    queue.ack(row["receipt"])
    assert [tuple(row.values()) for row in queue.all(query)] == [("a", put[2]), ("b", put[1])]


@pytest.mark.parametrize("call", ["ack", "nack"])
def test_settling_refuses_an_isolation_level_where_it_cannot_be_safe(queue: StoreQueue, call: str) -> None:
    session = queue.open()
    session.execute("set default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.DatabaseError, match="REPEATABLE READ") as raised:
        queue.all(f"select cdcbridge.{call}('c', '{{}}')", session=session)
    assert raised.value.sqlstate == "CB005"


@pytest.mark.parametrize("names", [3, 40])
def test_many_receivers_never_hold_one_key_twice_and_never_swap_two(queue: StoreQueue, names: int) -> None:
    """Receivers that ack, give back, let expire, roll back and stay in their transactions."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    put: list[tuple[str, int]] = []
    for size in (1, 5, 300, 2, 200, 1, 90):
        given = [str(chance.randrange(names)) for _ in range(size)]
        put += zip(given, queue.append_keys(*given), strict=True)
    lock = threading.Lock()
    holders: dict[str, int] = {}
    done: dict[str, list[int]] = defaultdict(list)
    wrong: list[str] = []

    def work(number: int) -> None:
        mine = random.Random(seed + number)
        session = queue.open(autocommit=False)
        idle = 0
        while idle < 40 and not wrong:
            batch = queue.receive(mine.choice((1, 3, 10, 50)), session=session)
            idle = 0 if batch else idle + 1
            if mine.random() < 0.2:
                session.rollback()
                continue
            held = {row["key"] for row in batch}
            with lock:
                for key in held:
                    if key in holders:
                        wrong.append(f"{key} is held by {holders[key]} and {number}")
                    holders[key] = number
            session.commit()
            failed: set[str] = set()
            for row in batch:
                if row["key"] in failed:
                    continue
                if mine.random() < 0.1:
                    failed.add(row["key"])
            with lock:
                acked = [row for row in batch if row["key"] not in failed]
                for row in acked:
                    done[row["key"]].append(row["seq"])
                for key in held:
                    del holders[key]
                # The lock is held over the commit: what is told here happens before anybody else can claim.
                if acked and queue.ack(*receipts(acked), strict=True, session=session) != len(acked):
                    wrong.append("a receipt in flight was stale")
                back = [row["receipt"] for row in batch if row["key"] in failed]
                if back:
                    queue.value("select cdcbridge.nack('c', %s, '0')", back, session=session)
                session.commit()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    dead = {row["seq"] for row in queue.all("select seq from cdcbridge.dead_messages")}
    expected: dict[str, list[int]] = defaultdict(list)
    for key, seq in put:
        if seq not in dead:
            expected[key].append(seq)
    assert dict(done) == {key: found for key, found in expected.items() if found}
    assert queue.value("select count(*) from cdcbridge.consumer_messages") == 0


def test_what_claims_have_passed_by_is_not_forgotten(queue: StoreQueue) -> None:
    put = queue.append_keys("hot", "hot", *[str(n) for n in range(6000)])
    assert seqs(queue.receive(1)) == put[:1]
    while batch := queue.receive(100):
        queue.ack(*receipts(batch))
    (hint,) = queue.all("select waiting_floor, passed from cdcbridge_internal.hints order by id desc limit 1")
    assert hint["waiting_floor"] > 4000
    assert len(hint["passed"]) == 1
    queue.expire()
    assert seqs(queue.receive()) == put[:2]


def test_merged_runs_keep_the_order_of_their_key(queue: StoreQueue) -> None:
    queue.declare(mode="fifo", topics=("t",))
    (first,) = queue.append_keys("hot")
    assert seqs(queue.receive(1)) == [first]
    for n in range(60):
        queue.append_keys(*(["hot", "cold"] if n % 3 else ["hot"]))
    before = queue.value("select count(*) from cdcbridge_internal.waiting_1")
    queue.ack(*receipts(queue.receive(3)))
    holder = queue.open(autocommit=False)
    holder.execute("select from cdcbridge_internal.waiting_1 where ord = 20 for update")
    merged = queue.value("select cdcbridge_internal.merge_runs()")
    assert 0 < merged < before
    assert queue.value("select count(*) from cdcbridge_internal.waiting_1 where 20 <= ord") > 20, (
        "nothing from behind a locked row"
    )
    holder.rollback()
    queue.value("select cdcbridge_internal.merge_runs()")
    queue.expire()
    rows = []
    while batch := queue.receive(7):
        rows += batch
        queue.ack(*receipts(batch))
    hot = [row["seq"] for row in rows if row["key"] == "hot"]
    assert len(hot) == 61
    assert hot == sorted(hot)


def test_nothing_that_can_still_be_overtaken_is_merged(queue: StoreQueue) -> None:
    queue.declare(mode="fifo", topics=("t",))
    publish = "select cdcbridge.publish('t', 'hot', '{}')"
    queue.session.execute(publish)
    queue.receive(1)
    late = queue.open(autocommit=False)
    late.execute(publish)
    for _ in range(20):
        queue.session.execute(publish)
    assert queue.value("select cdcbridge_internal.merge_runs()") == 0
    late.commit()
    assert queue.value("select cdcbridge_internal.merge_runs()") == 20
    queue.expire()
    rows = queue.receive(100)
    assert seqs(rows) == list(range(1, 23))


def test_a_claim_that_would_overtake_another_leaves_to_others_what_it_cannot_take(queue: StoreQueue) -> None:
    """It used to look for the rest of its batch at everything that waits, and to lock it."""
    blocked = [f"a{n}" for n in range(50)]
    put = queue.append_keys(*blocked, *[f"b{n}" for n in range(25)], *blocked * 20, *[f"c{n}" for n in range(50)])
    first, second, third = (queue.open(autocommit=False) for _ in range(3))
    assert seqs(queue.receive(50, session=first)) == put[:50]
    assert seqs(queue.receive(50, session=second)) == put[50:75], "beyond them all wait for the first receiver"
    assert seqs(queue.receive(50, session=third)) == put[-50:], "it looks further, because it has found nothing"


# In a session that counts its looks at what waits, the second one comes after the rows are locked.
PAUSE = """
    create or replace function cdcbridge_internal.live_waiting_1(hint cdcbridge_internal.hints) returns setof cdcbridge_internal.waiting_1
    language plpgsql volatile as $$
    declare
        looks constant int := 1 + nullif(current_setting('test.looks', true), '')::int;
    begin
        perform set_config('test.looks', looks::text, false) where looks is not null;
        perform pg_advisory_lock_shared(77) where looks = 2;
        return query select w.* from cdcbridge_internal.waiting_1 w where w.ord >= hint.waiting_floor order by w.ord, w.tie;
    end $$
"""

# What waits stands in one row, as after a large append: a claim has to look inside.
ONE_ROW = """
    with gone as (delete from cdcbridge_internal.waiting_1 returning *)
    insert into cdcbridge_internal.waiting_1 (consumer_id, ord, seqs, keys, inserted_at)
    select 1, min(ord), array_agg(seqs[1] order by ord), array_agg(keys[1] order by ord), min(inserted_at)
    from gone
"""


def test_a_message_that_moves_while_a_claim_looks_still_holds_its_key(queue: StoreQueue) -> None:
    queue.append_keys("a")
    queue.nack(*receipts(queue.receive(1)), delay="1 h")
    rest = queue.append_keys("a", "b")
    queue.session.execute(ONE_ROW)
    queue.session.execute(PAUSE)
    claiming, moving = queue.open(), queue.open()
    claiming.execute("set test.looks = '0'")
    moving.execute("select pg_advisory_lock(77)")
    found: list[dict[str, Any]] = []
    claim = threading.Thread(target=lambda: found.extend(queue.receive(2, session=claiming)))
    claim.start()
    waits = "select wait_event = 'advisory' from pg_stat_activity where pid = %s"
    eventually(lambda: queue.value(waits, claiming.info.backend_pid), "the claim has seen the message given back")
    moving.execute("update cdcbridge_internal.delayed set visible_at = now()")
    assert keys(queue.receive(1, session=moving)) == ["a"], "it is given back no longer, but in flight"
    moving.execute("select pg_advisory_unlock(77)")
    claim.join()
    assert seqs(found) == rest[1:]


def test_a_message_in_front_of_one_that_is_published_for_later_is_not_held_by_it(queue: StoreQueue) -> None:
    queue.declare(mode="fifo", topics=("t",))
    (first,) = queue.append_keys("a")
    queue.session.execute("select cdcbridge.publish('t', 'a', '1', now() + interval '1 hour')")
    queue.append_keys("a")
    assert seqs(queue.receive()) == [first], "the last one waits for the one in its middle"


def test_a_receiver_that_is_a_moment_late_cuts_no_row_up(queue: StoreQueue) -> None:
    """Each would then hold one message, and claims would look at thousands of rows."""
    put = queue.append_keys(*"abcdefghij" * 30)  # so many that they share rows
    rows = "select ord, tie, seqs, keys from cdcbridge_internal.waiting_1 order by ord, tie"
    first = queue.open(autocommit=False)
    assert seqs(queue.receive(10, session=first)) == put[:10]
    before = queue.all(rows)
    assert queue.receive() == [], "the first messages of all keys are with a claim that has not committed"
    assert queue.all(rows) == before and len(before) < 10
    first.rollback()
    assert seqs(queue.receive(300)) == put
