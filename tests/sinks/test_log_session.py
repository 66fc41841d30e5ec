"""How a sink reads the log: every message once, along an index, and never so that it cannot end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import CdcbridgeError, StoreUnavailable
from cdcbridge.sinks.log_row import LogRow, read_integers, time_json
from cdcbridge.sinks.log_session import SETTINGS, LogSession
from tests.harness.world import eventually, store_database
from tests.sql.queue import StoreQueue

KEYS = [str(n) for n in range(200)]
SCANS = (
    "select * from scan_lane(0, 1, 0, 10, %s, null, 1000)",
    "select * from scan_partition(0, 0, 10, %s, null, 1000)",
)


@pytest.fixture
def queue(pg15: EmbeddedServer) -> Iterator[StoreQueue]:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        made.declare("events", mode="stream")
        yield made
        made.close()


@asynccontextmanager
async def opened(queue: StoreQueue) -> AsyncIterator[LogSession]:
    session = LogSession(queue.dsn, "cdcbridge")
    try:
        yield session
    finally:
        await session.close()


async def everything(session: LogSession, lane: int, lanes: int, most: int = 7) -> list[LogRow]:
    """Read a lane to its end, in many reads."""
    found: list[LogRow] = []
    while rows := await session.read(1, lane, lanes, found[-1].seq if found else 0, most):
        assert len(rows) <= most
        found += rows
    return found


@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_the_lanes_have_each_message_once_and_in_order(queue: StoreQueue, lanes: int) -> None:
    seqs = queue.append_changes(*(("insert", key, None) for key in KEYS))
    queue.next_segment()
    seqs += queue.append_changes(*(("delete", key, None) for key in KEYS))

    async def read() -> list[list[LogRow]]:
        async with opened(queue) as session:
            return [await everything(session, lane, lanes) for lane in range(lanes)]

    found = asyncio.run(read())
    for rows in found:
        assert [row.seq for row in rows] == sorted(row.seq for row in rows)
    assert sorted(row.seq for rows in found for row in rows) == seqs
    by_seq = {row.seq: row for rows in found for row in rows}
    for one in queue.all("select seq, topic, key, partition, data::text, commit_lsn::text, ordinal, xid,"
                         " to_json(commit_time)::text, to_json(inserted_at)::text from cdcbridge.messages"):  # fmt: skip
        row = by_seq[one["seq"]]
        shared = ("topic", "key", "partition", "data", "ordinal", "xid")
        assert [getattr(row, name) for name in shared] == [one[name] for name in shared]
    assert all(row.partition % lanes == lane for lane, rows in enumerate(found) for row in rows)


@pytest.mark.parametrize("time", ["2026-05-01 10:00:00.5+00", "1999-12-31 23:59:59.999999+00", "2000-01-01 00:00+00"])
def test_a_time_has_the_text_that_the_server_gives_it(queue: StoreQueue, time: str) -> None:
    cursor = queue.session.cursor(binary=True, row_factory=psycopg.rows.tuple_row)
    read_integers(cursor)
    row: Any = cursor.execute("select t, to_json(t)::text from (values (%s::timestamptz)) v (t)", (time,)).fetchone()
    assert time_json(row[0]) == row[1]


@pytest.mark.parametrize("scan", SCANS)
def test_the_scan_is_a_part_of_the_statement_and_follows_an_index(queue: StoreQueue, scan: str) -> None:
    """A function that is not inlined would store all of its rows before it returns the first."""
    queue.append_changes(*(("insert", key, None) for key in KEYS))
    queue.session.execute("set search_path = cdcbridge, cdcbridge_internal")
    wish = queue.value("select wish_of(c)::text from consumers c")
    for setting, value in SETTINGS.items():
        queue.session.execute("select set_config(%s, %s, false)", (setting, value))
    plan = queue.value(f"explain (format json) {scan}", wish)
    text = plan if isinstance(plan, str) else json.dumps(plan)
    assert "Function Scan" not in text
    assert "Index Scan" in text and "Sort" not in text and "Seq Scan" not in text


def test_messages_that_retention_dropped_are_named(queue: StoreQueue) -> None:
    seqs = queue.append_changes(("insert", "1", None))
    queue.session.execute("update cdcbridge_internal.offsets set lost = 5 where partition = 0")

    async def read() -> None:
        async with opened(queue) as session:
            for _ in range(2):
                with pytest.raises(CdcbridgeError, match="dropped 5 unread messages"):
                    await session.read(1, 0, 1, 0, 10)
            queue.session.execute("select cdcbridge.seek('events', 'earliest')")
            assert [row.seq for row in await session.read(1, 0, 1, 0, 10)] == seqs

    asyncio.run(read())


def test_a_session_that_was_ended_is_opened_again(queue: StoreQueue) -> None:
    seqs = queue.append_changes(("insert", "1", None))
    end = "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity where application_name like %s"

    async def read() -> None:
        async with opened(queue) as session:
            assert [row.seq for row in await session.read(1, 0, 1, 0, 10)] == seqs
            assert queue.value(end, "cdcbridge sinks, reading") == 1
            with suppress(StoreUnavailable):  # unless the end is noticed before the statement
                await session.read(1, 0, 1, 0, 10)
            assert [row.seq for row in await session.read(1, 0, 1, 0, 10)] == seqs

    asyncio.run(read())


def test_a_session_that_waits_for_a_lock_ends_at_once(queue: StoreQueue) -> None:
    holder = queue.open(autocommit=False)
    holder.execute("lock table only cdcbridge.messages in access exclusive mode")
    waits = "select count(*) from pg_stat_activity where application_name = %s and wait_event_type = 'Lock'"

    async def leave() -> float:
        session = LogSession(queue.dsn, "cdcbridge")
        reading = asyncio.create_task(session.read(1, 0, 1, 0, 10))
        await asyncio.to_thread(eventually, lambda: queue.value(waits, "cdcbridge sinks, reading") == 1)
        began = time.monotonic()
        reading.cancel()
        await session.close()
        return time.monotonic() - began

    assert asyncio.run(leave()) < 4
