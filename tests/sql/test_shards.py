"""max_in_flight: exact for any number of receivers, whatever their transactions hold open; a receive that finds nothing is free."""

from __future__ import annotations

import random
import threading

import psycopg
import pytest

from tests.harness.world import eventually
from tests.sql.queue import Row, StoreQueue
from tests.sql.test_queue import receipts, seqs

# Locks of this database that a claim holds for its own time only: its turn, and the word that it shares.
TURNS = """
    select count(*) from pg_locks l join pg_database d on d.oid = l.database and d.datname = current_database()
    where l.locktype = 'advisory' and l.objsubid = 1
"""


def open_sessions(queue: StoreQueue, number: int) -> list[psycopg.Connection[Row]]:
    return [queue.open(autocommit=False) for _ in range(number)]


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_hundred_receivers_in_their_transactions_get_a_message_each(queue: StoreQueue, mode: str) -> None:
    queue.declare(mode=mode, max_in_flight=150)
    for n in (0, 100):  # small appends: each message has a row of its own
        queue.append_keys(*map(str, range(n, n + 100)))
    sessions = open_sessions(queue, 80)
    assert [len(queue.receive(1, session=session)) for session in sessions] == [1] * 80
    assert [len(queue.receive(1, session=session)) for session in sessions[:20]] == [1] * 20, "a second one"
    other = queue.open(autocommit=False)
    assert len(queue.receive(200, session=other)) == 50, "all that is left, and no more"
    assert queue.receive(200) == []
    for session in sessions[20:50]:
        session.rollback()
    assert len(queue.receive(200)) == 30
    for session in sessions[:20]:
        session.commit()
    assert queue.receive(200) == [], "committed, they are in flight as before"
    for session in [*sessions, other]:
        session.rollback()
    assert queue.states() == {"pending": 200 - 70, "in_flight": 70, "dead": 0}
    assert len(queue.receive(200)) == 80


def test_a_large_claim_leaves_to_others_what_it_does_not_use(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=1000)
    put = queue.append(5)
    first, second, third = open_sessions(queue, 3)
    assert seqs(queue.receive(1000, session=first)) == put
    queue.append(2000)
    batch = queue.receive(500, session=second)
    assert len(batch) == 500
    assert len(queue.receive(1000, session=third)) == 495
    assert queue.receive(1) == []
    queue.ack(*receipts(batch), session=second)
    second.commit()
    assert len(queue.receive(1000)) == 500
    first.rollback()
    assert len(queue.receive(1000)) == 5
    third.rollback()
    assert queue.states()["in_flight"] == 505


def test_a_claim_with_shards_of_its_own_takes_what_others_leave_in_theirs(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=640)  # 10 to a shard
    queue.append(1000)
    one, two = open_sessions(queue, 2)
    assert len(queue.receive(1, session=one)) == 1
    assert len(queue.receive(1000, session=two)) == 639
    assert queue.receive(1) == []


def test_an_empty_claim_in_an_open_transaction_keeps_nothing(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=70)
    idle = open_sessions(queue, 3)
    assert [queue.receive(70, session=session) for session in idle] == [[], [], []]
    queue.append(100)
    assert len(queue.receive(100)) == 70
    assert [queue.receive(70, session=session) for session in idle] == [[], [], []]


def test_what_a_savepoint_took_is_free_when_it_is_rolled_back(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=10)
    queue.append(30)
    one, two = open_sessions(queue, 2)
    assert len(queue.receive(3, session=one)) == 3
    one.execute("savepoint s")
    assert len(queue.receive(7, session=one)) == 7
    assert queue.receive(10, session=two) == []
    one.execute("rollback to savepoint s")
    assert len(queue.receive(10, session=two)) == 7
    assert queue.receive(10, session=one) == []
    two.rollback()
    assert len(queue.receive(10, session=one)) == 7


def test_a_limit_of_one_in_open_transactions(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=1)
    queue.append(3)
    one, two = open_sessions(queue, 2)
    for _ in range(2):
        (row,) = queue.receive(5, session=one)
        assert queue.receive(5, session=two) == []
        queue.ack(row["receipt"], session=one)
    one.commit()
    assert len(queue.receive(5, session=two)) == 1


def test_never_more_than_max_in_flight_with_long_and_short_transactions(queue: StoreQueue) -> None:
    limit = 100
    queue.declare(max_in_flight=limit)
    for _ in range(30):
        queue.append(100)
    held = worst = 0
    lock = threading.Lock()
    failed: list[BaseException] = []

    def note(number: int) -> None:
        nonlocal held, worst
        with lock:
            held += number
            worst = max(worst, held)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        session = queue.open(autocommit=False)
        for _ in range(60):
            batch = [
                r
                for _ in range(chance.randint(1, 3))
                for r in queue.receive(chance.choice([1, 5, 40]), session=session)
            ]
            note(len(batch))
            if chance.random() < 0.3:
                session.commit()
            note(-len(batch))
            if chance.random() < 0.7:
                queue.ack(*receipts(batch), session=session)
                session.commit()
            else:
                session.rollback()

    def run(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert 0 < worst <= limit
    assert queue.value(TURNS) == 0


def test_a_receive_that_fails_gives_its_turn_back(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=640)  # 10 to a shard
    queue.append(30)
    queue.session.execute("alter table cdcbridge_internal.leases add constraint broken check (cardinality(seqs) < 4)")
    one, two = open_sessions(queue, 2)
    assert [len(queue.receive(1, session=one)) for _ in range(2)] == [1, 1], "the second shares"
    with pytest.raises(psycopg.errors.CheckViolation):
        queue.receive(8, session=one)
    one.rollback()
    assert len(queue.receive(1, session=two)) == 1
    assert queue.value(TURNS) == 0


def test_claims_that_ask_at_the_same_moment_do_not_share(queue: StoreQueue) -> None:
    """A claim that asks whether anybody shares holds the lock alone for an instant. Another that asks then need not share."""
    queue.declare(max_in_flight=640)
    queue.append(30)
    asks, takes_turns = queue.open(), queue.open()
    for session, number in (asks, 0), (takes_turns, 1):
        session.execute("set search_path = cdcbridge, cdcbridge_internal")
        queue.all("select pg_advisory_lock(sharing_lock(1) + %s)", number, session=session)
    assert len(queue.receive(5)) == 5, "without waiting for a turn"


def test_a_claim_that_needs_its_own_shards_alone_makes_nobody_share(queue: StoreQueue) -> None:
    """One claim shared. If each claim beside it did so as well, no claim would ever have its shards to itself again."""
    queue.declare(max_in_flight=640)  # 10 to a shard
    for _ in range(10):
        queue.append(5)
    shares, modest, locker = open_sessions(queue, 3)
    # A claim waits here while `locker` has the lock.
    queue.session.execute(
        """create function gate() returns trigger language plpgsql as $$
           begin perform pg_advisory_lock_shared(4711); perform pg_advisory_unlock_shared(4711); return new; end $$;
           create trigger gate before insert on cdcbridge_internal.leases for each row execute function gate()"""
    )
    for session in shares, modest:
        session.execute("select setseed(0.1)")  # both begin at shard 47; the larger claim also takes shards 0 and 1
    assert len(queue.receive(1, session=shares)) == 1
    assert len(queue.receive(20, session=shares)) == 20, "more than the shard of its first claim has"
    locker.execute("select pg_advisory_lock(4711)")
    thread = threading.Thread(target=lambda: queue.receive(5, session=modest))
    thread.start()
    locks = "select l.pid from pg_locks l join pg_database d on d.oid = l.database and d.datname = current_database() where "
    eventually(lambda: queue.all(locks + "l.objid = 4711 and not l.granted"))
    who_shares = locks + "l.classid = 'cdcbridge_internal.leases'::regclass and l.objsubid = 1 and l.mode = %s"
    (row,) = queue.all(who_shares, "ShareLock")
    assert row["pid"] == shares.info.backend_pid
    (row,) = queue.all(who_shares, "ExclusiveLock")
    assert row["pid"] == modest.info.backend_pid, "it takes its turn"
    locker.execute("select pg_advisory_unlock(4711)")
    thread.join()
    modest.commit()
    assert queue.states()["in_flight"] == 5


@pytest.mark.parametrize("mode", ["queue", "fifo", "stream"])
@pytest.mark.parametrize("state", ["empty", "in flight", "later"])
def test_a_receive_that_finds_nothing_costs_no_transaction_id(queue: StoreQueue, mode: str, state: str) -> None:
    queue.declare(mode=mode, max_in_flight=1000, topics=("news",))
    call = "select * from cdcbridge.receive('c')" if mode != "stream" else "select * from cdcbridge.read_stream('c')"
    publish = "select cdcbridge.publish('news', 'k', '1', now() + %s * interval '1 hour')"
    if state == "in flight":
        queue.all(publish, 0)
        queue.all(call if mode != "stream" else "select * from cdcbridge.read_stream('c', 100, '1 hour')")
    elif state == "later" and mode != "stream":
        queue.all(publish, 1)
    for _ in range(100):
        with queue.session.transaction():
            for _ in range(2):
                assert queue.all(call) == []
                assert queue.value("select pg_current_xact_id_if_assigned()") is None
