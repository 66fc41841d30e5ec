"""Groups where the log changes under them: the number of partitions, segments that go or come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.harness.world import eventually
from tests.sql.queue import StoreQueue
from tests.sql.test_read_stream import drain, finish, publish, read


@pytest.fixture(autouse=True)
def _stream(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", topics=("news",), start="earliest")


def test_the_order_of_a_key_stays_when_partitions_are_added(queue: StoreQueue) -> None:
    before = publish(queue, *[f"k{n}" for n in range(40)])
    queue._store.set_partitions(64)
    after = publish(queue, *[f"k{n}" for n in range(40)])
    moved = {
        row["key"]
        for row in queue.all("select key from cdcbridge.messages group by key having count(distinct partition) > 1")
    }
    assert len(moved) > 10
    got: dict[str, list[int]] = {}
    stuck = queue.open(autocommit=False)
    held = read(queue, session=stuck)
    while rows := read(queue, 3, "1 min"):
        for row in rows:
            got.setdefault(row["key"], []).append(row["seq"])
        finish(queue, rows)
    assert sorted(s for seqs in got.values() for s in seqs) == sorted(set(before) - {row["seq"] for row in held}), (
        "nothing of after"
    )
    stuck.rollback()
    while rows := read(queue, 3, "1 min"):
        for row in rows:
            got.setdefault(row["key"], []).append(row["seq"])
        finish(queue, rows)
    assert got == {f"k{n}": [before[n], after[n]] for n in range(40)}
    assert queue.value("select count(*) from cdcbridge.consumer_group_offsets") == 64


def test_fewer_partitions_keep_the_order_too(queue: StoreQueue) -> None:
    before = publish(queue, *[f"k{n}" for n in range(20)])
    queue._store.set_partitions(3)
    after = publish(queue, *[f"k{n}" for n in range(20)])
    assert queue.value("select max(partition) from cdcbridge.messages where seq >= %s", after[0]) == 2
    got = drain(queue, 5)
    assert sorted(got) == before + after
    assert set(got[:20]) == set(before)


def test_a_group_that_is_made_while_partitions_are_added_has_all_of_them(queue: StoreQueue) -> None:
    publish(queue, "a")
    bridge = queue.open(autocommit=False)
    bridge.execute("set search_path = cdcbridge, cdcbridge_internal")
    assert queue.value("select begin_partitions(32)", session=bridge)
    with ThreadPoolExecutor() as pool:
        made = pool.submit(queue.declare, "late", mode="stream")
        waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'advisory'"
        eventually(lambda: queue.value(waits) == 1, "the new group waits")
        bridge.commit()
        queue.value("select finish_partitions(32)", session=bridge)
        bridge.commit()
        made.result()
    assert [row["partition"] for row in queue.all("select partition from cdcbridge.group_lag('late')")] == list(
        range(32)
    )


def test_publishers_and_python_agree_on_partitions(queue: StoreQueue) -> None:
    from cdcbridge.changes.keys import partition_of

    publish(queue, "a", "ü€", "", "42")
    rows = queue.all("select key, partition from cdcbridge.messages")
    assert [row["partition"] for row in rows] == [partition_of(row["key"].encode(), 16) for row in rows]


def test_retention_tells_a_group_that_was_too_slow(queue: StoreQueue) -> None:
    publish(queue, "a", "a", "b")
    first = read(queue, 1, "1 hour")
    queue.next_segment()
    dropped = "select dropped, held_by, lost from cdcbridge_internal.drop_segments('0')"
    assert queue.all(dropped) == [{"dropped": 0, "held_by": "s", "lost": 0}], "a member reads there"
    finish(queue, first)
    assert queue.all(dropped) == [{"dropped": 1, "held_by": None, "lost": 2}]
    with pytest.raises(psycopg.Error, match="slower than the log's retention") as refused:
        read(queue)
    assert refused.value.sqlstate == "CB009"
    assert refused.value.diag.message_hint is not None and "seek" in refused.value.diag.message_hint
    assert sum(row["lost"] or 0 for row in queue.all("select lost from cdcbridge.group_lag('s')")) == 2
    with pytest.raises(psycopg.Error, match="is before the beginning of the log"):
        queue.value("select cdcbridge.seek('s', '1')")
    queue.value("select cdcbridge.seek('s', 'earliest')")
    put = publish(queue, "a")
    assert drain(queue) == put


def test_a_reader_that_has_waited_for_the_drop_is_told_too(queue: StoreQueue) -> None:
    publish(queue, "a", "a")
    put = queue.value("select max(seq) from cdcbridge.messages")
    queue.next_segment()
    later = publish(queue, "a")
    dropper, reader = queue.open(autocommit=False), queue.open()
    assert queue.value("select lost from cdcbridge_internal.drop_segments('0')", session=dropper) == 2
    refused: list[str | None] = []

    def look() -> None:
        # The server gives the dropper's locks back one by one: the table's, and then the partition's, which is not waited for.
        # A reader between the two gets nothing, and is told by its next read.
        try:
            while not refused:
                assert queue.all("select * from cdcbridge.read_stream('s')", session=reader) == []
        except psycopg.Error as error:
            refused.append(error.sqlstate)

    thread = threading.Thread(target=look)
    thread.start()
    waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
    eventually(lambda: queue.value(waits, reader.info.backend_pid), "the reader waits for the drop")
    dropper.commit()
    thread.join()
    assert refused == ["CB009"]
    assert later[0] > put


def test_retention_loses_nothing_of_a_group_that_had_nothing_to_read_there(queue: StoreQueue) -> None:
    publish(queue, "a")
    queue.value("select cdcbridge.publish('other', 'b', '1')")
    drain(queue)
    queue.next_segment()
    assert queue.value("select lost from cdcbridge_internal.drop_segments('0')") == 0
    put = publish(queue, "a", "b")
    assert sorted(drain(queue)) == put
    assert queue.value("select lost from cdcbridge_internal.drop_segments('0')") == 0


def test_the_index_that_groups_read_by_is_on_every_segment(queue: StoreQueue) -> None:
    queue.next_segment()
    tables = """select count(*), count(*) filter (where exists (
                    select from pg_indexes i where i.tablename = c.relname and i.indexdef like '%(partition, seq)')) as indexed
                from pg_inherits h join pg_class c on c.oid = h.inhrelid
                where h.inhparent = 'cdcbridge.messages'::regclass"""
    counted = queue.session.execute(tables.encode()).fetchone()
    assert counted == {"count": 3, "indexed": 3}
