"""What the log holds, for a queue consumer: at its start, and once more."""

from __future__ import annotations

import threading

import psycopg
import pytest

from cdcbridge.routing.subscription import Subscription
from cdcbridge.store import replay as backlog
from tests.harness import crash
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts, seqs


def test_what_comes_while_a_new_consumer_is_filled_is_not_left_out(queue: StoreQueue) -> None:
    first = queue.append_keys(*"xyz", consumers=())
    late = queue.open(autocommit=False)
    held = queue.value("select cdcbridge.publish('news', 'late', '1')", session=late)
    meanwhile: list[int] = []

    def traffic() -> None:
        bridge = StoreQueue(queue.dsn)  # takes the lead, and knows nothing of the new consumer
        bridge._lsn = 10_000
        meanwhile.extend(bridge.append_keys("a", "b", consumers=()))
        bridge.close()
        meanwhile.append(queue.value("select cdcbridge.publish('news', 'k', '1')", session=queue.open()))
        late.commit()

    with crash.at("log page filled in", traffic):
        queue.declare(topics=("news",), start="earliest")
    after = queue.value("select cdcbridge.publish('news', 'k', '1')")
    assert seqs(queue.receive(20)) == sorted([*first, held, *meanwhile, after])


def replay(queue: StoreQueue, low: int, high: int, name: str = "c") -> tuple[int, int]:
    (row,) = queue.all("select id, name, mode, config from cdcbridge.consumers where name = %s", name)
    with psycopg.connect(queue.dsn, autocommit=True) as store, psycopg.connect(queue.dsn, autocommit=True) as reader:
        for session in (store, reader):
            session.execute("set search_path = cdcbridge, cdcbridge_internal")
        with reader.transaction():
            return backlog.replay(store, reader, Subscription.from_config(*row.values()), low, high)


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_what_was_finished_comes_again_behind_all_that_waits(queue: StoreQueue, mode: str) -> None:
    queue.declare(mode=mode)
    put = queue.append_keys("a", "b", "a", "c")
    queue.ack(*receipts(queue.receive()))
    later = queue.append_keys("d")
    assert replay(queue, put[0], put[2]) == (3, 0)
    rows = queue.receive()
    assert seqs(rows) == [*later, *put[:3]]
    assert [row["deliver_count"] for row in rows] == [1] * 4
    assert [row["key"] for row in rows] == ["d", "a", "b", "a"]
    assert queue.value("select count(*) from cdcbridge_internal.redriven where replayed") == 3
    assert queue.ack(*receipts(rows)) == 4
    assert queue.value("select count(*) from cdcbridge_internal.redriven") == 0
    assert queue.value("select count(*) from cdcbridge.messages") == 5, "nothing is logged again"


def test_what_waits_or_is_in_flight_is_skipped_and_counted(queue: StoreQueue) -> None:
    queue.declare()
    put = queue.append(5)
    first = queue.receive(2)
    queue.ack(first[0]["receipt"])
    queue.nack(first[1]["receipt"], delay="1 hour")
    queue.receive(1)
    assert replay(queue, put[0], put[-1]) == (1, 4)
    assert replay(queue, put[0], put[-1]) == (0, 5)
    assert seqs(queue.receive()) == [put[3], put[4], put[0]]


def test_only_what_the_consumer_takes_today_is_replayed(queue: StoreQueue) -> None:
    queue.declare(topics=("news",), filter="record.id >= 1", key=("secret",))
    put = queue.append(3)
    queue.value("select cdcbridge.publish('news', 'k', '{\"secret\": \"n\"}')")
    queue.value("select cdcbridge.publish('other', 'k', '{}')")
    queue.ack(*receipts(queue.receive()))
    assert replay(queue, 0, 1 << 62) == (3, 0)
    assert [(row["seq"], row["key"]) for row in queue.receive()] == [(put[1], "s"), (put[2], "s"), (put[2] + 1, "n")]


def test_a_replayed_truncate_is_a_barrier_again(queue: StoreQueue) -> None:
    queue.declare(mode="fifo")
    put = queue.append_keys("a", "!", "b")
    for seq in put:
        (row,) = queue.receive()
        assert row["seq"] == seq
        queue.ack(row["receipt"])
    assert replay(queue, put[0], put[-1]) == (3, 0)
    assert seqs(queue.receive()) == put[:1]


def test_replayed_messages_outlive_their_segment(queue: StoreQueue) -> None:
    queue.declare()
    put = queue.append(2)
    queue.ack(*receipts(queue.receive()))
    replay(queue, put[0], put[-1])
    queue.value("select setval('cdcbridge.messages_seq', 1000000)")
    queue.value("select cdcbridge_internal.create_segments()")
    assert queue.value("select dropped from cdcbridge_internal.drop_segments('0')") == 1
    rows = queue.receive()
    assert seqs(rows) == put and rows[0]["data"]["record"]["id"] == 0


def test_a_consumer_that_is_removed_meanwhile_is_told(queue: StoreQueue) -> None:
    queue.declare()
    with pytest.raises(psycopg.Error, match="was removed"):
        queue.all("select cdcbridge_internal.replay_messages(99, '{1}', null, null, null)")


def test_expiring_leaves_a_message_in_one_place_while_receivers_are_at_work(queue: StoreQueue) -> None:
    """A row of waiting that a claim has cut while it was waited for is another version, at another place in the table."""
    queue.declare(max_in_flight=100_000)
    put = queue.append(5000)
    queue.session.execute("select setval('cdcbridge.messages_seq', 1000000)")
    queue.value("select cdcbridge_internal.create_segments()")
    claimed: list[int] = []
    done = threading.Event()

    def work() -> None:
        session = queue.open()
        while not done.is_set() and (rows := queue.receive(7, session=session)):
            claimed.extend(seqs(rows))

    thread = threading.Thread(target=work)
    thread.start()
    expired = 0
    while more := queue.value("select expired from cdcbridge_internal.drop_segments('0', '0')"):
        expired += more
    done.set()
    thread.join()
    while rows := queue.receive(100):
        claimed.extend(seqs(rows))
    dead = [row["seq"] for row in queue.all("select seq from cdcbridge.dead_messages")]
    assert len(dead) == expired
    assert sorted(claimed + dead) == put, "each in one place"


@pytest.mark.parametrize("call", ["dead_letters", "redrive", "purge"])
def test_a_seq_in_place_of_the_id_of_a_dead_letter_is_recognised(queue: StoreQueue, call: str) -> None:
    queue.declare("c")
    put = queue.append_keys("a", "b", "c")
    for seq in put[1:]:
        queue.all("select cdcbridge_internal.bury_appended('{1}', %s, '{oversized}', '{k}') is null", [seq])
    ids = {row["seq"]: row["id"] for row in queue.all("select seq, id from cdcbridge.dead_messages")}
    unknown = [put[2] + 100, put[1] + 100]
    queue.session.execute("update cdcbridge.dead_messages set seq = seq + 100")
    with pytest.raises(psycopg.Error) as raised:
        queue.all(f"select cdcbridge.{call}('c', %s)", [*unknown, 77])
    assert raised.value.diag.message_hint == (
        f"The dead letter with the seq {put[1] + 100} has the id {ids[put[1]]}."
        f" The dead letter with the seq {put[2] + 100} has the id {ids[put[2]]}."
    )
    with pytest.raises(psycopg.Error) as raised:
        queue.all(f"select cdcbridge.{call}('c', '{{77}}')")
    assert raised.value.diag.message_hint == "`cdcbridge dead list c` prints the ids."
