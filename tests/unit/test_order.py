"""Steps are ordered so that foreign keys hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.revert.history import Traced
from cdcbridge.revert.messages import Recorded, TextRow
from cdcbridge.revert.order import Reference, _each_after_its_needs, ordered
from cdcbridge.revert.plan import RevertTable, UndoStep
from tests.revert.model import NOW


@given(st.integers(0, 12), st.data())
def test_steps_come_after_their_needs(count: int, data: st.DataObject) -> None:
    needs = {
        index: sorted(data.draw(st.sets(st.integers(0, index - 1)))) if index and data.draw(st.booleans()) else []
        for index in range(count)
    }
    turned = {count - 1 - index: [count - 1 - n for n in needed] for index, needed in needs.items()}
    for wanted in (needs, turned):
        order = _each_after_its_needs(count, wanted.__getitem__)
        assert sorted(order) == list(range(count))
        assert all(order.index(n) < order.index(index) for index, needed in wanted.items() for n in needed)
    assert _each_after_its_needs(count, needs.__getitem__) == list(range(count))


def test_a_circle_of_needs_ends() -> None:
    assert sorted(_each_after_its_needs(3, lambda index: [(index + 1) % 3, index])) == [0, 1, 2]


def step(seq: int, topic: str, op: str, start: TextRow | None, result: TextRow | None) -> UndoStep:
    """A step with its rows."""
    message = Recorded(seq, topic, None, None, op, None, None, (), None, NOW)
    acts = {"insert": "delete", "update": "update", "delete": "insert"}
    return UndoStep(Traced(message, None, None, None), acts[op], start=start, result=result)  # type: ignore[arg-type]


def test_rows_that_refer_come_after_the_row_and_leave_before_it() -> None:
    tables = {name: RevertTable(name, ("id",), ("id", "p")) for name in ("p", "c")}
    references = [Reference("f", "c", ("p",), "p", ("id",), "c")]
    parent, child, other = {"id": "1"}, {"id": "7", "p": "1"}, {"id": "8", "p": "1"}
    cascade = [
        step(9, "c", "delete", None, child),
        step(8, "c", "delete", None, other),
        step(7, "p", "delete", None, parent),
    ]
    assert [s.change.message.seq for s in ordered(cascade, references, tables)] == [7, 9, 8]
    deferred = [step(9, "p", "insert", parent, None), step(8, "c", "insert", child, None)]
    assert [s.change.message.seq for s in ordered(deferred, references, tables)] == [8, 9]
    # The parent is there now, and an older row of the same key must not be made before.
    there = [
        step(9, "c", "update", {"id": "7", "p": "2"}, child), step(8, "p", "insert", parent, None),
        step(7, "p", "delete", None, parent),
    ]  # fmt: skip
    assert ordered(there, references, tables)[0].change.message.seq == 9
