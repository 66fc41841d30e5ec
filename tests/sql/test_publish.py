"""publish(): in the caller's transaction, delayed, once per dedup id; and the gap guard under it."""

from __future__ import annotations

import random
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.types.json import Json, Jsonb

from cdcbridge.changes.keys import partition_of
from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import eventually, store_database
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts, seqs


def publish(queue: StoreQueue, key: str | None = "k", data: str = '{"n": 1}', *, topic: str = "t",
            session: psycopg.Connection[Any] | None = None, **named: str | None) -> int:  # fmt: skip
    more = "".join(f", {name} => %s" for name in named)
    query = f"select cdcbridge.publish(%s, %s, %s{more})"
    return int(queue.value(query, topic, key, data, *named.values(), session=session))


@pytest.fixture(params=["queue", "fifo"])
def mode(request: pytest.FixtureRequest, queue: StoreQueue) -> str:
    queue.declare(mode=request.param, tables=(), topics=("t",))
    return str(request.param)


def test_a_published_message_is_seen_when_its_transaction_commits(queue: StoreQueue, mode: str) -> None:
    session = queue.open(autocommit=False)
    seq = publish(queue, "42", '{"total": 1.50, "huge": 123456789012345678901234567890}', session=session)
    assert queue.receive() == []
    session.commit()
    (row,) = queue.all("select seq, topic, key, data::text as data, commit_lsn, ordinal, commit_time, deliver_count"
                       " from cdcbridge.receive('c')")  # fmt: skip
    assert row == {
        "seq": seq, "topic": "t", "key": "42", "commit_lsn": None, "ordinal": None, "commit_time": None,
        "data": '{"op":"message","record":{"total": 1.50, "huge": 123456789012345678901234567890},"old":null,"unchanged":[]}',
        "deliver_count": 1,
    }  # fmt: skip
    assert queue.value("select partition from cdcbridge.messages") == zlib.crc32(b"42") % 16


def test_a_rolled_back_one_was_never_there(queue: StoreQueue, mode: str) -> None:
    session = queue.open(autocommit=False)
    publish(queue, session=session)
    session.rollback()
    seq = publish(queue)
    assert seqs(queue.receive()) == [seq]
    assert queue.value("select count(*) from cdcbridge.messages") == 1


def test_only_consumers_of_the_topic_get_it_and_tables_never_match(queue: StoreQueue, mode: str) -> None:
    queue.declare("other", tables=("*.*",), topics=("u",))
    publish(queue)
    assert queue.receive(name="other") == []
    assert len(queue.receive()) == 1


def test_operations_filter_and_columns_do_not_concern_published_messages(queue: StoreQueue) -> None:
    queue.declare(topics=("t",), filter="record.never == 1", operations=("delete",), columns={"include": ["id"]})
    publish(queue, data='{"secret": 1}')
    assert queue.receive()[0]["data"]["record"] == {"secret": 1}


def test_a_delayed_message_comes_when_it_is_time(queue: StoreQueue, mode: str) -> None:
    late = publish(queue, "a", deliver_at="tomorrow 12:00")
    assert queue.states()["pending"] == 1
    other = publish(queue, "b")
    blocked = publish(queue, "a")
    assert seqs(queue.receive()) == ([other] if mode == "fifo" else [other, blocked])
    queue.session.execute("update cdcbridge_internal.delayed set visible_at = now() - interval '1 s'")
    queue.session.execute("update cdcbridge_internal.waiting set not_before = now() - interval '1 s'")
    assert seqs(queue.receive()) == ([late, blocked] if mode == "fifo" else [late])


def test_a_moment_that_has_passed_is_no_delay(queue: StoreQueue, mode: str) -> None:
    seq = publish(queue, deliver_at="2000-01-01 00:00+00")
    assert seqs(queue.receive()) == [seq]


def test_a_repeated_dedup_id_adds_nothing_for_five_minutes(queue: StoreQueue, mode: str) -> None:
    first = publish(queue, dedup_id="x")
    assert publish(queue, dedup_id="x") == first
    assert publish(queue, dedup_id="y") != first
    assert publish(queue, dedup_id="x", topic="another") != first
    queue.session.execute("update cdcbridge_internal.published set published_at = now() - interval '5 min'")
    assert publish(queue, dedup_id="x") != first
    assert queue.value("select count(*) from cdcbridge.messages where topic = 't'") == 3


def test_two_sessions_with_one_dedup_id_publish_once(queue: StoreQueue, mode: str) -> None:
    one, two = queue.open(autocommit=False), queue.open()
    first = publish(queue, dedup_id="x", session=one)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(publish(queue, dedup_id="x", session=two)))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "it waits for the first"
    one.commit()
    thread.join()
    assert result == [first]
    assert queue.value("select count(*) from cdcbridge.messages") == 1


def test_forgotten_dedup_ids_are_gone(queue: StoreQueue) -> None:
    publish(queue, dedup_id="x")
    assert queue.value("select cdcbridge_internal.forget_published()") == 0
    queue.session.execute("update cdcbridge_internal.published set published_at = now() - interval '5 min'")
    assert queue.value("select cdcbridge_internal.forget_published()") == 1


def test_oversized_published_messages_are_dead_letters(queue: StoreQueue) -> None:
    queue.declare(topics=("t",), max_message_bytes=100)
    publish(queue, data='"' + "x" * 100 + '"')
    assert queue.receive() == []
    reason = queue.value("select reason from cdcbridge.dead_messages")
    assert reason.startswith("oversized: data has 1")


def test_a_consumers_own_key_comes_from_the_data(queue: StoreQueue) -> None:
    queue.declare(topics=("t",), mode="fifo", key=("a", "b"))
    for data in ('{"a": 1.50, "b": "x\\"y"}', '{"a": null}', '{"b": true}', "[1]"):
        publish(queue, data=data)
    assert [row["key"] for row in queue.receive()] == ['["1.50","x\\"y"]', None, '[null,"true"]', None]


@pytest.mark.parametrize("topic", [None, "", "public.t"])
def test_a_topic_has_a_name_without_a_dot(queue: StoreQueue, topic: str | None) -> None:
    with pytest.raises(psycopg.errors.DatabaseError, match="a name without a dot") as raised:
        queue.value("select cdcbridge.publish(%s, null, '1')", topic)
    assert raised.value.sqlstate == "CB004"


SHAPES: list[tuple[str, Any]] = [
    ("'{\"a\": 1.50}'", None),
    ("'{\"a\": 1.50}'::text", None),
    ("'{\"a\": 1.50}'::varchar", None),
    ("'{\"a\": 1.50}'::json", None),
    ("'{\"a\": 1.50}'::jsonb", None),
    ("json_build_object('a', 1.50)", None),
    ("jsonb_build_object('a', 1.50)", None),
    ("%s", '{"a": 1.50}'),
    ("%s::json", '{"a": 1.50}'),
    ("%s::jsonb", '{"a": 1.50}'),
    ("%s", Json({"a": 1.5})),
    ("%s", Jsonb({"a": 1.5})),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
def test_data_is_json_jsonb_or_a_literal(queue: StoreQueue, shape: tuple[str, Any], prepared: bool) -> None:
    queue.declare(topics=("t",))
    given, value = shape
    values = () if value is None else (value,)
    for call in (f"'t', 'k', {given}", f"'t', 'k', {given}, null, null", f"key => 'k', data => {given}, topic => 't'"):
        query = f"select cdcbridge.publish({call}) as seq"
        row = queue.session.execute(query.encode(), values, prepare=prepared).fetchone()
        assert row and queue.value("select data -> 'record' ->> 'a' from cdcbridge.messages where seq = %s", row["seq"])
    assert {float(row["data"]["record"]["a"]) for row in queue.receive()} == {1.5}


def test_a_domain_over_jsonb_and_null_are_data_and_other_types_are_refused(queue: StoreQueue) -> None:
    queue.declare(topics=("t",))
    queue.session.execute("create domain public.document as jsonb")
    queue.session.execute(
        "select cdcbridge.publish('t', null, '{}'::public.document), cdcbridge.publish('t', null, null)"
    )
    assert [row["data"]["record"] for row in queue.receive()] == [{}, None]
    for value in ("42", "true", "now()", "array[1]", "row(1, 2)"):
        with pytest.raises(psycopg.DatabaseError, match="must be json, jsonb or text that is JSON") as raised:
            queue.value(f"select cdcbridge.publish('t', null, {value})")
        assert raised.value.sqlstate == "CB004"
    with pytest.raises(psycopg.DatabaseError, match="invalid input syntax for type json"):
        queue.value("select cdcbridge.publish('t', null, 'hello'::text)")


def test_a_delay_counts_from_now_and_is_one_of_two(queue: StoreQueue, mode: str) -> None:
    late = publish(queue, "a", delay="5 min")
    assert queue.receive() == []
    table, column = ("waiting", "not_before") if mode == "fifo" else ("delayed", "visible_at")
    assert queue.value(f"select {column} - now() between '4 min 50 s' and '5 min' from cdcbridge_internal.{table}")
    queue.session.execute(f"update cdcbridge_internal.{table} set {column} = now() - interval '1 s'".encode())
    assert seqs(queue.receive()) == [late]
    assert seqs(queue.receive()) == [] and publish(queue, "b", delay="0") in seqs(queue.receive())
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"delay": "-1 s"}, "delay is -00:00:01, but must be at least 0 s"),
        ({"delay": "31 d"}, "delay is 31 days, but must be at most 30 days"),
        ({"delay": "1 s", "deliver_at": "2030-01-01 00:00+00"}, "only one of them may be given"),
    )
    for named, message in refused:
        with pytest.raises(psycopg.DatabaseError, match=message) as raised:
            publish(queue, **named)
        assert raised.value.sqlstate == "CB004"


def notices(session: psycopg.Connection[Any]) -> list[str]:
    """The notices of the session from now on."""
    found: list[str] = []
    session.execute("set client_min_messages = notice")
    session.add_notice_handler(lambda notice: found.append(str(notice.message_primary)))
    return found


def test_a_duplicate_can_be_told(queue: StoreQueue, mode: str) -> None:
    found = notices(queue.session)
    call = (
        "select seq, current_setting('cdcbridge.duplicate') as duplicate"
        " from cdcbridge.publish('t', 'k', '1', dedup_id => %s) seq"
    )
    first = queue.all(call, "x")
    assert first[0]["duplicate"] == "off" and found == []
    assert queue.all(call, "x") == [{"seq": first[0]["seq"], "duplicate": "on"}]
    assert found == [f"dedup_id 'x' of topic 't' was published before as seq {first[0]['seq']}, so nothing was added"]
    assert queue.all(call, "y")[0]["duplicate"] == "off", "it tells of the last one"


def test_the_loser_of_two_that_publish_one_dedup_id_is_told(queue: StoreQueue, mode: str) -> None:
    one, two = queue.open(autocommit=False), queue.open()
    found = notices(two)
    publish(queue, dedup_id="x", session=one)
    thread = threading.Thread(target=lambda: publish(queue, dedup_id="x", session=two))
    thread.start()
    waits = "select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    eventually(lambda: queue.all(waits), "it waits for the first")
    one.commit()
    thread.join()
    assert found == ["dedup_id 'x' of topic 't' was published before as seq 1, so nothing was added"]


def test_a_topic_that_nobody_lists_is_told_once_in_a_transaction(queue: StoreQueue) -> None:
    queue.declare(topics=("invoices",))
    queue.declare("audit", mode="stream", tables=(), topics=("visits",))
    session = queue.open(autocommit=False)
    found = notices(session)
    for topic in ("invoices", "visits", "invoicse", "invoicse"):
        publish(queue, topic=topic, session=session)
    assert found == ["no consumer lists the topic 'invoicse', so no consumer receives the message"]
    session.commit()
    publish(queue, topic="invoicse", session=session)
    assert len(found) == 2


@pytest.fixture(scope="module")
def hashing(pg15: EmbeddedServer) -> Any:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        yield made
        made.close()


@given(key=st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_sql_and_python_put_a_key_into_the_same_partition(hashing: StoreQueue, key: str | None) -> None:
    expected = partition_of(None if key is None else key.encode(), 4096)
    assert hashing.value("select cdcbridge.partition_of(%s, 4096)", key) == expected


# the gap guard


def test_a_fifo_consumer_never_passes_a_message_that_can_still_commit(queue: StoreQueue) -> None:
    queue.declare(mode="fifo", tables=(), topics=("t",))
    session = queue.open(autocommit=False)
    first = publish(queue, "a", session=session)
    second = publish(queue, "a")
    assert queue.receive() == []
    session.commit()
    assert seqs(queue.receive()) == [first, second]


def test_max_safe_seq_stops_at_the_oldest_open_publisher(queue: StoreQueue) -> None:
    safe = "select cdcbridge.max_safe_seq()"
    assert queue.value(safe) == 0
    sessions = [queue.open(autocommit=False) for _ in range(3)]
    drawn = [publish(queue, session=session) for session in sessions]
    assert queue.value(safe) == 0
    sessions[1].commit()
    assert queue.value(safe) == 0
    sessions[0].rollback()
    assert queue.value(safe) == drawn[1]
    sessions[2].commit()
    assert queue.value(safe) == drawn[2]


def test_a_sequence_with_a_cache_is_refused(queue: StoreQueue) -> None:
    queue.session.execute("create sequence public.cached cache 5")
    with pytest.raises(psycopg.errors.DatabaseError, match="has a cache") as raised:
        queue.value("select cdcbridge.register_sequence_transaction('public.cached')")
    assert raised.value.sqlstate == "CB004"


def test_many_messages_of_a_transaction_take_one_lock(queue: StoreQueue) -> None:
    session = queue.open(autocommit=False)
    for _ in range(50):
        publish(queue, session=session)
    locks = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
    assert queue.value(locks, session=session) == 1


def test_a_savepoint_that_is_rolled_back_does_not_unguard_the_transaction(queue: StoreQueue) -> None:
    session = queue.open(autocommit=False)
    session.execute("savepoint s")
    publish(queue, session=session)
    session.execute("rollback to s")
    publish(queue, session=session)
    assert queue.value("select cdcbridge.max_safe_seq()") == 1, "the first is gone, the second may still come"
    session.commit()
    assert queue.value("select cdcbridge.max_safe_seq()") == 2


@pytest.fixture
def busy(queue: StoreQueue) -> Callable[[], None]:
    """Other receivers do so much that the hint moves on."""

    def work() -> None:
        queue.session.execute("select cdcbridge.publish('t', null, '0') from generate_series(1, 300)")
        for _ in range(300):
            (row,) = queue.receive(1)
            queue.ack(row["receipt"])
        queue.append(5000)
        while batch := queue.receive(1000):
            queue.ack(*receipts(batch))

    return work


def test_a_message_that_commits_late_is_not_left_behind(queue: StoreQueue, busy: Callable[[], None]) -> None:
    queue.declare(topics=("t",))
    session = queue.open(autocommit=False)
    late = publish(queue, session=session)
    busy()
    assert queue.value("select max(claim_floor) from cdcbridge_internal.hints") > 250
    session.commit()
    assert seqs(queue.receive()) == [late]


def test_a_claim_that_commits_late_is_not_forgotten(queue: StoreQueue, busy: Callable[[], None]) -> None:
    queue.declare(topics=("t",))
    put = publish(queue)
    session = queue.open(autocommit=False)
    assert seqs(queue.receive(1, "0", session=session)) == [put]
    busy()
    session.commit()
    assert seqs(queue.receive()) == [put], "its visibility timeout has passed"


def test_a_message_stuck_in_flight_does_not_keep_the_hint_back(queue: StoreQueue, busy: Callable[[], None]) -> None:
    queue.declare(topics=("t",))
    put = publish(queue)
    queue.receive(1)
    busy()
    (hint,) = queue.all("select claim_floor, open_claims from cdcbridge_internal.hints order by id desc limit 1")
    assert hint["claim_floor"] > 250
    assert len(hint["open_claims"]) <= 2
    queue.expire()
    assert seqs(queue.receive()) == [put]


def test_publishers_and_the_bridge_share_the_sequence(queue: StoreQueue) -> None:
    """Appends draw blocks while others draw one by one; in fifo each key comes in log order, whatever commits when."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    consumer = queue.declare(mode="fifo", topics=("t",))
    finished = threading.Event()
    published: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        mine = random.Random(seed + number)
        session = queue.open(autocommit=False)
        for _ in range(60):
            drawn = [publish(queue, str(mine.randrange(3)), session=session) for _ in range(mine.randrange(1, 4))]
            if mine.random() < 0.2:
                session.rollback()
            else:
                session.commit()
                with lock:
                    published.extend(drawn)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()

    def append() -> None:
        for size in (1, 3, 200, 1, 130, 2):
            queue.append_keys(*[str(n % 3) for n in range(size)], consumers=(consumer,))

    threads.append(threading.Thread(target=append))
    threads[-1].start()
    got: dict[str, list[int]] = defaultdict(list)
    reader = queue.open()
    while True:
        if all(not thread.is_alive() for thread in threads):
            finished.set()
        batch = queue.receive(20, session=reader)
        for row in batch:
            got[row["key"]].append(row["seq"])
        queue.ack(*receipts(batch), session=reader)
        if not batch and finished.is_set():
            break
    everything = [seq for found in got.values() for seq in found]
    assert all(found == sorted(found) for found in got.values())
    assert sorted(everything) == [row["seq"] for row in queue.all("select seq from cdcbridge.messages order by seq")]
    assert set(published) <= set(everything)
    assert len(everything) == len(published) + 337
