"""The gap guard: what has fooled others, each trap on its own, and then many publishers at once."""

from __future__ import annotations

import random
import subprocess
import threading
from typing import Any

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness import hostile
from tests.harness.world import PATIENCE, eventually, fresh_database
from tests.sql.queue import StoreQueue

PUBLISHERS = 200


def safe(queue: StoreQueue, sequence: str | None = None) -> int:
    return int(queue.value("select cdcbridge.max_safe_seq(%s::regclass)", sequence))


def drain(queue: StoreQueue, session: psycopg.Connection[Any] | None = None) -> list[int]:
    got = []
    while rows := queue.all("select * from cdcbridge.read_stream('s', 1000, '1 min')", session=session):
        got += [row["seq"] for row in rows]
        last = rows[-1]
        queue.all("select cdcbridge.commit_offset('s', %s, %s, %s)", last["partition"], last["seq"], last["receipt"],
                  session=session)  # fmt: skip
    return got


def test_a_sequence_that_was_never_drawn_from_is_guarded_too(queue: StoreQueue) -> None:
    queue.session.execute("create sequence public.own cache 1")
    assert safe(queue, "public.own") == 0
    late, early = queue.open(autocommit=False), queue.open(autocommit=False)
    for session, expected in ((late, 1), (early, 2)):
        queue.all("select cdcbridge.register_sequence_transaction('public.own')", session=session)
        assert queue.value("select nextval('public.own')", session=session) == expected
    early.commit()
    assert safe(queue, "public.own") == 0
    late.commit()
    assert safe(queue, "public.own") == 2


def test_what_commits_while_the_safe_seq_is_asked_for_is_not_passed(queue: StoreQueue) -> None:
    """The read must be a statement of its own: one that began before it would not see the row that has become safe."""
    queue.declare("s", mode="stream", topics=("news",))
    publisher, drawing, reader = queue.open(autocommit=False), queue.open(), queue.open()
    put = queue.value("select cdcbridge.publish('news', 'a', '1')", session=publisher)
    drawing.execute("select pg_advisory_lock(cdcbridge_internal.draw_lock('cdcbridge.messages_seq'))")
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.extend(drain(queue, reader)))
    thread.start()
    waits = "select wait_event = 'advisory' from pg_stat_activity where pid = %s"
    eventually(lambda: queue.value(waits, reader.info.backend_pid), "the reader asks for the safe seq")
    publisher.commit()
    drawing.execute("select pg_advisory_unlock_all()")
    thread.join(PATIENCE)
    assert got == [put]


def test_other_locks_with_the_same_numbers_hold_nobody_back(queue: StoreQueue) -> None:
    queue.value("select cdcbridge.publish('news', 'a', '1')")
    last = queue.value("select cdcbridge.publish('news', 'a', '1')")
    other = queue.open()
    klass = queue.value("select 'cdcbridge.messages_seq'::regclass::oid::int")
    other.execute("select pg_advisory_lock(%s, 0)", (klass,))  # exclusive: no publisher's
    other.execute("select pg_advisory_lock_shared(%s::bigint << 32)", (klass,))  # the same halves, as one number
    other.execute("select pg_advisory_lock_shared(%s, 0)", (klass + 1,))  # another sequence's
    assert safe(queue) == last


def test_a_store_that_is_restored_elsewhere_goes_on(pg15: EmbeddedServer, pg18: EmbeddedServer) -> None:
    """Into a cluster with transaction ids of its own: nothing in the store goes by them."""
    with fresh_database(pg15) as old, fresh_database(pg18) as new:
        queue = StoreQueue(pg15.dsn(old))
        queue.declare("s", mode="stream", topics=("news",), start="earliest")
        first = [queue.value("select cdcbridge.publish('news', %s, '1')", f"k{n}") for n in range(20)]
        rows = queue.all("select * from cdcbridge.read_stream('s', 5)")
        queue.all("select cdcbridge.commit_offset('s', %s, %s)", rows[-1]["partition"], rows[-1]["seq"])
        queue.close()
        dump = [str(pg15.binaries / "pg_dump"), "-d", pg15.dsn(old), "-n", "cdcbridge*", "--no-owner"]
        text = subprocess.run(dump, capture_output=True, check=True, env=hostile.own_environment()).stdout
        # By psql 15: pg_dump of newer minor releases writes commands around the dump that others do not know.
        restore = [str(pg15.binaries / "psql"), "-q", "-d", pg18.dsn(new), "-v", "ON_ERROR_STOP=1"]
        subprocess.run(restore, input=text, check=True, capture_output=True, env=hostile.own_environment())
        restored = StoreQueue(pg18.dsn(new))
        hung = restored.open(autocommit=False)
        restored.value("select cdcbridge.publish('news', 'k0', '1')", session=hung)
        later = restored.value("select cdcbridge.publish('news', 'k0', '1')")
        assert sorted(drain(restored)) == sorted(set(first) - {row["seq"] for row in rows})
        hung.rollback()
        assert drain(restored) == [later]
        restored.close()


def test_many_publishers_that_commit_late_roll_back_and_hang_lose_nothing(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", topics=("news",))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    committed: list[int] = []

    def publish(number: int) -> None:
        chance = random.Random(seed + number)
        with psycopg.connect(queue.dsn) as session:
            for _ in range(8):
                seqs = []
                for _ in range(chance.choice((1, 1, 3))):
                    row = session.execute(
                        "select cdcbridge.publish('news', %s, '1')", (f"k{chance.randrange(99)}",)
                    ).fetchone()
                    assert row is not None
                    seqs.append(row[0])
                threading.Event().wait(chance.choice((0, 0, 0.01, 0.1)))
                if chance.random() < 0.2:
                    session.rollback()
                else:
                    session.commit()
                    committed.extend(seqs)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(PUBLISHERS)]
    for thread in threads:
        thread.start()
    got: list[int] = []
    while any(thread.is_alive() for thread in threads):
        got += drain(queue)
    got += drain(queue)
    assert len(got) == len(set(got))
    assert sorted(got) == sorted(committed)
