"""Two databases that mirror each other, as a state machine over the real decisions, segments and notes of the mirrors.

Clocks step back and jump, deliveries are late, and each side writes on. After everything is delivered, both sides are
equal, no write lost to one that it had seen, and each write that nobody saw is a listed conflict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cdcbridge.config.mirror import ConflictRule
from cdcbridge.mirrors.changes import MirrorRow, effective_time, take_apart
from cdcbridge.mirrors.log_reader import Marks
from cdcbridge.mirrors.rule import Decision, Incoming, Local, Write, decide
from cdcbridge.mirrors.segments import Segment, segments

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
KEYS = ("1", "2")
RULES: dict[str, tuple[ConflictRule, ConflictRule]] = {  # of the mirror to side a, and of the one to side b
    "newest": ("newest", "newest"),
    "a": ("prefer_target", "prefer_source"),
    "b": ("prefer_source", "prefer_target"),
    "hold": ("hold", "hold"),
}
Decider = Callable[[Incoming, Local, ConflictRule], Decision]


@dataclass
class Logged:
    """A message of a log. `number` names the write on both sides. `seen` is set if a mirror applied the transaction."""

    lsn: int
    row: MirrorRow
    number: int
    effective: int
    seen: int | None = None


@dataclass
class Cell:
    """What a side has of a key: the number of the last write, whether the row is there, and whether a mirror wrote it."""

    number: int
    exists: bool
    mirrored: bool
    time: int


@dataclass
class Side:
    """A database with its log."""

    name: str
    rule: ConflictRule
    lsn: int = 0
    effective: int = 0
    cells: dict[str, Cell] = field(default_factory=dict)
    log: list[Logged] = field(default_factory=list)
    taken: int = 0  # messages of the other side's log that the mirror to this side has applied
    held: set[str] = field(default_factory=set)
    listed: set[int] = field(default_factory=set)  # writes that lost here, or that lost to one that came here
    known: dict[str, set[int]] = field(default_factory=dict)  # by key: writes that were made or decided here


class Machine(RuleBasedStateMachine):
    """Both sides, and whoever writes there."""

    by_side: ClassVar[tuple[ConflictRule, ConflictRule]] = RULES["newest"]
    decider: ClassVar[Decider] = staticmethod(decide)
    tombstones: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.sides = Side("a", self.by_side[0]), Side("b", self.by_side[1])
        self.saw: list[set[int]] = [set()]  # by write: what its side knew of the key then
        self.replaced: set[int] = set()  # writes that a person saw in a row and replaced
        self.ops: list[str] = [""]
        self.void: set[int] = set()  # deletes of rows that were gone on the other side as well

    # people write

    @initialize(clock=st.integers(0, 50))
    def begin(self, clock: int) -> None:
        """A row that both sides know, so that updates and deletes meet early."""
        self._write(0, "1", delete=False, clock=clock)
        self._deliver(1, 1)

    @rule(side=st.integers(0, 1), key=st.sampled_from(KEYS), delete=st.booleans(), clock=st.integers(0, 100))
    def write(self, side: int, key: str, delete: bool, clock: int) -> None:
        self._write(side, key, delete=delete, clock=clock)

    @rule(
        side=st.integers(0, 1), key=st.sampled_from(KEYS), clocks=st.lists(st.integers(0, 100), min_size=2, max_size=4)
    )
    def write_often(self, side: int, key: str, clocks: list[int]) -> None:
        """Delete and insert one row by turns, so that a segment has a net change."""
        for number, clock in enumerate(clocks):
            self._write(side, key, delete=number % 2 == 0, clock=clock)

    def _write(self, number: int, key: str, *, delete: bool, clock: int) -> None:
        side = self.sides[number]
        cell = side.cells.get(key)
        there = cell is not None and cell.exists
        if delete and not there:
            return
        op = "delete" if delete else "update" if there else "insert"
        self.ops.append(op)
        known = side.known.setdefault(key, set())
        self.saw.append(set(known))
        known.add(len(self.ops) - 1)
        if cell is not None:
            self.replaced.add(cell.number)
        side.lsn += 10
        side.effective = max(side.effective, clock)
        record = {"id": key, "v": len(self.ops) - 1}
        document: dict[str, Any] = {"op": op, "record": record, "old": None, "unchanged": []}
        row = MirrorRow(len(side.log) + 1, "public.t", orjson.dumps(document).decode(), key, None, side.lsn, 0,
                     commit_time=EPOCH + timedelta(microseconds=clock))  # fmt: skip
        side.log.append(Logged(side.lsn, row, len(self.ops) - 1, side.effective))
        side.cells[key] = Cell(len(self.ops) - 1, not delete, False, clock)

    # the mirrors

    @rule(side=st.integers(0, 1), count=st.integers(1, 6))
    def deliver(self, side: int, count: int) -> None:
        """Apply the next messages of the other side's log in one transaction."""
        self._deliver(side, count)

    def _deliver(self, number: int, count: int) -> None:
        here, there = self.sides[number], self.sides[1 - number]
        chunk = there.log[here.taken : here.taken + count]
        if not chunk:
            return
        here.taken += len(chunk)
        marks = _marks(there)
        own = [one for one in chunk if not marks.is_foreign(one.lsn)]
        if not own:
            return
        numbers = {one.lsn: one.number for one in own}
        for segment in segments([take_apart(one.row) for one in own]):
            self._segment(here, there, segment, marks, numbers)
        here.lsn += 10
        times = [int((one.row.commit_time - EPOCH).total_seconds() * 1e6) for one in own if one.row.commit_time]
        here.effective = max(here.effective, times[-1])
        here.log.append(Logged(here.lsn, own[-1].row._replace(lsn=here.lsn), 0, here.effective, seen=chunk[-1].lsn))

    def _segment(self, here: Side, there: Side, segment: Segment, marks: Marks, numbers: dict[int, int]) -> None:
        """Apply a segment as applier.py does: the usual way if it fits, or each change by a decision."""
        seen = marks.seen_by(segment.changes[0].row.lsn)
        own = {key: _own_write(here, key, seen) for key in segment.net["public.t"]}
        usual = self.tombstones
        for key, change in segment.net["public.t"].items():
            cell = here.cells.get(key)
            there_is = cell is not None and cell.exists
            if key in segment.fresh["public.t"]:
                usual &= not there_is and own[key] is None and change.op != "delete"
            else:
                usual &= there_is and cell is not None and cell.mirrored
        if usual:
            for key, net in segment.net["public.t"].items():
                number, cell = numbers[net.row.lsn], here.cells.get(key)
                assert cell is None or cell.number in self.saw[number], "the usual way replaced an unseen write"
                here.known.setdefault(key, set()).update(numbers[change.row.lsn] for change in segment.changes
                                                         if change.row.key == key)  # fmt: skip
                self._put(here, key, net.op, number, effective_time(net.row))
            return
        for change in segment.changes:
            key, lsn = change.row.key or "", change.row.lsn
            at = marks.times.get(lsn, effective_time(change.row))
            incoming = Incoming(Write(change.op, lsn, at, there.name), marks.seen_by(lsn))
            cell = here.cells.get(key)
            local = Local(cell is not None and cell.exists, cell is not None and cell.mirrored, own[key])
            if not self.tombstones:
                local = Local(
                    local.exists,
                    local.mirrored,
                    None if cell is None else Write("update", here.lsn, cell.time, here.name),
                )
            self._check(here, key, numbers[lsn], type(self).decider(incoming, local, here.rule), change.op)

    def _check(self, here: Side, key: str, number: int, decision: Decision, op: str) -> None:
        """Note and judge a decision, and carry it out."""
        cell = here.cells.get(key)
        mine = cell.number if cell else None
        if decision.kind == "delete_missing":
            self.void.add(number)
        elif decision.kind is not None and mine is not None:
            loser = {"source": mine, "target": number, None: number}[decision.winner]
            here.listed.add(loser)
            if decision.winner is None:
                here.held.add(key)
            winner = mine + number - loser
            assert winner not in self.saw[loser], f"{loser} had seen {winner}, and lost to it"
        elif decision.apply and mine is not None:
            assert mine in self.saw[number], f"{number} had not seen {mine}, and replaced it without a conflict"
        here.known.setdefault(key, set()).add(number)
        if decision.apply:
            here.held.discard(key)
            self._put(here, key, op, number, 0)

    @staticmethod
    def _put(here: Side, key: str, op: str, number: int, time: int) -> None:
        here.known.setdefault(key, set()).add(number)
        here.cells[key] = Cell(number, op != "delete", True, time)

    # the end

    def teardown(self) -> None:
        """Deliver everything, and compare."""
        a, b = self.sides
        while a.taken < len(b.log) or b.taken < len(a.log):
            self._deliver(0, len(b.log))
            self._deliver(1, len(a.log))
        states = [{key: cell.number for key, cell in side.cells.items() if cell.exists} for side in self.sides]
        for key in KEYS:
            if key not in a.held | b.held:
                assert states[0].get(key) == states[1].get(key), f"key {key} differs: {states}"
        kept = {cell.number for side in self.sides for cell in side.cells.values()}
        silent = set(range(1, len(self.ops))) - self.replaced - kept - a.listed - b.listed - self.void
        assert not silent, f"lost, and neither seen nor listed: {silent}"


def _marks(side: Side) -> Marks:
    foreign = [one for one in side.log if one.seen is not None]
    raised = {one.lsn: one.effective for one in side.log if one.effective != effective_time(one.row)}
    lsns = [one.lsn for one in foreign]
    return Marks(frozenset(lsns), lsns, [one.seen or 0 for one in foreign], 0, raised)


def _own_write(side: Side, key: str, after: int) -> Write | None:
    """The last write of the key that the side made itself after an LSN, as own_writes() finds it in the log."""
    for one in reversed(side.log):
        if one.seen is None and one.row.key == key and one.lsn > after:
            return Write(take_apart(one.row).op, one.lsn, one.effective, side.name)
    return None


def last_update_wins(incoming: Incoming, local: Local, _rule: ConflictRule) -> Decision:
    """The rule of systems that compare commit times alone and remember no deletes."""
    if not local.exists or local.own is None:
        return Decision(incoming.write.op != "delete")
    mine, other = local.own, incoming.write
    later = (other.effective_time, other.side) >= (mine.effective_time, mine.side)
    return Decision(later, "update_origin_differs", "source" if later else "target")


def _machine(rules: tuple[ConflictRule, ConflictRule], decider: Decider = decide) -> type[Machine]:
    class Ruled(Machine):
        pass

    Ruled.by_side, Ruled.decider, Ruled.tombstones = rules, staticmethod(decider), decider is not last_update_wins
    return Ruled


@pytest.mark.parametrize("name", list(RULES))
def test_two_sides_agree(name: str) -> None:
    run_state_machine_as_test(
        _machine(RULES[name]), settings=settings(max_examples=150, stateful_step_count=25, deadline=None)
    )


def test_the_last_update_alone_does_not_converge() -> None:
    """The same machine finds a history in which that rule breaks a promise."""
    quick = settings(
        max_examples=300,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        database=None,
    )
    with pytest.raises(AssertionError, match=r"differs|had seen|had not seen|neither seen"):
        run_state_machine_as_test(_machine(RULES["newest"], last_update_wins), settings=quick)
