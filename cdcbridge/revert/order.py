"""Order the steps of a plan so that foreign keys hold after each of them.

The reverse order of the changes is right, except for changes that the server itself made. For example,
`on delete cascade` deletes the order first and then its items. To undo that, the order must be inserted before its
items. The module is pure and never looks at a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from cdcbridge.revert.messages import TextRow, canonical
from cdcbridge.revert.plan import Identity, RevertTable, UndoStep, identity

_Values: TypeAlias = tuple[str, tuple[str, ...], str]  # a topic, columns, and their values


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
    parents, children = _by_topic(references, "parent"), _by_topic(references, "child")
    events: dict[_Values, list[tuple[int, bool]]] = {}  # the steps that make or remove these values of a parent
    for index, step in enumerate(steps):
        for reference in parents.get(step.change.message.topic, ()):
            was, becomes = (_values(row, reference.keys, reference) for row in (step.start, step.result))
            if was == becomes:
                continue
            if was is not None:
                events.setdefault(was, []).append((index, False))
            if becomes is not None:
                events.setdefault(becomes, []).append((index, True))
    earlier = _earlier_of_the_row(steps, tables)

    def needed(index: int) -> list[int]:
        found = list(earlier[index])
        for reference in children.get(steps[index].change.message.topic, ()):
            values = _values(steps[index].result, reference.columns, reference)
            maker = None if values is None else _maker(events.get(values, ()), index)
            if maker is not None:
                found.append(maker)
        return found

    return [steps[index] for index in _each_after_its_needs(len(steps), needed)]


def _by_topic(references: Sequence[Reference], side: str) -> dict[str, list[Reference]]:
    found: dict[str, list[Reference]] = {}
    for reference in references:
        found.setdefault(getattr(reference, side), []).append(reference)
    return found


def _values(row: TextRow | None, columns: Sequence[str], reference: Reference) -> _Values | None:
    """Return the values to which, or with which, a row refers. None if it has none, or one of them is null."""
    if row is None or any(row.get(name, "null") == "null" for name in columns):
        return None
    return reference.parent, reference.keys, repr([canonical(row[name]) for name in columns])


def _maker(events: Sequence[tuple[int, bool]], index: int) -> int | None:
    """Return the step that makes the values for the step at `index`: the last one before it, else the next one."""
    before = [event for event in events if event[0] < index]
    if before and before[-1][1]:
        return before[-1][0]
    return next((at for at, made in events if at > index and made), None)


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


def net_referring(steps: Sequence[UndoStep], reference: Reference, parent: TextRow) -> int:
    """Return how many rows that refer to the parent's row the steps remove, minus those that they add."""
    target = _values(parent, reference.keys, reference)
    return sum(
        (_values(step.start, reference.columns, reference) == target)
        - (_values(step.result, reference.columns, reference) == target)
        for step in steps
        if step.change.message.topic == reference.child
    )
