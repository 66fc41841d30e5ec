"""The queue as a state machine, against a small model: on the real functions, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import store_database
from tests.sql.queue import StoreQueue

MAX_DELIVERIES = 3
CLOCK = """
    create or replace function cdcbridge_internal.moment() returns timestamptz language sql volatile as
    $$ select current_setting('test.clock')::timestamptz $$
"""


@dataclass
class Message:
    """A message as the model has it. `place` is its place among the messages of its key."""

    seq: int
    key: str | None
    place: tuple[int, int]
    state: str = "waiting"  # waiting, in flight, delayed, dead, done
    count: int = 0
    visible_at: float = 0.0
    receipt: str = ""
    claim: tuple[int, int] = (0, 0)
    stale: list[str] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    """One consumer, and whoever calls its functions."""

    mode = "queue"
    max_in_flight = 6
    queue: StoreQueue

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.messages: dict[int, Message] = {}
        self.claims = 0
        self.redrives = 0

    @initialize()
    def begin(self) -> None:
        session = self.queue.session
        if self.queue.value("select count(*) from cdcbridge.consumers"):
            session.execute("select cdcbridge_internal.remove_consumer('c')")
        self.consumer = self.queue.declare(mode=self.mode, topics=("t",), max_deliveries=MAX_DELIVERIES,
                                           max_in_flight=self.max_in_flight, visibility_timeout="10s",
                                           retry_delay={"initial": "5s", "factor": 2, "max": "60s"})  # fmt: skip
        self.tick(0)

    def at(self, seconds: float) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)

    # what happens

    @rule(seconds=st.sampled_from([0, 1, 5, 11, 70]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.queue.session.execute("select set_config('test.clock', %s, false)", (self.at(self.now).isoformat(),))

    @rule(keys=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8), large=st.booleans())
    def append(self, keys: list[str | None], large: bool) -> None:
        keys = keys * 20 if large and len(self.messages) < 50 else keys
        for seq, key in zip(self.queue.append_keys(*keys, consumers=(self.consumer,)), keys, strict=True):
            self.messages[seq] = Message(seq, key, (seq, 0))

    @rule(key=st.sampled_from(["a", "b", None]), delay=st.sampled_from([None, 3.0, 30.0]))
    def publish(self, key: str | None, delay: float | None) -> None:
        at = None if delay is None else self.at(self.now + delay)
        seq = self.queue.value("select cdcbridge.publish('t', %s, '1', %s)", key, at)
        self.messages[seq] = Message(seq, key, (seq, 0), visible_at=0 if delay is None else self.now + delay)
        if delay is not None and self.mode == "queue":
            self.messages[seq].state = "delayed"

    @rule(count=st.integers(1, 9), timeout=st.sampled_from([None, 0.0, 2.0, 100.0]), commit=st.booleans())
    def receive(self, count: int, timeout: float | None, commit: bool) -> None:
        free = self.max_in_flight - sum(self.flies(m) for m in self.messages.values())
        dying = [m for m in self.expired() if m.count >= MAX_DELIVERIES]
        with self.queue.session.transaction(force_rollback=not commit):
            rows = self.queue.receive(count, None if timeout is None else f"{timeout} s")
        eligible = self.eligible()
        assert len(rows) == min(count, free, len(eligible)), (rows, eligible)
        if not commit:
            self.check_order(rows)
            return
        self.check_order(rows)
        if free > 0:
            # The expired last deliveries that stood in the way have died; how many of them that is, the server says.
            dead = {row["seq"] for row in self.queue.all("select seq from cdcbridge.dead_messages")}
            for message in dying:
                if message.seq in dead:
                    message.state = "dead"
        self.claims += 1
        for ordinal, row in enumerate(rows):
            message = self.messages[row["seq"]]
            if message.receipt:
                message.stale.append(message.receipt)
            message.count += 1
            assert row["deliver_count"] == message.count
            assert row["key"] == message.key
            message.state, message.receipt, message.claim = "in flight", row["receipt"], (self.claims, ordinal)
            message.visible_at = self.now + (10.0 if timeout is None else timeout)

    @rule(data=st.data(), commit=st.booleans())
    def ack(self, data: st.DataObject, commit: bool) -> None:
        chosen = self.choose(data)
        valid = [m for m in chosen if self.flies(m)]
        with self.queue.session.transaction(force_rollback=not commit):
            assert self.queue.ack(*(m.receipt for m in chosen)) == len(valid)
        if commit:
            for message in valid:
                message.state = "done"

    @rule(data=st.data(), delay=st.sampled_from([None, 0.0, 20.0]), dead=st.booleans())
    def nack(self, data: st.DataObject, delay: float | None, dead: bool) -> None:
        chosen = self.choose(data)
        valid = [m for m in chosen if self.flies(m)]
        given = None if delay is None else f"{delay} s"
        assert self.queue.nack(*(m.receipt for m in chosen), delay=given, dead=dead) == len(valid)
        back = sorted((m for m in valid if not dead and m.count < MAX_DELIVERIES), key=lambda m: m.claim)
        for message in valid:
            message.state = "dead"
        due = {m.seq: self.now + (min(60, 5 * 2 ** (m.count - 1)) if delay is None else delay) for m in back}
        for message in back:
            message.state, message.visible_at = "delayed", due[message.seq]
        if self.mode == "fifo":
            for first in reversed(back):
                for other in self.messages.values():
                    behind = other.key == first.key is not None and other.claim > first.claim
                    if behind and other.claim[0] == first.claim[0] and other.state == "in flight":
                        earliest = next(m for m in back if m.key == first.key and m.claim[0] == first.claim[0])
                        other.state, other.visible_at = "delayed", due[earliest.seq]

    @rule(data=st.data(), seconds=st.sampled_from([0.0, 1.0, 50.0]))
    def extend(self, data: st.DataObject, seconds: float) -> None:
        chosen = self.choose(data)
        valid = [m for m in chosen if self.flies(m)]
        assert self.queue.extend(f"{seconds} s", *(m.receipt for m in chosen)) == len(valid)
        for message in valid:
            for other in self.messages.values():
                mate = self.mode == "fifo" and other.key == message.key is not None
                if other is message or (mate and other.claim[0] == message.claim[0] and other.state == "in flight"):
                    other.visible_at = self.now + seconds

    @precondition(lambda self: any(m.stale for m in self.messages.values()))
    @rule(data=st.data())
    def use_a_stale_receipt(self, data: st.DataObject) -> None:
        receipts = [receipt for m in self.messages.values() for receipt in m.stale]
        receipt = data.draw(st.sampled_from(receipts))
        assert self.queue.ack(receipt) == self.queue.nack(receipt) == self.queue.extend("1 s", receipt) == 0

    @rule()
    def redrive(self) -> None:
        dead = sorted((m for m in self.messages.values() if m.state == "dead"), key=lambda m: m.seq)
        assert self.queue.value("select cdcbridge.redrive('c')") == len(dead)
        last = self.queue.value("select last_value from cdcbridge.messages_seq")
        for message in dead:
            self.redrives += 1
            message.state, message.count, message.visible_at, message.place = "waiting", 0, 0.0, (last, self.redrives)

    @rule()
    def bury(self) -> None:
        dying = [m for m in self.expired() if m.count >= MAX_DELIVERIES]
        assert self.queue.value("select cdcbridge_internal.bury_expired()") == len(dying)
        for message in dying:
            message.state = "dead"

    @rule()
    def merge(self) -> None:
        """The bridge's housekeeping. It changes nothing that anybody can see."""
        assert self.queue.value("select cdcbridge_internal.merge_runs()") >= 0

    # the model

    def flies(self, message: Message) -> bool:
        return message.state == "in flight" and message.visible_at > self.now

    def expired(self) -> list[Message]:
        return [m for m in self.messages.values() if m.state == "in flight" and m.visible_at <= self.now]

    def visible(self, message: Message) -> bool:
        return message.state in ("waiting", "delayed", "in flight") and message.visible_at <= self.now

    def eligible(self) -> list[Message]:
        """Who may be delivered now. An expired last delivery dies and stands in nobody's way."""
        alive = [m for m in self.messages.values() if m.state in ("waiting", "delayed", "in flight")]
        alive = [m for m in alive if not (m in self.expired() and m.count >= MAX_DELIVERIES)]
        if self.mode == "queue":
            return [m for m in alive if self.visible(m)]
        found = [m for m in alive if m.key is None and self.visible(m)]
        for key in {m.key for m in alive} - {None}:
            chain = sorted((m for m in alive if m.key == key), key=lambda m: m.place)
            if not any(self.flies(m) for m in chain):
                for message in chain:
                    if not self.visible(message):
                        break
                    found.append(message)
        return found

    def check_order(self, rows: list[dict[str, Any]]) -> None:
        got = [self.messages[row["seq"]] for row in rows]
        assert {m.seq for m in got} <= {m.seq for m in self.eligible()}
        new = [m for m in got if m.state == "waiting"]
        assert new == sorted(new, key=lambda m: m.place), "new ones in log order"
        if self.mode == "queue":
            waiting = sorted((m for m in self.messages.values() if m.state == "waiting"), key=lambda m: m.place)
            assert new == waiting[: len(new)]
            return
        for key in {m.key for m in got} - {None}:
            mine = [m for m in got if m.key == key]
            chain = sorted((m for m in self.eligible() if m.key == key), key=lambda m: m.place)
            assert mine == chain[: len(mine)], "a key in log order, from its head"

    def choose(self, data: st.DataObject) -> list[Message]:
        """Some messages that have been delivered and are not done or dead by the model: valid or expired receipts."""
        delivered = [m for m in self.messages.values() if m.state == "in flight"]
        if not delivered:
            return []
        return data.draw(st.lists(st.sampled_from(delivered), unique_by=id, max_size=6))

    @invariant()
    def the_view_tells_the_truth(self) -> None:
        if not hasattr(self, "consumer"):
            return
        query = "select seq, key, deliver_count from cdcbridge.consumer_messages order by seq"
        expected = [(m.seq, m.key, m.count) for m in sorted(self.messages.values(), key=lambda m: m.seq)
                    if m.state in ("waiting", "delayed", "in flight")]  # fmt: skip
        assert [tuple(row.values()) for row in self.queue.all(query)] == expected
        states = self.queue.states()
        assert states["in_flight"] == sum(self.flies(m) for m in self.messages.values())
        assert states["dead"] == sum(m.state == "dead" for m in self.messages.values())


@pytest.fixture(scope="module")
def queue(pg15: EmbeddedServer) -> Iterator[StoreQueue]:
    with store_database(pg15) as database:
        made = StoreQueue(pg15.dsn(database))
        made.session.execute("set test.clock = '2030-01-01'")
        made.session.execute(CLOCK)
        yield made
        made.close()


@pytest.mark.timeout(900)  # a failure is made small first, which takes minutes
@pytest.mark.parametrize("max_in_flight", [6, 400])  # a row of leases holds one message, or several
@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_the_queue_does_what_the_model_does(queue: StoreQueue, mode: str, max_in_flight: int) -> None:
    machine = type("Machine", (Machine,), {"mode": mode, "max_in_flight": max_in_flight, "queue": queue})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))
