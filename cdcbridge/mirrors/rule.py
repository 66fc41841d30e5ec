"""Decide between a write of the source and the target's row. The same decision is made on the other side.

A write that had seen another one never loses to it. Only two writes of which neither had seen the other are a conflict,
and only for these the configured rule counts. docs/TWO_WAY.md explains the rule with examples. The module is pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cdcbridge.config.mirror import ConflictRule

Kind = Literal[
    "insert_exists",
    "update_origin_differs",
    "update_exists",
    "update_missing",
    "delete_origin_differs",
    "delete_missing",
    "multiple_unique_conflicts",
]
Winner = Literal["source", "target"]


@dataclass(slots=True, frozen=True)
class Write:
    """A write of a row, on either side.

    Attributes:
        op: insert, update or delete. A row that a backfill read is an insert.
        lsn: The commit LSN, in the WAL of the write's own side.
        effective_time: The commit time that decides conflicts. On one side it never decreases.
        side: The identity of the database in which the write was made.
    """

    op: str
    lsn: int
    effective_time: int
    side: str


@dataclass(slots=True, frozen=True)
class Incoming:
    """A write of the source that a mirror is about to apply.

    Attributes:
        write: The write.
        seen: The commit LSN in the target's WAL up to which the source had applied the target's writes before it
            committed this one. 0: none.
    """

    write: Write
    seen: int


@dataclass(slots=True, frozen=True)
class Local:
    """The row of the same key in the target.

    Attributes:
        exists: Whether the target has the row.
        mirrored: Whether this mirror wrote the row last.
        own: The last write of the key that was made in the target itself, if the target's log has one. Writes that the
            source had seen may be left out.
    """

    exists: bool
    mirrored: bool
    own: Write | None


@dataclass(slots=True, frozen=True)
class Decision:
    """The result of decide().

    Attributes:
        apply: Whether the source's write is applied.
        kind: The kind of the conflict. None: it is none.
        winner: The side whose write is kept. None: the row is on hold, or there is no conflict.
    """

    apply: bool
    kind: Kind | None = None
    winner: Winner | None = None


def decide(incoming: Incoming, local: Local, rule: ConflictRule) -> Decision:
    """Decide whether the write of the source is applied to the target's row.

    Args:
        incoming: The source's write.
        local: The target's row, of which the caller holds the lock.
        rule: The rule for conflicts in this table.
    """
    rival = _rival(incoming, local)
    if rival is None:
        return _without_rival(incoming, local)
    kind = _kind(incoming.write.op, exists=local.exists)
    if incoming.write.op == "delete" and not local.exists:
        return Decision(False, kind, "target")  # both sides deleted the row
    winner = _winner(incoming.write, rival, rule)
    return Decision(winner == "source", kind, winner)


def _rival(incoming: Incoming, local: Local) -> Write | None:
    """Return the target's write that neither had seen the source's write nor was seen by it."""
    own = local.own
    if own is None or own.lsn <= incoming.seen:
        return None
    if local.exists and local.mirrored:
        return None  # the mirror wrote the row after it, so that conflict was decided before
    if not local.exists and own.op != "delete":
        return None  # the mirror deleted the row after it
    return own


def _without_rival(incoming: Incoming, local: Local) -> Decision:
    """Decide about a write that no other write competes with: it is applied."""
    if incoming.write.op == "insert" and local.exists and not local.mirrored:
        return Decision(True, "insert_exists", "source")
    if local.exists or incoming.write.op == "insert":
        return Decision(True)
    if incoming.write.op == "delete":
        return Decision(False, "delete_missing", "source")
    return Decision(True, "update_missing", "source")


def _kind(op: str, *, exists: bool) -> Kind:
    if op == "delete":
        return "delete_origin_differs" if exists else "delete_missing"
    if not exists:
        return "update_missing"
    return "insert_exists" if op == "insert" else "update_origin_differs"


def _winner(write: Write, rival: Write, rule: ConflictRule) -> Winner | None:
    if rule == "hold":
        return None
    if rule != "newest":
        return "source" if rule == "prefer_source" else "target"
    later = (write.effective_time, write.side) > (rival.effective_time, rival.side)
    return "source" if later else "target"
