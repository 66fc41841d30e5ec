"""Random histories are undone in a model of a table."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from cdcbridge.revert.messages import TextRow
from cdcbridge.revert.plan import RevertTable, identity
from tests.revert.model import OPERATIONS, Model, carried_out, plan_of


@given(OPERATIONS, st.integers(0, 40), st.booleans())
def test_everything_since_a_moment_is_undone(operations: list[tuple[str, int, int, str]], cut: int, full: bool) -> None:
    model = Model(full)
    before: dict[str, TextRow] = {}
    start = 0
    for number, (op, key, value, column) in enumerate(operations):
        if number == cut:
            before, start = {k: dict(r) for k, r in model.rows.items()}, len(model.log)
        model.change(op, key, value, column)
    assume(cut < len(operations))
    _, plan = plan_of(model, set(range(start + 1, len(model.log) + 1)))
    assert not plan.problems and not plan.conflicts
    assert carried_out(model.rows, plan.steps) == before


@given(OPERATIONS, st.sets(st.integers(1, 40)), st.booleans())
def test_a_choice_without_conflict_is_as_if_it_had_not_happened(
    operations: list[tuple[str, int, int, str]], wanted: set[int], full: bool
) -> None:
    """The rows are those of a history without the changes. Keys stay, since a row is known by its key there."""
    model = Model(full)
    done = []
    for operation in operations:
        if operation[3] != "id":
            before = len(model.log)
            model.change(*operation)
            done += [operation] * (len(model.log) - before)
    wanted &= set(range(1, len(model.log) + 1))
    _, plan = plan_of(model, wanted)
    assert not plan.problems
    assume(not plan.conflicts)
    other = Model(full)
    for seq, operation in enumerate(done, 1):
        if seq not in wanted:
            other.change(*operation)
    assert carried_out(model.rows, plan.steps) == other.rows


def test_equal_numbers_identify_one_row() -> None:
    table = RevertTable("t", ("n",), ("n",))
    assert identity(table, {"n": "1.0"}) == identity(table, {"n": "1"}) != identity(table, {"n": "true"})
    assert identity(table, {"m": "1"}) is None
