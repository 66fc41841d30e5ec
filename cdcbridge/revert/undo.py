"""Plan a revert, and apply it to the source in one transaction.

The plan that is shown is made without locks. Before anything changes, the rows are locked and the plan is made again
from them. Never changes a row of which the same columns changed since, unless the user forces it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import sql

from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, source_errors
from cdcbridge.database.patience import patiently
from cdcbridge.errors import OperatorNeeded, RevertRefused
from cdcbridge.revert import tables as looking
from cdcbridge.revert.history import Traced
from cdcbridge.revert.messages import TextRow
from cdcbridge.revert.order import Reference, ordered, referred, referring
from cdcbridge.revert.plan import RevertConflict, RevertPlan, RevertTable, UndoStep, make_plan, rows_to_find
from cdcbridge.revert.selection import Selection, selected, trace
from cdcbridge.revert.statements import annotation, statement
from cdcbridge.source import shapes
from cdcbridge.source.row_sql import COMMA
from cdcbridge.source.shapes import ReadShape

_NAMED: Final = 5  # changes that an error names
# What a delete does with the rows that refer to the row, by pg_constraint.confdeltype.
_CASCADES: Final = {
    "c": "would be deleted with it",
    "n": "would lose the reference",
    "d": "would refer to the default",
}


_PREVENTS: Final = "prevent the delete"


@dataclass(slots=True)
class Revert:
    """The changes to undo, and everything that a plan for them needs.

    Attributes:
        selection: The changes that the user named.
        changes: The changes in the order of the log, with the rows before and after each.
        shapes: The tables, by topic, and the tables that refer to them.
        tables: The tables of the changes, as a plan needs them.
        references: The foreign keys that refer to these tables.
        plan: The plan without locks.
    """

    selection: Selection
    changes: list[Traced]
    shapes: dict[str, ReadShape]
    tables: dict[str, RevertTable]
    references: list[Reference]
    plan: RevertPlan = field(default_factory=RevertPlan)

    @property
    def reverts(self) -> dict[str, object]:
        """What the transaction reverts, for its annotation."""
        return {**self.selection.named, "changes": len(self.changes)}

    def script(self, steps: Sequence[UndoStep]) -> list[str]:
        """Return the statements of the transaction, for people."""
        made = [annotation(self.reverts), *(statement(one, self.shapes[one.change.message.topic]) for one in steps)]
        return [one.as_string() for one in made if one is not None]


def prepare(config: Config, store: Connection, selection: Selection, *, force: bool) -> Revert:
    """Plan the revert, and change nothing.

    Raises:
        UsageError: The log lacks the changes, or the source lacks a table.
        RevertRefused: A selected message is not a change.
    """
    with connect_source(config.source_dsn, "cdcbridge revert") as source:
        if selection.table is not None:
            looking.describe_all(source, [selection.table])  # a table that does not exist is the better error
        found = selected(store, selection)
        topics = {one.topic for one in found}
        known = looking.describe_all(source, topics)
        changes = trace(store, config, found, {topic: looking.floats(shape) for topic, shape in known.items()})
        tables = {topic: looking.for_plan(source, shape) for topic, shape in known.items()}
        references = looking.references(source, topics)
        for child in {reference.child for reference in references} - known.keys():
            schema, _, name = child.partition(".")
            known[child] = shapes.describe(source, schema, name)
        revert = Revert(selection, changes, known, tables, references)
        revert.plan = _plan(source, revert, force=force, locked=False)
        with source_errors():
            for step in revert.plan.steps:
                reason = looking.unreadable(source, step.values, known[step.change.message.topic])
                if reason is not None:
                    revert.plan.problems.setdefault(step.change.message.seq, reason)
    return revert


def apply(config: Config, revert: Revert, *, force: bool) -> list[UndoStep]:
    """Undo the changes in one transaction of the source, and return the steps that ran.

    Raises:
        RevertRefused: The rows changed since, or the server refused a step. Nothing was changed.
        LockedOut: Another session holds a row or a table for too long. Nothing was changed.
    """
    with connect_source(config.source_dsn, "cdcbridge revert") as source, source_errors():
        return patiently(
            source,
            lambda: _run(source, revert, force=force),
            what="revert",
            again="cdcbridge revert … --apply",
        )


def _run(source: Connection, revert: Revert, *, force: bool) -> list[UndoStep]:
    mine = [revert.shapes[topic] for topic in sorted(revert.tables)]
    with _naming_grant():
        source.execute(annotation(revert.reverts))
        source.execute(sql.SQL("set constraints all deferred"))
        source.execute(sql.SQL("lock table {} in row exclusive mode").format(COMMA.join(one.rows for one in mine)))
        looking.refuse_altered(source, mine)
        plan = _plan(source, revert, force=force, locked=True)
    refuse(plan, force=force)
    nothing: Counter[Any] = Counter()
    for step in plan.steps:
        topic = step.change.message.topic
        if step.act == "delete" and step.start is not None and step.conflict is None:
            # Seen only now: rows that followed a key which an earlier step changed (on update cascade).
            step.conflict = _referred(source, revert, topic, step.start, nothing)
            refuse(plan, force=force)
        _execute(source, step, revert.shapes[topic])
    with _refusals("the end of the transaction"):
        source.execute(sql.SQL("set constraints all immediate"))
    return plan.steps


def _execute(source: Connection, step: UndoStep, shape: ReadShape) -> None:
    made = statement(step, shape)
    if made is None:
        return
    message = step.change.message
    with _naming_grant(), _refusals(f"the undoing of seq {message.seq} ({message.topic}, {message.op})"):
        rows = source.execute(made).rowcount
    if rows != 1:
        raise RevertRefused(
            f"the undoing of seq {message.seq} changed {rows} rows of {message.topic}, so nothing was changed",
            hint="A trigger or a rule of the table may have kept it back, or a row without a key changed meanwhile.",
        )


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Name the step in an error about a constraint or a trigger."""
    try:
        yield
    except (psycopg.IntegrityError, psycopg.DataError, psycopg.errors.RaiseException) as error:
        raise RevertRefused(
            f"the source refused {what}, so nothing was changed: {error.diag.message_primary}",
            hint=error.diag.message_detail,
        ) from error


@contextmanager
def _naming_grant() -> Iterator[None]:
    """Name the rights that the role of source.dsn needs for a revert."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise OperatorNeeded(
            f"source: {error.diag.message_primary}",
            hint="A revert needs SELECT, INSERT, UPDATE and DELETE on its tables. Use a source.dsn of a role with these"
            " rights, or run the SQL that `cdcbridge revert` prints without --apply.",
        ) from error


def _plan(source: Connection, revert: Revert, *, force: bool, locked: bool) -> RevertPlan:
    """Look at the rows, and plan from them."""
    with source_errors() if not locked else _nothing():
        places = rows_to_find(revert.changes, revert.tables)
        rows, counts = looking.look(source, places, revert.shapes, locked=locked)
        plan = make_plan(revert.changes, revert.tables, rows, counts, force=force)
        plan.steps = ordered(plan.steps, revert.references, revert.tables)
        mine = referring(((topic, row) for (topic, _), row in rows.items()), revert.references)
        for step in plan.steps:
            if step.act == "delete" and step.conflict is None and step.start is not None:
                step.conflict = _referred(source, revert, step.change.message.topic, step.start, mine)
    return plan


@contextmanager
def _nothing() -> Iterator[None]:
    """Leave psycopg's errors as they are, so that patiently() sees that a lock was not free."""
    yield


def _referred(
    source: Connection, revert: Revert, topic: str, row: TextRow, mine: Counter[Any]
) -> RevertConflict | None:
    """Return the conflict if rows refer to a row that a step deletes.

    Args:
        source: The session.
        revert: The revert.
        topic: The table of the row.
        row: The row.
        mine: How many rows that the revert itself changes refer to each row, as referring() returns it.
    """
    for reference in revert.references:
        values = referred(row, reference) if reference.parent == topic else None
        if values is None:
            continue
        child = revert.shapes[reference.child]
        number = looking.refers(source, child, reference, row) - mine[reference, values]
        if number > 0:
            action = _CASCADES.get(reference.on_delete)
            rows = f"{number} row{'s' if number > 1 else ''} of {reference.child}"
            reason = f"{rows} that the revert leaves refer to it ({reference.name}), and {action or _PREVENTS}"
            return RevertConflict(reason, now=row, certain=not action)
    return None


def refuse(plan: RevertPlan, *, force: bool) -> None:
    """Raise RevertRefused if the plan has problems, or conflicts that are not forced."""
    if plan.problems:
        raise RevertRefused(_listed("cannot be undone", sorted(plan.problems.items())))
    all_found = [(step.change.message.seq, step.conflict) for step in plan.steps if step.conflict is not None]
    found = [(seq, conflict) for seq, conflict in all_found if conflict.certain or not force]
    if found:
        certain = all(conflict.certain for _, conflict in found)
        raise RevertRefused(
            _listed("in conflict", [(seq, conflict.reason) for seq, conflict in found]),
            hint=None if certain else "Look at the versions that the command shows. --force undoes the changes anyway.",
        )


def _listed(what: str, found: Sequence[tuple[int, str]]) -> str:
    several = f"{len(found)} changes are" if len(found) != 1 else "1 change is"
    head = f"{several} {what}" if what != "cannot be undone" else f"{several.rpartition(' ')[0]} {what}"
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{head}, so nothing is changed: " + "; ".join(f"seq {seq}: {why}" for seq, why in found[:_NAMED]) + more
