"""Plan how changes are undone: one step for each change, the last change first.

The plan simulates the rows, beginning with the rows as they are now. A change whose columns have another value by then
is a conflict. A change whose row before is not known is a problem, and no plan with problems is carried out. For
example, an update of `status` from paid to new becomes a step that sets `status` to paid, if it is still new. The
module is pure and never looks at a table.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from cdcbridge.revert.history import RowThen, Traced
from cdcbridge.revert.messages import TextRow, canonical, same
from cdcbridge.words import one_of

Identity: TypeAlias = tuple[str, tuple[Hashable, ...]]  # a topic, and the values that identify a row of it
Act: TypeAlias = Literal["insert", "update", "delete", "nothing"]
_WITHOUT_KEY: Final = (
    "{} has no primary key and no REPLICA IDENTITY FULL, so its rows cannot be told apart. Undo the change by hand"
)


@dataclass(slots=True, frozen=True)
class RevertTable:
    """A table of the source as a plan needs it.

    Attributes:
        topic: Its topic, for example `public.orders`.
        key: The columns that identify a row. Empty: the table has no key.
        columns: All columns, without generated ones.
        altered: The columns that were added or altered after the table was created.
        identity: The columns that the WAL has of each deleted row, unless `full` is set.
        full: Whether the replica identity is FULL.
    """

    topic: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    altered: frozenset[str] = frozenset()
    identity: frozenset[str] = frozenset()
    full: bool = False


@dataclass(slots=True, frozen=True)
class RevertConflict:
    """The reason for which a step would undo more than the change.

    Attributes:
        reason: The reason, for people.
        columns: The columns that have other values by now. Empty: the whole row.
        later: The seqs of later changes of the same columns.
        now: The row as the step would find it, or None if there is no such row.
        certain: Whether `--force` cannot help, because the server would refuse the step.
    """

    reason: str
    columns: tuple[str, ...] = ()
    later: tuple[int, ...] = ()
    now: TextRow | None = None
    certain: bool = False


@dataclass(slots=True)
class UndoStep:
    """The step that undoes one change.

    Attributes:
        change: The change.
        act: The statement, or `nothing` if the row needs none.
        where: The values that identify the row that the step finds. Empty for an insert.
        values: The columns that the step writes.
        start: The row that it finds, or None.
        result: The row that it leaves, or None.
        notes: Remarks for people.
        conflict: Why it would undo more than the change, or None.
    """

    change: Traced
    act: Act
    where: TextRow = field(default_factory=dict)
    values: TextRow = field(default_factory=dict)
    start: TextRow | None = None
    result: TextRow | None = None
    notes: tuple[str, ...] = ()
    conflict: RevertConflict | None = None


@dataclass(slots=True)
class RevertPlan:
    """The steps in the order in which they run, and the changes that cannot be undone.

    `problems` maps the seq of each such change to the reason.
    """

    steps: list[UndoStep] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def conflicts(self) -> list[UndoStep]:
        """The steps with a conflict."""
        return [step for step in self.steps if step.conflict is not None]


def identity(table: RevertTable, row: TextRow) -> Identity | None:
    """Return the values that identify the row, or None if the row lacks a column of the key.

    A row of a table without a key is identified by all its columns.
    """
    names = table.key or tuple(sorted(row))
    if any(name not in row for name in names):
        return None
    return table.topic, tuple(canonical(row[name]) for name in names)


def rows_to_find(changes: Iterable[Traced], tables: Mapping[str, RevertTable]) -> dict[Identity, TextRow]:
    """Return the rows at which a plan looks, by their identities, as far as they are known."""
    found: dict[Identity, TextRow] = {}
    for change in changes:
        table = tables[change.message.topic]
        for then in (change.before, change.after):
            place = None if then is None else identity(table, then.columns)
            if then is not None and place is not None:
                found.setdefault(place, then.columns)
    return found


class _Planner:
    """The rows while the steps are planned: by identity, the row or None, or a number of equal rows without a key."""

    def __init__(
        self,
        tables: Mapping[str, RevertTable],
        now: Mapping[Identity, TextRow | None],
        counts: Mapping[Identity, int],
        *,
        force: bool,
    ) -> None:
        self._tables, self._rows, self._counts, self._force = tables, dict(now), dict(counts), force

    def step(self, change: Traced) -> UndoStep | str:
        """Return the next step, or the reason for which the change cannot be undone."""
        table = self._tables[change.message.topic]
        if not table.key:
            return self._without_key(change, table)
        if change.message.op == "insert":
            return self._of_insert(change, table)
        if change.message.op == "delete":
            return self._of_delete(change, table)
        return self._of_update(change, table)

    def _of_insert(self, change: Traced, table: RevertTable) -> UndoStep | str:
        after = _row(change.after)
        place = identity(table, after)
        if place is None:
            return _lacks_key(table)
        now = self._rows.get(place)
        if now is None:
            gone = RevertConflict("the row does not exist any more", later=tuple(change.later))
            return UndoStep(change, "nothing", conflict=gone)
        self._rows[place] = None
        where = {name: after[name] for name in table.key}
        conflict = _conflict(change, now, [name for name in after if name in now and not same(after[name], now[name])])
        return UndoStep(change, "delete", where, start=now, notes=_dropped(after, table), conflict=conflict)

    def _of_delete(self, change: Traced, table: RevertTable) -> UndoStep | str:
        before = change.before or RowThen({}, complete=False)
        reason = _missing(before, table)
        place = identity(table, before.columns)
        if reason is not None or place is None:
            return reason or _lacks_key(table)
        values = {name: before.columns[name] for name in table.columns if name in before.columns}
        added = [name for name in table.columns if name not in before.columns]
        notes = _dropped(before.columns, table) + tuple(
            f"column {n} was added later, and gets its default" for n in added
        )
        now = self._rows.get(place)
        result = self._rows[place] = {**(now or {}), **values}
        if now is None:
            conflict = _conflict(change, None, [])
            return UndoStep(change, "insert", values=values, result=result, notes=notes, conflict=conflict)
        others = [name for name in values if name in now and not same(values[name], now[name])]
        conflict = RevertConflict("a row with this key exists again", tuple(others), tuple(change.later), now)
        where = {name: before.columns[name] for name in table.key}
        return UndoStep(change, "update", where, values, now, result, notes, conflict)

    def _of_update(self, change: Traced, table: RevertTable) -> UndoStep | str:
        if change.unknown:
            return _unknown(change.unknown)
        before, after = _row(change.before), _row(change.after)
        place, former = identity(table, after), identity(table, {**after, **before})
        if place is None or former is None:
            return _lacks_key(table)
        changed = change.changed or frozenset()
        values = {name: before[name] for name in before if name in changed and name in table.columns}
        notes = _dropped(changed, table)
        now = self._rows.get(place)
        if now is None:
            return self._of_lost(change, table, former, notes)
        others = [name for name in values if name in now and not same(after[name], now[name])]
        conflict = _conflict(change, now, others)
        taken = former != place and self._rows.get(former) is not None
        if taken:
            conflict = RevertConflict("another row has the former key", now=self._rows.get(former), certain=True)
        result = {**now, **values}
        self._rows[place] = None
        self._rows[former] = result
        where = {name: after[name] for name in table.key}
        act: Act = "update" if values else "nothing"
        return UndoStep(change, act, where, values, now, result, notes, conflict)

    def _of_lost(self, change: Traced, table: RevertTable, former: Identity, notes: tuple[str, ...]) -> UndoStep | str:
        """Plan the undoing of an update whose row does not exist any more. With `--force`, it is inserted."""
        conflict = RevertConflict("the row does not exist any more", later=tuple(change.later))
        if not self._force:
            return UndoStep(change, "nothing", notes=notes, conflict=conflict)
        before = change.before or RowThen({}, complete=False)
        reason = _missing(before, table)
        if reason is not None:
            return f"the row does not exist any more, and {reason}"
        values = {name: before.columns[name] for name in table.columns if name in before.columns}
        self._rows[former] = values
        return UndoStep(change, "insert", values=values, result=values, notes=notes, conflict=conflict)

    def _without_key(self, change: Traced, table: RevertTable) -> UndoStep | str:
        if not table.full:
            return _WITHOUT_KEY.format(table.topic)
        before, after = change.before, change.after
        for then in (before, after):
            if then is not None and set(then.columns) != set(table.columns):
                return f"the log does not have all columns of the row as the table {table.topic} has them now"
        was = None if after is None else identity(table, after.columns)
        conflict = None
        if was is not None:
            if self._counts.get(was, 0) < 1:
                return UndoStep(change, "nothing", conflict=RevertConflict("no row has these values any more"))
            self._counts[was] -= 1
        becomes = None if before is None else identity(table, before.columns)
        if becomes is not None:
            self._counts[becomes] = self._counts.get(becomes, 0) + 1
        acts: dict[str, Act] = {"insert": "delete", "delete": "insert", "update": "update"}
        act = acts[change.message.op]
        result, start = (None if then is None else then.columns for then in (before, after))
        if act == "update" and before is not None:
            values = {name: before.columns[name] for name in change.changed or ()}
            act = "update" if values else "nothing"
            return UndoStep(change, act, _row(after), values, start, result, conflict=conflict)
        return UndoStep(change, act, _row(after), _row(before), start, result, conflict=conflict)


def make_plan(
    changes: Sequence[Traced],
    tables: Mapping[str, RevertTable],
    now: Mapping[Identity, TextRow | None],
    counts: Mapping[Identity, int],
    *,
    force: bool,
) -> RevertPlan:
    """Plan how the changes are undone.

    Args:
        changes: The changes in the order of the log.
        tables: Their tables, by topic.
        now: The rows of rows_to_find() in tables with a key, as they are now. None: there is no such row.
        counts: The number of rows with these values, in tables without a key.
        force: Whether the steps with a conflict will run, too.
    """
    planner, plan = _Planner(tables, now, counts, force=force), RevertPlan()
    for change in reversed(changes):
        step = planner.step(change)
        if isinstance(step, str):
            plan.problems[change.message.seq] = step
        else:
            plan.steps.append(step)
    return plan


def _row(then: RowThen | None) -> TextRow:
    return {} if then is None else then.columns


def _conflict(change: Traced, now: TextRow | None, others: Sequence[str]) -> RevertConflict | None:
    """Return the conflict with columns that have other values now, or with later changes of the same columns."""
    if others:
        reason = f"{one_of(others, 'and')} changed since"
        return RevertConflict(reason, tuple(others), tuple(change.later), now)
    if change.later:
        return RevertConflict("the same columns changed later", (), tuple(change.later), now)
    return None


def _dropped(names: Iterable[str], table: RevertTable) -> tuple[str, ...]:
    return tuple(f"column {n} is left out, because the table lacks it now" for n in names if n not in table.columns)


def _lacks_key(table: RevertTable) -> str:
    return f"the log does not have the columns of the key of {table.topic} ({', '.join(table.key)})"


def _unknown(names: Sequence[str]) -> str:
    some = f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
    return (
        f"neither `old` nor an earlier message of the key has the values before the change of: {some}. Messages that"
        " retention dropped, changes in a gap, and columns that were added in between are not known"
    )


def _missing(before: RowThen, table: RevertTable) -> str | None:
    """Return why a deleted row cannot be inserted, or None if all its columns are known.

    A column that was added after the delete is missing in the log, and gets its default.
    """
    missing = [name for name in table.columns if name not in before.columns]
    whole = before.complete or (table.full and not set(before.columns) <= table.identity | set(table.key))
    if not missing or (whole and table.altered.issuperset(missing)):
        return None
    return _unknown(missing)
