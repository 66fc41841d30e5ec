"""Isolation levels above READ COMMITTED: each function is right, or refuses with CB005."""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from cdcbridge.store.log import BridgeStore
from tests.sql.queue import Row, StoreQueue
from tests.sql.test_queue import receipts, seqs

LEVELS = {
    "repeatable read": psycopg.IsolationLevel.REPEATABLE_READ,
    "serializable": psycopg.IsolationLevel.SERIALIZABLE,
}
levels = pytest.mark.parametrize("level", LEVELS)
Session = psycopg.Connection[Row]


def old(queue: StoreQueue, level: str) -> Session:
    """A session in a transaction that has its snapshot."""
    session = queue.open(autocommit=False)
    session.isolation_level = LEVELS[level]
    session.execute("select count(*) from cdcbridge_internal.leases")
    return session


def sqlstate(session: Session, query: str, *args: Any) -> str | None:
    try:
        session.execute(query.encode(), args or None)
    except psycopg.Error as error:
        return error.sqlstate
    return None


REFUSED = {
    "receive": "select * from receive('c')",
    "extend": "select extend('c', '{1-1}', '1 min')",
    "extend in fifo": "select extend('f', '{1-1}', '1 min')",
    "ack in fifo": "select ack('f', '{1-1}')",
    "nack in fifo": "select nack('f', '{1-1}')",
    "receive in fifo": "select * from receive('f')",
    "read_stream": "select * from read_stream('s')",
    "read_stream with a lease": "select * from read_stream('s', 1, '1 min')",
    "commit_offset": "select commit_offset('s', 0, 0)",
    "extend_lease": "select extend_lease('s', 0, '0-1', '1 min')",
    "seek": "select seek('s', 'earliest')",
    "begin_append": "select begin_append(1, 1)",
    "take_lead": "select take_lead('test')",
    "add_consumer": "select add_consumer('n', 'queue', '{}')",
    "remove_consumer": "select remove_consumer('c')",
    "begin_partitions": "select begin_partitions(3)",
    "drop_segments": "select * from drop_segments('0')",
    "bury_expired": "select bury_expired()",
    "merge_runs": "select merge_runs()",
}


@levels
def test_what_needs_a_younger_snapshot_refuses(queue: StoreQueue, level: str) -> None:
    queue.declare()
    queue.declare("f", mode="fifo")
    queue.declare("s", mode="stream")
    session = queue.open(autocommit=False)
    session.isolation_level = LEVELS[level]
    for name, query in REFUSED.items():
        session.execute("set local search_path = cdcbridge, cdcbridge_internal")
        assert sqlstate(session, query) == "CB005", name
        session.rollback()


def retried(queue: StoreQueue, level: str, work: Callable[[Session], Any]) -> Any:
    """What an application does: the transaction again, as long as it cannot be serialized."""
    for _ in range(1000):
        session = queue.open(autocommit=False)
        session.isolation_level = LEVELS[level]
        try:
            result = work(session)
            session.commit()
        except psycopg.errors.SerializationFailure:
            continue
        finally:
            session.close()
        return result
    raise AssertionError("never serializable")


def acked(queue: StoreQueue, given: list[Row]) -> None:
    queue.ack(*receipts(given))


def nacked(queue: StoreQueue, given: list[Row]) -> None:
    queue.nack(*receipts(given), delay="1 hour")


def buried(queue: StoreQueue, given: list[Row]) -> None:
    queue.nack(*receipts(given), dead=True)


def redelivered(queue: StoreQueue, given: list[Row]) -> None:
    queue.extend("0", *receipts(given))
    assert seqs(queue.receive(len(given))) == seqs(given)


def extended(queue: StoreQueue, given: list[Row]) -> None:
    queue.extend("2 hours", *receipts(given))


def shortened(queue: StoreQueue, given: list[Row]) -> None:
    queue.extend("0", *receipts(given))


EVENTS = [acked, nacked, buried, redelivered, extended, shortened]
SETTLE = {
    "ack": "select ack('c', %s)",
    "strict ack": "select ack('c', %s, true)",
    "nack": "select nack('c', %s, '0')",
    "dead nack": "select nack('c', %s, dead => true)",
}


@levels
@pytest.mark.parametrize("event", EVENTS)
def test_what_another_session_did_since_the_snapshot_is_not_overwritten(
    queue: StoreQueue, event: Callable[[StoreQueue, list[Row]], None], level: str
) -> None:
    queue.declare(visibility_timeout="1h", max_deliveries=100)
    for name, (others, mine) in itertools.product(SETTLE, ((3, 3), (1, 1), (3, 1), (1, 3))):
        print(name, others, mine)
        _not_overwritten(queue, name, event, others, mine, level)
        queue.session.execute(
            "truncate cdcbridge_internal.waiting, cdcbridge_internal.leases, cdcbridge_internal.settled, cdcbridge_internal.delayed"
        )


def _not_overwritten(
    queue: StoreQueue, name: str, event: Callable[[StoreQueue, list[Row]], None], others: int, mine: int, level: str
) -> None:
    """Of a claim of three, another session does something with the first `others`, and this one with the first `mine`."""
    queue.append(6)
    given = queue.receive(3)
    session = old(queue, level)
    session.execute("set local search_path = cdcbridge, cdcbridge_internal")
    event(queue, given[:others])
    before = queue.all("select * from cdcbridge.consumer_messages order by seq")
    dead = queue.all("select id from cdcbridge.dead_messages")
    assert sqlstate(session, SETTLE[name], receipts(given[:mine])) == "40001"
    session.rollback()
    assert queue.all("select * from cdcbridge.consumer_messages order by seq") == before
    assert queue.all("select id from cdcbridge.dead_messages") == dead
    session.execute("set local search_path = cdcbridge, cdcbridge_internal")
    state = sqlstate(session, SETTLE[name], receipts(given[:mine]))
    if event is extended:
        assert state is None
        session.commit()
        assert queue.states()["in_flight"] == 3 - mine
    else:
        assert state == ("CB006" if name == "strict ack" else None)
        session.rollback()
    session.close()


@levels
@pytest.mark.parametrize("name", SETTLE)
def test_an_ack_in_the_readers_own_transaction(queue: StoreQueue, name: str, level: str) -> None:
    """All, some, one by one, of several claims, after an extension; and what others do to the rest of the claim."""
    queue.declare(visibility_timeout="1h", max_deliveries=100)
    queue.append(20)
    claims = [queue.receive(4) for _ in range(4)]
    queue.extend("2 hours", claims[2][1]["receipt"])
    queue.session.execute("create table effects (seq bigint)")
    session = old(queue, level)
    session.execute("set local search_path = cdcbridge, cdcbridge_internal")
    queue.ack(claims[3][0]["receipt"])
    for part in (claims[0], claims[1][:2], claims[1][2:3], claims[2] + claims[3][1:3], [claims[3][3], claims[3][3]]):
        found = session.execute(SETTLE[name].encode(), (receipts(part),)).fetchone()
        assert found is not None and list(found.values()) == [len(set(receipts(part)))]
        session.execute("insert into public.effects select unnest(%s::bigint[])", (seqs(part),))
    assert queue.states()["in_flight"] == 15, "not before it commits"
    session.commit()
    left = queue.all("select seq from cdcbridge_internal.leases l, unnest(l.seqs) seq where not exists (select from cdcbridge_internal.settled s"
                     " where s.claim_id = l.claim_id and s.part = l.part and s.seq = seq)")  # fmt: skip
    assert left == [] or queue.states()["in_flight"] == 1
    assert queue.states()["in_flight"] == 1
    assert queue.ack(claims[1][3]["receipt"]) == 1
    queue.session.execute("select cdcbridge_internal.forget_settled()")
    assert (
        queue.all("select * from cdcbridge_internal.leases")
        == queue.all("select * from cdcbridge_internal.settled")
        == []
    )
    assert queue.states()["pending"] == (4 if name != "nack" else 4 + 14)


@levels
def test_a_receipt_that_has_expired_is_stale(queue: StoreQueue, level: str) -> None:
    queue.declare()
    queue.append(2)
    given = queue.receive(2)
    queue.expire()
    session = old(queue, level)
    session.execute("set local search_path = cdcbridge, cdcbridge_internal")
    assert sqlstate(session, SETTLE["strict ack"], receipts(given)) == "CB006"
    session.rollback()
    session.execute("set local search_path = cdcbridge, cdcbridge_internal")
    assert session.execute(SETTLE["ack"].encode(), (receipts(given),)).fetchone() == {"ack": 0}
    assert session.execute(SETTLE["nack"].encode(), (receipts(given),)).fetchone() == {"nack": 0}
    assert len(queue.receive(2)) == 2, "it holds no lock that keeps them from others"
    session.rollback()


@pytest.mark.parametrize("strict", [True, False])
@levels
def test_many_sessions_settle_the_same_messages_and_each_counts_once(
    queue: StoreQueue, level: str, strict: bool
) -> None:
    """Exactly once: the effect and the ack in one transaction, at mixed levels, with receivers that take over."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    queue.declare(visibility_timeout="30s", max_deliveries=10_000)
    put = queue.append(300)
    queue.session.execute("create table effects (seq bigint primary key)")
    failed: list[BaseException] = []

    def settle(session: Session, given: list[Row], chance: random.Random) -> int:
        session.execute("select count(*) from cdcbridge_internal.leases")  # the snapshot
        if chance.random() < 0.5:
            query = "select cdcbridge.nack('c', %s, '0')"
            return int(next(iter(session.execute(query.encode(), (receipts(given),)).fetchone().values())))  # type: ignore[union-attr]
        if not strict:
            given = [
                row
                for row in given
                if session.execute("select cdcbridge.ack('c', %s) as n", ([row["receipt"]],)).fetchone() == {"n": 1}
            ]
        else:
            session.execute("select cdcbridge.ack('c', %s, true)", (receipts(given),))
        session.execute("insert into public.effects select unnest(%s::bigint[])", (seqs(given),))
        return 0

    def work(number: int) -> None:
        chance = random.Random(seed + number)
        try:
            with psycopg.connect(queue.dsn, autocommit=True, row_factory=psycopg.rows.dict_row) as taker:
                while taker.execute("select count(*) as n from public.effects").fetchone() != {"n": len(put)}:
                    rows = taker.execute(
                        "select seq, receipt from cdcbridge.receive('c', %s)", (chance.choice((1, 5, 30)),)
                    ).fetchall()
                    if not rows:
                        continue
                    if chance.random() < 0.5:
                        taker.execute(
                            "select cdcbridge.extend('c', %s, '0')", (receipts(rows)[: chance.choice((1, 9))],)
                        )
                    some = rows if chance.random() < 0.5 else rows[: len(rows) // 2 + 1]
                    try:
                        retried(queue, level, functools.partial(settle, given=some, chance=chance))
                    except psycopg.Error as error:
                        if error.sqlstate != "CB006":
                            raise
                    taker.execute("select cdcbridge.nack('c', %s, '0')", (receipts(rows),))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert [row["seq"] for row in queue.all("select seq from public.effects order by seq")] == put
    queue.session.execute("select cdcbridge_internal.forget_settled()")
    assert queue.all("select * from cdcbridge.consumer_messages") == []
    assert queue.all("select * from cdcbridge_internal.settled") == []


def added(queue: StoreQueue) -> None:
    queue.declare("late", topics=("t",))


def changed(queue: StoreQueue) -> None:
    queue.declare("c", topics=("t", "u"))


def removed(queue: StoreQueue) -> None:
    queue.session.execute("select cdcbridge_internal.remove_consumer('d')")


@levels
@pytest.mark.parametrize("event", [added, changed, removed])
def test_a_publisher_whose_snapshot_misses_a_change_of_consumers(
    queue: StoreQueue, event: Callable[[StoreQueue], None], level: str
) -> None:
    queue.declare("c", topics=("t",))
    queue.declare("d", topics=("t",))
    session = old(queue, level)
    event(queue)
    with pytest.raises(psycopg.Error, match="since the snapshot") as refused:
        session.execute("select cdcbridge.publish('t', 'k', '1')")
    assert refused.value.sqlstate == "CB005"
    assert "again" in str(refused.value.diag.message_hint)
    session.rollback()
    session.execute("select cdcbridge.publish('t', 'k', '1')")
    session.commit()
    names = queue.all(
        "select c.name from cdcbridge.consumer_messages m join cdcbridge.consumers c on c.id = m.consumer_id order by 1"
    )
    assert [row["name"] for row in names] == {"added": ["c", "d", "late"], "changed": ["c", "d"], "removed": ["c"]}[
        event.__name__
    ]


@levels
def test_a_change_of_consumers_that_was_rolled_back_or_comes_from_another_server_refuses_nobody(
    queue: StoreQueue, level: str
) -> None:
    queue.declare("c", topics=("t",))
    with pytest.raises(ZeroDivisionError), queue._store.connection.transaction():
        queue._store.connection.execute("select lock_consumers(), note_consumer_change()")
        raise ZeroDivisionError
    queue.session.execute("create table other ()")
    session = old(queue, level)
    session.execute("select cdcbridge.publish('t', 'k', '1')")
    session.commit()
    queue.session.execute("select setval('cdcbridge_internal.consumers_xid_seq', 1::bigint << 40)")
    assert sqlstate(session, "select cdcbridge.publish('t', 'k', '1')") == "CB005"
    session.rollback()
    queue.declare("c", topics=("t",))  # as each start of a bridge does
    session.execute("select cdcbridge.publish('t', 'k', '1')")
    session.commit()


@levels
def test_dedup_gap_guard_and_partitions_of_a_publisher_with_an_old_snapshot(queue: StoreQueue, level: str) -> None:
    queue.declare("c", topics=("t",))
    queue.declare("s", mode="stream", topics=("t",), start="earliest")
    publish = "select cdcbridge.publish('t', 'k', '1', dedup_id => 'one')"
    session = old(queue, level)
    first = queue.value(publish)
    assert sqlstate(session, publish) == "40001", "the first one's seq is not there for it to see"
    session.rollback()
    assert queue.value(publish, session=session) == first
    session.rollback()
    session = old(queue, level)
    queue._store.set_partitions(64)
    seq = queue.value("select cdcbridge.publish('t', 'key-7', '2')", session=session)
    later = queue.value("select cdcbridge.publish('t', 'x', '3')")
    assert queue.value("select cdcbridge.max_safe_seq()") == seq - 1
    session.commit()
    assert queue.value("select cdcbridge.max_safe_seq()") == later
    row = queue.all(
        "select partition = cdcbridge.partition_of('key-7', 64) as right from cdcbridge.messages where seq = %s", seq
    )
    assert row == [{"right": True}]


def _serializable_by_default(queue: StoreQueue) -> None:
    name = queue.value("select quote_ident(current_database())")
    queue.session.execute(f"alter database {name} set default_transaction_isolation = 'serializable'")


def test_the_fence_holds_where_the_default_is_serializable(queue: StoreQueue) -> None:
    _serializable_by_default(queue)
    first = BridgeStore(queue.dsn, "cdcbridge")
    first.begin_epoch()
    second = BridgeStore(queue.dsn, "cdcbridge")
    with first.connection.transaction():
        first.connection.execute("select 1")
        second.begin_epoch()
        with pytest.raises(psycopg.Error, match="has ended") as refused:
            first.connection.execute("select begin_append(%s, 0)", (first._epoch,))
    assert refused.value.sqlstate == "CB010"
    for store in (first, second):
        store.close()


def test_two_sessions_that_end_a_claim_at_once_leave_nothing(queue: StoreQueue) -> None:
    queue.declare(visibility_timeout="1h")
    queue.append(4)
    given = receipts(queue.receive(4))
    one, two = queue.open(autocommit=False), queue.open(autocommit=False)
    for session, part in ((one, given[:2]), (two, given[2:])):
        assert queue.ack(*part, session=session) == 2
    one.commit()
    two.commit()
    assert queue.value("select count(*) from cdcbridge_internal.leases") == 1, "neither has seen the other's marks"
    assert queue.value("select cdcbridge_internal.forget_settled()") == 1
    assert (
        queue.all("select * from cdcbridge_internal.leases")
        == queue.all("select * from cdcbridge_internal.settled")
        == []
    )


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_consumer_that_is_added_while_publishers_of_every_level_publish_gets_all(
    queue: StoreQueue, mode: str
) -> None:
    queue.declare("c", topics=("t",))
    _serializable_by_default(queue)
    operator = StoreQueue(queue.dsn)
    stop = threading.Event()
    failed: list[BaseException] = []

    def publish(level: psycopg.IsolationLevel) -> None:
        try:
            with psycopg.connect(queue.dsn) as session:
                session.isolation_level = level
                while not stop.is_set():
                    try:
                        session.execute("select 1")
                        session.execute("select cdcbridge.publish('t', 'k', '1')")
                        session.commit()
                    except psycopg.Error as error:
                        session.rollback()
                        if error.sqlstate not in ("CB005", "40001"):
                            raise
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=publish, args=(level,))
        for level in (psycopg.IsolationLevel.READ_COMMITTED, *LEVELS.values())
    ]
    for thread in threads:
        thread.start()
    for n in range(4):
        operator.append(5)
        operator.declare(f"late{n}", mode=mode, topics=("t",), start="earliest")
    stop.set()
    for thread in threads:
        thread.join()
    operator.close()
    assert not failed, failed
    log = Counter(row["seq"] for row in queue.all("select seq from cdcbridge.messages where topic = 't'"))
    for n in range(4):
        got = queue.all("select m.seq from cdcbridge.consumer_messages m join cdcbridge.consumers c on c.id = m.consumer_id"
                        " join cdcbridge.messages l on l.seq = m.seq and l.topic = 't' where c.name = %s", f"late{n}")  # fmt: skip
        assert Counter(row["seq"] for row in got) == log, n
