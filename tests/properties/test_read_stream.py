"""Streams as a state machine: publishers that commit out of order, roll back and hang, members that die, and a group that must
see every message once, in order within its partition, and never pass one that can still come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import store_database
from tests.sql.queue import Row, StoreQueue

SESSIONS = 4
session_numbers = st.integers(0, SESSIONS - 1)
keys = st.sampled_from(["a", "b", "c", "d", None])


class Machine(RuleBasedStateMachine):
    """Some sessions that publish, some members of one group of everything, one of tables alone."""

    queue: StoreQueue
    publishers: list[psycopg.Connection[Row]]
    members: list[psycopg.Connection[Row]]

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[int, list[tuple[int, str | None]]] = {}  # by publisher: what it has published and not committed
        self.committed: dict[int, str | None] = {}
        self.tables: list[int] = []
        self.read: list[int] = []  # as the group committed it
        self.last: dict[int, int] = {}  # the group's offset by partition
        self.held: dict[
            int, list[tuple[int, int]]
        ] = {}  # by member: (partition, seq) of what its transaction committed
        self.safe = 0
        self.keys: dict[str, list[int]] = {}

    @initialize()
    def begin(self) -> None:
        for name in [row["name"] for row in self.queue.all("select name from cdcbridge.consumers")]:
            self.queue.value("select cdcbridge_internal.remove_consumer(%s)", name)
        self.queue.declare("s", mode="stream", topics=("news",))
        self.queue.declare("t", mode="stream")

    @rule(number=session_numbers, key=keys)
    def publish(self, number: int, key: str | None) -> None:
        seq = self.queue.value("select cdcbridge.publish('news', %s, '1')", key, session=self.publishers[number])
        self.open.setdefault(number, []).append((seq, key))

    @rule(number=session_numbers)
    def publish_in_a_savepoint_that_goes(self, number: int) -> None:
        with self.publishers[number].transaction(force_rollback=True):
            self.queue.value("select cdcbridge.publish('news', 'a', '1')", session=self.publishers[number])
        self.open.setdefault(number, [])

    @rule(number=session_numbers, commit=st.booleans())
    def end(self, number: int, commit: bool) -> None:
        self.publishers[number].commit() if commit else self.publishers[number].rollback()
        published = self.open.pop(number, [])
        if commit:
            self.committed.update(published)

    @rule(keys=st.lists(keys, min_size=1, max_size=5))
    def append(self, keys: list[str | None]) -> None:
        appended = self.queue.append_keys(*keys, consumers=())
        self.tables += appended
        self.committed.update(zip(appended, keys, strict=True))

    @rule(partitions=st.sampled_from([2, 5, 16]))
    def change_partitions(self, partitions: int) -> None:
        self.queue._store.set_partitions(partitions)

    @rule(number=session_numbers, count=st.integers(1, 5))
    def read_in_a_transaction(self, number: int, count: int) -> None:
        member = self.members[number]
        rows = self.queue.all("select * from cdcbridge.read_stream('s', %s)", count, session=member)
        if rows:
            last = rows[-1]
            self.queue.value(
                "select cdcbridge.commit_offset('s', %s, %s)", last["partition"], last["seq"], session=member
            )
            self.held.setdefault(number, []).extend((row["partition"], row["seq"]) for row in rows)

    @rule(number=session_numbers, commit=st.booleans())
    def end_reading(self, number: int, commit: bool) -> None:
        self.members[number].commit() if commit else self.members[number].rollback()
        for partition, seq in self.held.pop(number, []):
            if commit:
                self.note(partition, seq)

    @rule(count=st.integers(1, 5), die=st.booleans())
    def read_under_a_lease(self, count: int, die: bool) -> None:
        rows = self.queue.all("select * from cdcbridge.read_stream('s', %s, '1 hour')", count)
        if rows and die:
            self.queue.session.execute("update cdcbridge_internal.offsets set leased_until = now() - interval '1 s'"
                                       " where leased_until is not null")  # fmt: skip
        elif rows:
            last = rows[-1]
            self.queue.value(
                "select cdcbridge.commit_offset('s', %s, %s, %s)", last["partition"], last["seq"], last["receipt"]
            )
            for row in rows:
                self.note(row["partition"], row["seq"])

    def note(self, partition: int, seq: int) -> None:
        assert seq > self.last.get(partition, 0), "in order, and once"
        self.last[partition] = seq
        assert seq in self.committed
        self.read.append(seq)
        key = self.committed[seq]
        if key is not None and seq not in self.tables:  # the tests' bridge puts all in one partition
            assert seq > max(self.keys.get(key, [0])), "a key in order"
            self.keys.setdefault(key, []).append(seq)

    @invariant()
    def nothing_is_passed(self) -> None:
        safe = self.queue.value("select cdcbridge.max_safe_seq()")
        assert safe >= self.safe, "it never falls"
        assert all(seq > safe for published in self.open.values() for seq, _ in published)
        self.safe = safe

    def teardown(self) -> None:
        for session in (*self.publishers, *self.members):
            session.rollback()
        if not hasattr(self, "queue") or not self.queue.value("select count(*) from cdcbridge.consumers"):
            return
        self.held.clear()
        before = len(self.read)
        while True:
            self.read_under_a_lease(5, die=False)
            if len(self.read) == before:
                break
            before = len(self.read)
        assert sorted(self.read) == sorted(self.committed), "everything, once"
        seen: list[int] = []
        while rows := self.queue.all("select * from cdcbridge.read_stream('t', 10000, '1 min')"):
            seen += [row["seq"] for row in rows]
            last = rows[-1]
            self.queue.value(
                "select cdcbridge.commit_offset('t', %s, %s, %s)", last["partition"], last["seq"], last["receipt"]
            )
        assert seen == self.tables


@pytest.fixture(scope="module")
def stage(pg15: EmbeddedServer) -> Iterator[dict[str, Any]]:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        yield {
            "queue": made,
            "publishers": [made.open(autocommit=False) for _ in range(SESSIONS)],
            "members": [made.open(autocommit=False) for _ in range(SESSIONS)],
        }
        made.close()


@pytest.mark.timeout(900)  # a failure is made small first, which takes minutes
def test_a_group_sees_everything_once_and_in_order(stage: dict[str, Any]) -> None:
    machine = type("Machine", (Machine,), stage)
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
