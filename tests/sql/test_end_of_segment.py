"""The log's segments without a bridge: publishers make them, and one that stays in its transaction stops nobody for long."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from cdcbridge.errors import StoreUnavailable
from tests.harness.world import eventually
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import seqs
from tests.sql.test_read_stream import drain

SIZE = 1_000_000
PUBLISH = "select cdcbridge.publish('t', 'k', '1')"


@pytest.fixture(autouse=True)
def _consumers(queue: StoreQueue) -> None:
    queue.declare(topics=("t",))
    queue.declare("s", mode="stream", topics=("t",), start="earliest")


def near_end(queue: StoreQueue, left: int) -> None:
    """So many seqs are left in the last segment that there is."""
    last = queue.value("select max(relname) from pg_class where relname ~ '^messages_[0-9]+$'")
    queue.session.execute("select setval('cdcbridge.messages_seq', %s)", ((int(last[-6:]) + 1) * SIZE - 1 - left,))


def segments(queue: StoreQueue) -> int:
    return int(queue.value("select count(*) from pg_inherits where inhparent = 'cdcbridge.messages'::regclass"))


@pytest.mark.parametrize("level", [None, psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE])
def test_publishing_continues_beyond_the_last_segment(queue: StoreQueue, level: psycopg.IsolationLevel | None) -> None:
    """As a role that may do nothing else, in a session with settings of its own."""
    before = segments(queue)
    queue.session.execute("drop role if exists app")
    queue.session.execute("create access method other type table handler heap_tableam_handler")
    queue.session.execute("create role app login; grant usage on schema cdcbridge to app;"
                          " grant execute on function cdcbridge.publish to app")  # fmt: skip
    with psycopg.connect(queue.dsn, user="app") as app:
        app.isolation_level = level
        near_end(queue, 3)
        put = [app.execute(PUBLISH).fetchone() for _ in range(4)]  # in one transaction
        app.commit()
        app.execute("set default_table_access_method = other")
        put += [app.execute(PUBLISH).fetchone() for _ in range(2)]
        app.commit()
        near_end(queue, 2)
        app.execute("select count(cdcbridge.publish('t', 'k', '1')) from generate_series(1, 5)")  # in one statement
        app.commit()
    queue.session.execute("drop owned by app; drop role app")
    assert segments(queue) > before
    assert queue.value("select count(*) from pg_class c join pg_am a on a.oid = c.relam where a.amname = 'other'") == 0
    everything = [row["seq"] for row in queue.all("select seq from cdcbridge.messages order by seq")]
    assert len(everything) == len(put) + 5
    assert seqs(queue.receive(100)) == everything
    assert drain(queue) == everything
    indexed = (
        "select count(*) from pg_indexes where indexdef like '%(partition, seq)' and tablename ~ '^messages_[0-9]'"
    )
    assert queue.value(indexed) == segments(queue), "groups read by it"


def test_the_next_segment_is_made_while_there_is_room(queue: StoreQueue) -> None:
    before = segments(queue)
    near_end(queue, SIZE // 2 + 10)
    for _ in range(3):
        queue.value(PUBLISH)
    assert segments(queue) == before, "a bridge would have made it by now"
    near_end(queue, SIZE // 2 - 2000)
    for _ in range(1001):
        queue.value(PUBLISH)
    assert segments(queue) == before + 1


def test_many_publishers_pass_the_end_at_once(queue: StoreQueue) -> None:
    near_end(queue, 40)
    failed: list[BaseException] = []

    def publish() -> None:
        try:
            with psycopg.connect(queue.dsn, autocommit=True) as session:
                for _ in range(30):
                    session.execute(PUBLISH)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert len(seqs(queue.receive(1000))) == 120


@pytest.mark.parametrize("what", ["segments", "indexes"])
def test_sessions_that_make_the_same_thing_at_once(queue: StoreQueue, what: str) -> None:
    """CREATE TABLE and CREATE INDEX of one name collide in several ways, by where the other session commits in between."""
    rounds, sessions = 40, 4
    make = "select cdcbridge_internal.create_segments(%s)"
    if what == "indexes":
        make = "select cdcbridge_internal.create_partition_indexes(true)::int, %s"

    def forget() -> None:
        if what == "indexes":
            queue.session.execute(
                "drop index cdcbridge_internal.messages_000000_partition, cdcbridge_internal.messages_000001_partition"
            )

    together = threading.Barrier(sessions, forget, timeout=20)

    def work(_: int) -> int:
        made = 0
        with psycopg.connect(queue.dsn, autocommit=True) as session:
            for number in range(rounds):
                together.wait()
                made += (session.execute(make, (2 * (number + 1) * SIZE,)).fetchone() or (0,))[0]
        return made

    with ThreadPoolExecutor(sessions) as pool:
        assert sum(pool.map(work, range(sessions))) == 2 * rounds


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_the_one_who_makes_it_stays_in_its_transaction(queue: StoreQueue, end: str) -> None:
    near_end(queue, 5)
    maker = queue.open(autocommit=False)
    maker.execute(PUBLISH)
    longest = 0.0
    for _ in range(4):
        start = time.monotonic()
        queue.value(PUBLISH)
        longest = max(longest, time.monotonic() - start)
    assert longest < 1, "the others have room"
    queue.session.execute("select cdcbridge.consumer_lag()")
    assert len(seqs(queue.receive(100))) == 4
    waiter = queue.open()
    with ThreadPoolExecutor() as pool:
        published = pool.submit(queue.value, PUBLISH, session=waiter)
        waits = "select wait_event_type = 'Lock' as waits from pg_stat_activity where pid = %s"
        eventually(lambda: queue.value(waits, waiter.info.backend_pid), "the one beyond the end waits")
        getattr(maker, end)()
        assert published.result() % SIZE == 0
    assert len(seqs(queue.receive(100))) == (2 if end == "commit" else 1)


def test_the_one_who_makes_it_is_named(queue: StoreQueue) -> None:
    near_end(queue, 1)
    maker = queue.open(autocommit=False)
    maker.execute(PUBLISH)
    start = time.monotonic()
    with pytest.raises(psycopg.errors.LockNotAvailable, match=f"pid {maker.info.backend_pid}"):
        queue.value(PUBLISH)
    assert 4 < time.monotonic() - start < 10
    maker.rollback()
    queue.value(PUBLISH)


def test_a_bridge_beside_a_publisher_that_makes_a_segment(queue: StoreQueue, caplog: Any) -> None:
    """It appends while there is room, tries again, and never waits for the publisher's transaction."""
    near_end(queue, 8)
    maker = queue.open(autocommit=False)
    maker.execute(PUBLISH)
    start = time.monotonic()
    put = queue.append(5)
    assert len(put) == 5
    assert time.monotonic() - start < 2
    with pytest.raises(StoreUnavailable, match="does not exist yet"):
        queue.append(5)
    maker.commit()
    assert len(queue.append(5)) == 5
