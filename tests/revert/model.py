"""A table in memory with the log of its changes, and what a plan makes of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from hypothesis import strategies as st

from cdcbridge.revert.history import RowTracer, Traced
from cdcbridge.revert.messages import Recorded, TextRow
from cdcbridge.revert.plan import RevertPlan, RevertTable, UndoStep, make_plan, rows_to_find

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
