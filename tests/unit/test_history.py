"""Rows are followed through the log."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import assume, given
from hypothesis import strategies as st

from cdcbridge.revert.history import RowTracer
from cdcbridge.revert.messages import Recorded, TextRow, same
from tests.revert.model import NOW, OPERATIONS, Model, plan_of

INSERT = Recorded(1, "public.t", "1", None, "insert", {"id": "1", "a": "1", "big": "9"}, None, (), "0/1", NOW)


def update(seq: int, key: str, record: TextRow, *, old_key: str | None = None, old: TextRow | None = None) -> Recorded:
    """An update that did not carry `big`."""
    return Recorded(seq, "public.t", key, old_key, "update", record, old, ("big",), "0/2", NOW)


def traced(*messages: Recorded, wanted: int, since: datetime | None = NOW) -> RowTracer:
    tracer = RowTracer(frozenset({wanted}), {}, {"public.t": since})
    for message in messages:
        tracer.feed(message)
    return tracer


def test_the_row_before_is_that_of_earlier_messages_with_values_that_were_not_carried() -> None:
    moved = update(3, "2", {"id": "2", "a": "2"}, old_key="1", old={"id": "1"})
    (change,) = traced(INSERT, update(2, "1", {"id": "1", "a": "2"}), moved, wanted=3).traced
    assert change.before is not None and change.before.columns == {"id": "1", "a": "2", "big": "9"}
    assert change.after is not None and change.after.columns == {"id": "2", "a": "2", "big": "9"}
    assert change.changed == frozenset({"id"}) and change.before.complete and not change.unknown


def test_a_gap_a_truncate_and_a_time_without_a_whole_consumer_hide_the_row_before() -> None:
    change = update(3, "1", {"id": "1", "a": "2"})
    gap = Recorded(2, "cdcbridge.gap", None, None, "gap", {}, None, (), None, NOW)
    truncate = Recorded(2, "public.t", None, None, "truncate", None, None, (), "0/2", NOW)
    later = datetime(2027, 1, 1, tzinfo=UTC)
    for tracer in (
        traced(INSERT, gap, change, wanted=3),
        traced(INSERT, truncate, change, wanted=3),
        traced(INSERT, change, wanted=3, since=None),
        traced(INSERT, change, wanted=3, since=later),
    ):
        assert tracer.traced[0].unknown == ("id", "a")
    assert traced(INSERT, change, wanted=3).traced[0].unknown == ()


def test_a_former_key_is_asked_for_and_later_changes_are_noted() -> None:
    moved = update(3, "2", {"id": "2", "a": "2"}, old_key="1", old={"id": "1"})
    assert traced(moved, wanted=3).former == {("public.t", "1")}
    again = update(4, "2", {"id": "2", "a": "7"})
    (change,) = traced(INSERT, update(2, "1", {"id": "1", "a": "2"}), moved, again, wanted=2).traced
    assert change.later == [4]  # of the same column, under another key


@given(OPERATIONS, st.integers(0, 39), st.booleans())
def test_a_change_whose_columns_changed_again_is_a_conflict(
    operations: list[tuple[str, int, int, str]], chosen: int, full: bool
) -> None:
    """Undoing one change alone never overwrites a later change of the same column."""
    model = Model(full)
    for operation in operations:
        model.change(*operation)
    assume(model.log)
    seq = chosen % len(model.log) + 1
    traced, plan = plan_of(model, {seq})
    (change,) = traced
    if change.message.op != "update" or plan.conflicts or plan.problems:
        return
    for later in model.log[seq:]:
        if later.key == change.message.key and later.op == "update":
            mine = change.changed or frozenset()
            assert (
                not mine
                or later.record is None
                or all(
                    same(later.record[c], (change.after or change.before).columns[c])  # type: ignore[union-attr]
                    for c in mine
                    if c in later.record
                )
            )
