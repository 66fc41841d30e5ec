"""The two ways to apply the changes of a chunk: with one direction, and with two.

With one direction, each segment goes the usual way, or the careful way if the target is not as expected. With two, the
careful way waits for the target's own log. The changes between two truncates therefore go one way together, so that a
chunk waits once. Never commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

import psycopg

from cdcbridge.errors import OperatorNeeded
from cdcbridge.mirrors.applying import Applying, Unexpected
from cdcbridge.mirrors.careful import Careful
from cdcbridge.mirrors.changes import MirroredChange
from cdcbridge.mirrors.conflicts import end_hold, holds
from cdcbridge.mirrors.log_reader import Marks
from cdcbridge.mirrors.peer_log import BehindPeer, PeerLog
from cdcbridge.mirrors.segments import segments
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target import TargetSession


class Direction(Protocol):
    """A way to apply changes."""

    def apply(self, changes: Sequence[MirroredChange], marks: Marks, *, strict: bool) -> int:
        """Apply changes in the open transaction, and return the number of conflicts.

        Args:
            changes: The changes, in the order of the log.
            marks: The notes about their transactions.
            strict: Whether a row that is missing, or there already, is a conflict.
        """
        ...


class ApplyHistory:
    """Append each change to the history of its table (`apply: append`)."""

    def __init__(self, applying: Applying) -> None:
        self._applying = applying

    def apply(self, changes: Sequence[MirroredChange], marks: Marks, *, strict: bool) -> int:
        del marks, strict  # a history takes every change as it is
        self._applying.append(changes)
        return 0


class ApplyOneWay:
    """Make the target's tables equal to the source's.

    Args:
        target: The session.
        applying: Writes the rows in the usual way.
        careful: Writes them in the careful way.
        in_order: Whether operations of different tables must not change places.
    """

    def __init__(self, target: TargetSession, applying: Applying, careful: Careful, *, in_order: bool) -> None:
        self._target = target
        self._applying = applying
        self._careful = careful
        self._in_order = in_order

    def apply(self, changes: Sequence[MirroredChange], marks: Marks, *, strict: bool) -> int:
        conflicts = 0
        for truncates, some in groupby(changes, key=_is_truncate):
            if truncates:
                self._truncate(list(some))
                continue
            for segment in segments(some, in_order=self._in_order):
                try:
                    with self._target.connection.transaction():
                        if segment.alone is not None:
                            self._applying.rekey(segment.alone)
                        else:
                            self._applying.apply(segment, strict=strict, mirrored_only=False)
                except (Unexpected, psycopg.errors.UniqueViolation):
                    found = self._careful.apply(list(without_new_keys(segment.changes)), marks)
                    conflicts += found if strict else 0
        return conflicts

    def _truncate(self, changes: Sequence[MirroredChange]) -> None:
        """Empty the tables. Those of one transaction are emptied together, because foreign keys may connect them."""
        for _, some in groupby(changes, key=lambda change: change.row.lsn):
            self._applying.truncate([change.row.topic for change in some])


class ApplyTwoWay:
    """Apply what the target's own writes do not forbid.

    Args:
        target: The session.
        applying: Writes the rows in the usual way.
        careful: Decides about each row.
        peer: The target's log.
        mirror: The name of the mirror.
        other: The identity of the target.
    """

    def __init__(
        self, target: TargetSession, applying: Applying, careful: Careful, peer: PeerLog, mirror: str, other: str
    ) -> None:
        self._target = target
        self._applying = applying
        self._careful = careful
        self._peer = peer
        self._mirror = mirror
        self._other = other
        self._looked_at = 0  # the LSN of the target up to which its writes of rows on hold are known

    def apply(self, changes: Sequence[MirroredChange], marks: Marks, *, strict: bool) -> int:
        del strict  # the target's own writes are expected at any time
        _refuse_adoption(changes)
        conflicts = 0
        for truncates, some in groupby(changes, key=_is_truncate):
            if truncates:
                conflicts += sum(self._careful.truncate(change, marks) for change in some)
                continue
            part = list(without_new_keys(some))
            try:
                with self._target.connection.transaction():
                    self._usual_way(part, marks)
            except (Unexpected, psycopg.errors.UniqueViolation):
                conflicts += self._careful.apply(part, marks)
        return conflicts

    def settle(self, marks: Marks) -> None:
        """Decide once more, after the commit, about the deletes that found no row and could lock none.

        Args:
            marks: The notes about the transactions of the last changes.
        """
        void = self._careful.void
        if not void:
            return
        self._peer.catch_up(self._target.connection)
        lsn = self._target.marked
        arrived = self._peer.arrived_at(lsn)
        if arrived is None:
            raise BehindPeer("target: its own log does not have the transaction that was committed")
        self._target.begin(lsn)
        if self._careful.apply(void, marks, until=arrived):
            self._target.commit(None, lsn, void[-1].row.commit_time)
        else:
            self._target.roll_back()
        self._careful.forget_void()

    def require_table(self, table: TargetTable) -> None:
        """Check that the peer mirrors the table, too.

        Raises:
            OperatorNeeded: It does not.
        """
        self._peer.require_table(table)

    def begin(self) -> None:
        """Forget what an earlier transaction, or one that was undone, has found."""
        self._careful.forget_void()

    def watch_holds(self) -> None:
        """End the holds of rows that the target itself has written again."""
        found = holds(self._target, self._mirror)
        end = self._peer.log_end()
        for table in {one.table for one in found}:
            held = [one for one in found if one.table == table]
            after = max(self._looked_at, min(one.lsn for one in held))
            own = self._peer.own_writes(table, [one.key for one in held], after, self._other)
            for one in held:
                if one.key in own and own[one.key].write.lsn > one.lsn:
                    end_hold(self._target, one.number)
        self._looked_at = end

    def _usual_way(self, changes: Sequence[MirroredChange], marks: Marks) -> None:
        fresh: dict[str, set[str]] = {}
        for segment in segments(changes):
            self._applying.apply(segment, strict=True, mirrored_only=True)
            for topic, keys in segment.fresh.items():
                fresh.setdefault(topic, set()).update(keys)
        if self._careful.has_rival(fresh.items(), marks.seen_by(changes[0].row.lsn)):
            raise Unexpected


def _refuse_adoption(changes: Iterable[MirroredChange]) -> None:
    """Refuse rows of a backfill that have no key: the other side may have them, and nothing could tell."""
    for change in changes:
        if change.row.key is None and change.op == "read":
            topic = change.row.topic
            raise OperatorNeeded(
                f"the table {topic} has no key, so the rows of both sides cannot be compared, and would double",
                hint=f'Give it a primary key, or leave it out of both mirrors with "!{topic}" in `tables`.',
            )


def _is_truncate(change: MirroredChange) -> bool:
    return change.op == "truncate"


def without_new_keys(changes: Iterable[MirroredChange]) -> Iterator[MirroredChange]:
    """Yield the changes. An update that changed the key becomes a delete of the old key and an insert of the new."""
    for change in changes:
        row = change.row
        if row.old_key is None or row.old_key == row.key:
            yield change
            continue
        yield MirroredChange(row._replace(key=row.old_key, old_key=None), "delete", None, change.old, ())
        yield MirroredChange(row._replace(old_key=None), "insert", change.record, None, change.unchanged)
