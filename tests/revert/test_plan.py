"""The pure part: random histories are undone in a model of a table, and steps are ordered."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cdcbridge.revert.history import RowTracer, Traced
from cdcbridge.revert.messages import Recorded, TextRow, differs, read_message, same
from cdcbridge.revert.order import Reference, _each_after_its_needs, ordered
from cdcbridge.revert.plan import RevertPlan, RevertTable, UndoStep, identity, make_plan, rows_to_find

NOW = datetime(2026, 1, 1, tzinfo=UTC)
COLUMNS = ("id", "a", "big")
TABLE = RevertTable("public.t", ("id",), COLUMNS, identity=frozenset({"id"}))
FULL = RevertTable("public.t", ("id",), COLUMNS, identity=frozenset({"id"}), full=True)


@dataclass
class Model:
    """A table and the log of its changes."""

    full: bool
    rows: dict[str, TextRow] = field(default_factory=dict)
    log: list[Recorded] = field(default_factory=list)

    def change(self, op: str, key: int, value: int, column: str) -> None:
        """Change a row as an application would, and append the message that the bridge makes of it."""
        name, text = str(key), str(value)
        row = self.rows.get(name)
        if op == "insert" and row is None:
            self.rows[name] = {"id": name, "a": text, "big": f'"{text}"'}
            self._append("insert", name, None, self.rows[name], None, ())
        elif op == "delete" and row is not None:
            del self.rows[name]
            self._append("delete", name, None, row if self.full else {"id": name}, None, ())
        elif op == "update" and row is not None and (column != "id" or text not in self.rows):
            new = {**row, column: f'"{text}"' if column == "big" else text}
            moved = new["id"] != name
            del self.rows[name]
            self.rows[new["id"]] = new
            old = row if self.full else {"id": name} if moved else None
            kept = () if column == "big" or self.full else ("big",)  # an unchanged TOAST value
            record = {c: v for c, v in new.items() if c not in kept}
            self._append("update", new["id"], name if moved else None, record, old, kept)

    def _append(
        self, op: str, key: str, old_key: str | None, record: TextRow, old: TextRow | None, kept: tuple[str, ...]
    ) -> None:
        self.log.append(Recorded(len(self.log) + 1, "public.t", key, old_key, op, dict(record), old, kept, "0/1", NOW))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "update", "update", "delete"]),
        st.integers(1, 4),
        st.integers(1, 5),
        st.sampled_from(COLUMNS),
    ),
    max_size=40,
)


def plan_of(model: Model, wanted: set[int]) -> tuple[list[Traced], RevertPlan]:
    """The plan that undoes these seqs, with all of the log known."""
    tracer = RowTracer(frozenset(wanted), {}, {"public.t": NOW})
    for message in model.log:
        tracer.feed(message)
    table = FULL if model.full else TABLE
    tables = {"public.t": table}
    now = {place: model.rows.get(row["id"]) for place, row in rows_to_find(tracer.traced, tables).items()}
    return tracer.traced, make_plan(tracer.traced, tables, now, {}, force=False)


def carried_out(rows: dict[str, TextRow], steps: list[UndoStep]) -> dict[str, TextRow]:
    """The rows after the steps, each of which must find its row."""
    rows = {key: dict(row) for key, row in rows.items()}
    for step in steps:
        if step.act == "insert":
            assert step.values["id"] not in rows
            rows[step.values["id"]] = dict(step.values)
        elif step.act != "nothing":
            row = rows.pop(step.where["id"])
            if step.act == "update":
                row.update(step.values)
                assert row["id"] not in rows
                rows[row["id"]] = row
    return rows


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


@pytest.mark.parametrize(
    ("one", "other", "equal", "changed"),
    [
        ("1.50", "1.5", True, True), ("1e+06", "1000000.0", True, True), ('"a"', '"\\u0061"', True, False),
        ('{"a":1}', '{"a": 1}', True, True), ('{"a":1,"b":2}', '{"b":2,"a":1}', False, True), ("null", '""', False, True),
        ("1", '"1"', False, True), ("[" * 5000 + "]" * 5000, "[]", False, True),
    ],
)  # fmt: skip
def test_values_are_compared_by_value_and_changes_by_text(one: str, other: str, equal: bool, changed: bool) -> None:
    assert same(one, other) == equal and differs(one, other, rounded=False) == changed
    assert differs(one, other, rounded=True) == (not equal)


def test_a_row_keeps_the_digits_of_its_numbers() -> None:
    data = '{"op":"update","record":{"n":1.500,"j":{"x":  9007199254740993}},"old":null,"unchanged":["b"]}'
    message = read_message(1, "public.t", "1", None, data, None, NOW)
    assert message.record == {"n": "1.500", "j": '{"x":  9007199254740993}'} and message.unchanged == ("b",)
    assert identity(RevertTable("t", ("n",), ("n",)), {"n": "1.0"}) == identity(
        RevertTable("t", ("n",), ("n",)), {"n": "1"}
    )
