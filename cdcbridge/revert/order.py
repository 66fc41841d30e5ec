"""Order the steps of a plan so that foreign keys hold after each of them.

The reverse order of the changes is right, except for changes that the server itself made. For example,
`on delete cascade` deletes the order first and then its items. To undo that, the order must be inserted before its
items. The module is pure and never looks at a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from cdcbridge.revert.messages import TextRow, canonical
from cdcbridge.revert.plan import Identity, RevertTable, UndoStep, identity

_Values: TypeAlias = tuple[str, tuple[str, ...], tuple[Hashable, ...]]  # a topic, columns, and their values


class Reference(NamedTuple):
    """A foreign key of one table to another one.

    Attributes:
        name: The name of the constraint.
        child: The topic of the table that has it.
        columns: The columns that refer.
        parent: The topic of the table to which they refer.
        keys: The columns to which they refer, in the same order.
        on_delete: What a delete in the parent does with rows that refer to it, as in pg_constraint.confdeltype.
    """

    name: str
    child: str
    columns: tuple[str, ...]
    parent: str
    keys: tuple[str, ...]
    on_delete: str = "a"


def ordered(
    steps: Sequence[UndoStep], references: Sequence[Reference], tables: Mapping[str, RevertTable]
) -> list[UndoStep]:
    """Return the steps so that a row is there before another row refers to it.

    Steps of one row keep their order, and steps that refer to no row of the plan keep their places.
    """
    if not references:
        return list(steps)
    needs = _Needs(steps, references, tables)
    return [steps[index] for index in _each_after_its_needs(len(steps), needs)]


class _Needs:
    """The steps that must run before each step. Steps are known by their places in the reverse order."""

    def __init__(
        self, steps: Sequence[UndoStep], references: Sequence[Reference], tables: Mapping[str, RevertTable]
    ) -> None:
        self._steps = steps
        self._parents, self._children = _by_topic(references, "parent"), _by_topic(references, "child")
        self._earlier = _earlier_of_the_row(steps, tables)
        self._events: dict[_Values, list[tuple[int, bool]]] = {}  # the steps that remove or make values of a parent
        self._leaving: dict[_Values, list[int]] = {}  # the steps after which a row does not refer to values any more
        for index, step in enumerate(steps):
            for reference in self._parents.get(step.change.message.topic, ()):
                was, becomes = (_values(row, reference.keys, reference) for row in (step.start, step.result))
                for values, made in ((was, False), (becomes, True)):
                    if values is not None and was != becomes:
                        self._events.setdefault(values, []).append((index, made))
            for reference in self._children.get(step.change.message.topic, ()):
                was, becomes = (_values(row, reference.columns, reference) for row in (step.start, step.result))
                if was is not None and was != becomes:
                    self._leaving.setdefault(was, []).append(index)

    def __call__(self, index: int) -> list[int]:
        """Return the steps that the step at `index` needs."""
        step, found = self._steps[index], list(self._earlier[index])
        for reference in self._children.get(step.change.message.topic, ()):
            values = _values(step.result, reference.columns, reference)
            maker = None if values is None else _maker(self._events.get(values, ()), index)
            if maker is not None:
                found.append(maker)
        for reference in self._parents.get(step.change.message.topic, ()) if step.act == "delete" else ():
            values = _values(step.start, reference.keys, reference)
            if values is not None:
                found += _leavers(self._leaving.get(values, ()), self._events.get(values, ()), index)
        return found


def _by_topic(references: Sequence[Reference], side: str) -> dict[str, list[Reference]]:
    found: dict[str, list[Reference]] = {}
    for reference in references:
        found.setdefault(getattr(reference, side), []).append(reference)
    return found


def _values(row: TextRow | None, columns: Sequence[str], reference: Reference) -> _Values | None:
    """Return the values to which, or with which, a row refers. None if it has none, or one of them is null."""
    if row is None or any(row.get(name, "null") == "null" for name in columns):
        return None
    return reference.parent, reference.keys, tuple(canonical(row[name]) for name in columns)


def _maker(events: Sequence[tuple[int, bool]], index: int) -> int | None:
    """Return the step that makes the values for the step at `index`, or None if they are there now.

    It is the last step before, unless that one removed them. Then it is the next one.
    """
    last, following = None, None
    for event in events:
        if event[0] > index:
            following = event
            break
        last = event if event[0] < index else last
    if last is not None and last[1]:
        return last[0]
    return following[0] if following is not None and following[1] else None


def _leavers(leaving: Sequence[int], events: Sequence[tuple[int, bool]], index: int) -> list[int]:
    """Return the steps that must leave a row before the step at `index` deletes it.

    They come later in the reverse order if a deferred foreign key let its row come first.
    """
    again = next((at for at, made in events if at > index and made), None)
    return [at for at in leaving if at > index and (again is None or at < again)]


def _earlier_of_the_row(steps: Sequence[UndoStep], tables: Mapping[str, RevertTable]) -> list[list[int]]:
    """Return for each step the last earlier steps of the same row."""
    last: dict[Identity, int] = {}
    found: list[list[int]] = []
    for index, step in enumerate(steps):
        table = tables[step.change.message.topic]
        places = {identity(table, row) for row in (step.start, step.result) if row is not None}
        found.append([last[place] for place in places if place is not None and place in last])
        last.update((place, index) for place in places if place is not None)
    return found


def _each_after_its_needs(count: int, needed: Callable[[int], list[int]]) -> list[int]:
    """Return 0 to count - 1, each after the numbers that it needs, and otherwise in order.

    In a circle of needs, one of them is not met.
    """
    begun: set[int] = set()
    done: dict[int, None] = {}
    for first in range(count):
        stack = [first]
        while stack:
            index = stack[-1]
            if index in begun:
                done[stack.pop()] = None
            else:
                begun.add(index)
                stack += [number for number in reversed(needed(index)) if number not in begun]
    return list(done)


def referring(
    rows: Iterable[tuple[str, TextRow | None]], references: Sequence[Reference]
) -> Counter[tuple[Reference, _Values]]:
    """Return how many of these rows refer to each row, by foreign key.

    Args:
        rows: The topic of each row, and the row or None.
        references: The foreign keys.
    """
    children = _by_topic(references, "child")
    found: Counter[tuple[Reference, _Values]] = Counter()
    for topic, row in rows:
        for reference in children.get(topic, ()):
            values = _values(row, reference.columns, reference)
            if values is not None:
                found[reference, values] += 1
    return found


def referred(parent: TextRow, reference: Reference) -> _Values | None:
    """Return the values by which rows refer to this one, or None if no row can refer to it."""
    return _values(parent, reference.keys, reference)
