"""Follow rows through the log: the row before and after each change that is to be undone, and later changes of it.

Messages are taken in the order of the log. Only the latest state of each row is kept, so that the history of a key may
be long. The module is pure and never reads the log itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, TypeAlias

from cdcbridge.revert.messages import CHANGES, Recorded, TextRow, differs
from cdcbridge.routing.copy_format import GAP_TOPIC

Place: TypeAlias = tuple[str, str]  # a topic and a key
_NAMED: Final = 20  # later changes that are kept for each change


@dataclass(slots=True, frozen=True)
class RowThen:
    """What the log knows of a row at one moment.

    Attributes:
        columns: The values by column.
        complete: Whether these are all columns that the table had.
    """

    columns: TextRow
    complete: bool


@dataclass(slots=True)
class Traced:
    """A change that is to be undone, with the rows before and after it.

    Attributes:
        message: The change.
        before: The row before it. None: there was none.
        after: The row after it. None: there is none.
        changed: The columns to which an update gave other values. None: all of them, as for an insert or a delete.
        unknown: The columns of an update whose values before it are not known.
        later: The seqs of later changes of the same columns that are not undone, up to a limit.
    """

    message: Recorded
    before: RowThen | None
    after: RowThen | None
    changed: frozenset[str] | None
    unknown: tuple[str, ...] = ()
    later: list[int] = field(default_factory=list)


class RowTracer:
    """The states of rows while the log is read."""

    def __init__(
        self, wanted: frozenset[int], floats: Mapping[str, frozenset[str]], since: Mapping[str, datetime | None]
    ) -> None:
        """Begin at the first message of the log.

        Args:
            wanted: The seqs of the changes that are to be undone.
            floats: The columns with floats, by topic.
            since: By topic, the time since which the log has each change of the table. None: it may lack changes, so
                earlier messages of a key prove nothing.
        """
        self._wanted, self._floats, self._since = wanted, floats, since
        self._rows: dict[Place, RowThen | None] = {}  # a row that is missing here is not known
        self._watched: dict[Place, list[Traced]] = {}
        self.traced: list[Traced] = []
        self.former: set[Place] = set()  # keys that rows had before, whose messages are needed as well

    def feed(self, message: Recorded) -> None:
        """Take the next message of the log."""
        if message.topic == GAP_TOPIC:
            self._rows.clear()  # changes are missing, so the rows may have changed
        elif message.op == "truncate":
            self._empty(message)
        elif message.op in (*CHANGES, "read"):
            self._change(message)

    def _empty(self, message: Recorded) -> None:
        for place in self._rows:
            if place[0] == message.topic:
                self._rows[place] = None
        for place, watching in self._watched.items():
            for one in watching if place[0] == message.topic else ():
                if one.after is not None:
                    _note(one, message.seq)

    def _change(self, message: Recorded) -> None:
        here = None if message.key is None else (message.topic, message.key)
        there = here if message.old_key is None else (message.topic, message.old_key)
        since = self._since.get(message.topic)
        followed = since is not None and message.appended >= since
        prior = self._rows.get(there) if there is not None and followed else None
        if followed and there is not None and there != here and there not in self._rows:
            self.former.add(there)
        traced = _traced(message, prior, self._floats.get(message.topic, frozenset()))
        if here is not None and there is not None and followed:
            if there != here:
                self._rows[there] = None
            self._rows[here] = traced.after
        if message.op != "read":
            self._watch(traced, here, there)

    def _watch(self, traced: Traced, here: Place | None, there: Place | None) -> None:
        """Note the change for earlier ones of the same row, and wait for later ones if it is to be undone."""
        wanted = traced.message.seq in self._wanted
        if wanted:
            self.traced.append(traced)
        if here is None or there is None:
            return
        if not wanted:
            for place in {here, there}:
                for one in self._watched.get(place, ()):
                    if _overlap(one, traced):
                        _note(one, traced.message.seq)
        if there != here and there in self._watched:
            self._watched.setdefault(here, []).extend(self._watched.pop(there))
        if wanted:
            for place in {here, there}:
                self._watched.setdefault(place, []).append(traced)


def _note(traced: Traced, seq: int) -> None:
    if len(traced.later) < _NAMED:
        traced.later.append(seq)


def _overlap(one: Traced, later: Traced) -> bool:
    if one.changed is None or later.changed is None:
        return True
    return not one.changed.isdisjoint(later.changed)


def _traced(message: Recorded, prior: RowThen | None, floats: frozenset[str]) -> Traced:
    """Return the rows before and after a message.

    Args:
        message: The message of a row.
        prior: The row as the log knew it before the message, or None if it did not know it.
        floats: The columns with floats.
    """
    record = message.record or {}
    known = {} if prior is None else prior.columns
    if message.op == "insert":
        return Traced(message, None, RowThen(record, complete=True), None)
    if message.op == "delete":
        whole = prior is not None and prior.complete
        return Traced(message, RowThen({**known, **record}, whole), None, None)
    before = {**known, **(message.old or {})}
    kept = {name: before[name] for name in message.unchanged if name in before}
    after = RowThen({**kept, **record}, complete=len(kept) == len(message.unchanged))
    if message.op == "read":
        return Traced(message, None, after, None)
    there = [*record, *message.unchanged]
    whole = (prior is not None and prior.complete) or all(name in before for name in there)
    unknown = tuple(name for name in record if name not in before)
    changed = {n for n, value in record.items() if n in before and differs(before[n], value, rounded=n in floats)}
    return Traced(message, RowThen(before, whole), after, frozenset(changed.union(unknown)), unknown)
