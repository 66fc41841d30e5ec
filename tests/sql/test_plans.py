"""What the functions' statements really do, by EXPLAIN (ANALYZE): never a scan of what is not theirs, whatever the
statistics say, and however much of what is finished an old snapshot keeps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import store_database
from tests.sql.queue import Row, StoreQueue
from tests.sql.test_queue import receipts

BATCH = 50
MOST = 6 * BATCH  # rows that one node may touch
READ = "select * from cdcbridge.read_stream('s', %s, %s::interval)"
COMMIT = "select cdcbridge.commit_offset('s', %s, %s, %s)"
TRACE = """
    load 'auto_explain';
    set auto_explain.log_min_duration = 0;
    set auto_explain.log_analyze = on;
    set auto_explain.log_timing = off;
    set auto_explain.log_buffers = on;
    set auto_explain.log_nested_statements = on;
    set auto_explain.log_format = json;
    set client_min_messages = log
"""


@pytest.fixture
def queue(pg15: EmbeddedServer) -> Iterator[StoreQueue]:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        made.session.execute("alter database current_database set jit = on".replace("current_database", database))
        yield made
        made.close()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def touched(node: dict[str, Any]) -> float:
    removed = sum(value for name, value in node.items() if name.startswith("Rows Removed"))
    return float((node["Actual Rows"] + removed) * node["Actual Loops"])


def claim_and_settle(queue: StoreQueue, session: psycopg.Connection[Row]) -> None:
    """A claim, and all that can be done to it."""
    batch = queue.receive(BATCH, session=session)
    assert len(batch) == BATCH
    queue.all("select cdcbridge.extend('c', %s, '1 min')", receipts(batch[:5]), session=session)
    queue.ack(*receipts(batch[:20]), session=session)
    queue.all("select cdcbridge.nack('c', %s, '0')", receipts(batch[20:25]), session=session)
    queue.ack(*receipts(queue.receive(BATCH, session=session)), session=session)
    queue.all("select cdcbridge_internal.bury_expired()", session=session)
    queue.all("select cdcbridge.next_visible('c')", session=session)


def read_and_commit(queue: StoreQueue, session: psycopg.Connection[Row]) -> None:
    """Reads of several partitions, their commits, and a look whether there is more."""
    for lease in (None, "1 min"):
        for _ in range(3):
            with session.transaction():
                rows = queue.all(READ, BATCH, lease, session=session)
                assert len(rows) == BATCH
                last = rows[-1]
                queue.all(COMMIT, last["partition"], last["seq"], last["receipt"], session=session)
    queue.all("select cdcbridge.next_readable('s')", session=session)


def traced(
    queue: StoreQueue, act: Callable[[StoreQueue, psycopg.Connection[Row]], None] = claim_and_settle
) -> list[dict[str, Any]]:
    """The plans of every statement."""
    plans: list[dict[str, Any]] = []
    session = queue.open()
    session.execute(TRACE)

    def keep(notice: psycopg.errors.Diagnostic) -> None:
        _, found, plan = str(notice.message_primary).partition("plan:\n")
        if found:
            plans.append(json.loads(plan))

    session.add_notice_handler(keep)
    act(queue, session)
    assert len(plans) > 50
    return plans


def hold(queue: StoreQueue) -> None:
    """An old snapshot, to the end of the test."""
    old = queue.open(autocommit=False)
    old.execute("set transaction isolation level repeatable read")
    old.execute("select pg_current_xact_id()")


@pytest.mark.parametrize("mode", ["queue", "fifo"])
@pytest.mark.parametrize("statistics", ["missing", "of empty tables", "fresh"])
def test_nothing_is_touched_that_is_not_needed(queue: StoreQueue, mode: str, statistics: str) -> None:
    queue.declare(mode=mode, max_in_flight=100_000)
    for table in ("leases", "waiting_1", "messages_000000"):
        queue.session.execute(f"alter table cdcbridge_internal.{table} set (autovacuum_enabled = off)")
    if statistics == "of empty tables":
        queue.session.execute("analyze")
    for _ in range(10):
        queue.append_keys(*[str(n % 2500) for n in range(5000)])
    queue.receive(3, "1 hour")
    for _ in range(50):
        queue.receive(40)
    if statistics == "fresh":
        queue.session.execute("analyze")
    plans = traced(queue)
    for plan in plans:
        for node in nodes(plan["Plan"]):
            relation = node.get("Relation Name", "")
            if relation and not relation.startswith("pg_"):
                where = f"{node['Node Type']} on {relation} in {plan['Query Text']}"
                assert node["Node Type"] != "Seq Scan" or relation in ("consumers", "partitionings", "limits"), where
                # In fifo a claim has to look at the keys in flight, which max_in_flight bounds.
                assert touched(node) <= MOST, f"{touched(node)} rows: {where}"
    assert not any("JIT" in plan for plan in plans)


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_what_is_finished_is_not_waded_through(queue: StoreQueue, mode: str) -> None:
    """Under an old snapshot all of it is still there; and messages are stuck at the head, in fifo with all of their keys."""
    queue.declare(mode=mode)
    for _ in range(3):
        queue.append_keys(*[str(n % 2500) for n in range(5000)])
    queue.receive(3, "1 hour")
    hold(queue)
    for n in range(2000):
        queue.ack(*receipts(queue.receive(7)))
        if n == 1500:
            queue.session.execute("vacuum")  # as autovacuum does: it counts the rows, and tells the planner
    for plan in traced(queue):
        for node in nodes(plan["Plan"]):
            blocks = node.get("Shared Hit Blocks", 0) + node.get("Shared Read Blocks", 0)
            if node.get("Relation Name", "").startswith(("leases", "waiting", "settled", "delayed", "hints")):
                assert blocks <= 200, f"{blocks} blocks: {node['Node Type']} on {node['Relation Name']}"


def test_a_key_with_100000_messages_does_not_slow_the_others(queue: StoreQueue) -> None:
    queue.declare(mode="fifo")
    queue.append_keys("hot")
    queue.receive(1, "1 hour")
    for _ in range(10):
        queue.append_keys(*["hot"] * 10_000)
    queue.append_keys(*[str(n) for n in range(5000)])
    assert len(queue.receive(1)) == 1, "what is passed by is cut up"
    while queue.value("select cdcbridge_internal.merge_runs()"):
        pass
    assert queue.value("select count(*) from cdcbridge_internal.waiting_1 where keys = '{hot}'") <= 110
    for plan in traced(queue):
        for node in nodes(plan["Plan"]):
            assert touched(node) <= MOST, f"{touched(node)} rows: {node['Node Type']} in {plan['Query Text']}"


def in_every_partition(queue: StoreQueue, messages: int) -> None:
    queue.session.execute("select cdcbridge.publish('news', g::text, '1') from generate_series(1, %s) g", (messages,))


@pytest.mark.parametrize("statistics", ["missing", "of empty tables", "fresh"])
def test_a_group_reads_its_partition_alone(queue: StoreQueue, statistics: str) -> None:
    queue.declare("s", mode="stream", topics=("news",))
    for table in ("offsets", "messages_000000"):
        queue.session.execute(f"alter table cdcbridge_internal.{table} set (autovacuum_enabled = off)")
    if statistics == "of empty tables":
        queue.session.execute("analyze")
    in_every_partition(queue, 20_000)
    if statistics == "fresh":
        queue.session.execute("analyze")
    for plan in traced(queue, read_and_commit):
        for node in nodes(plan["Plan"]):
            relation = node.get("Relation Name", "")
            if relation and not relation.startswith("pg_"):
                where = f"{node['Node Type']} on {relation} in {plan['Query Text']}"
                assert node["Node Type"] != "Seq Scan" or relation in ("consumers", "partitionings", "limits"), where
                assert touched(node) <= 2 * BATCH, f"{touched(node)} rows: {where}"
        assert "JIT" not in plan


def test_a_groups_finished_offsets_are_not_waded_through(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", topics=("news",))
    in_every_partition(queue, 20_000)
    hold(queue)
    for n in range(2000):
        rows = queue.all(READ, 1, None if n % 2 else "1 min")
        queue.all(COMMIT, rows[0]["partition"], rows[0]["seq"], rows[0]["receipt"])
        if n == 1500:
            queue.session.execute("vacuum")
    for plan in traced(queue, read_and_commit):
        for node in nodes(plan["Plan"]):
            blocks = node.get("Shared Hit Blocks", 0) + node.get("Shared Read Blocks", 0)
            if node.get("Relation Name", "").startswith("offsets"):
                assert blocks <= 16 * 5, f"{blocks} blocks: {node['Node Type']} in {plan['Query Text']}"
