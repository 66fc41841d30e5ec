"""Decide from the facts about source and store how the bridge starts, or refuse the start.

This module never accesses a database, so that each case is one row of a test without a server. It never makes a choice
that could lose a change. If store and slot do not fit together, it refuses and reports both LSNs. For example, a source
that was restored from a backup gives new commits LSNs that the store already knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from cdcbridge.checks.facts import Facts
from cdcbridge.config import Config
from cdcbridge.errors import CdcbridgeError, OperatorNeeded, SourceUnavailable
from cdcbridge.lsn import format_lsn
from cdcbridge.source.facts import SourceFacts
from cdcbridge.source.slots import Identity
from cdcbridge.store.facts import History

SLOT_GONE: Final = (
    "the slot no longer exists, but the store continues from it: the changes after the store's end are lost"
)
_RECREATE: Final = "`cdcbridge slot recreate` creates it again and continues after a gap message."


class Refusal(NamedTuple):
    """The reason why no session can start, with the problem code that `check` reports for it."""

    code: str
    error: CdcbridgeError


class TimelineGap(NamedTuple):
    """The range of LSNs in which the log has changes of a timeline that the source has left."""

    first: int
    last: int


class Branch(NamedTuple):
    """The point at which the source left the store's timeline.

    Attributes:
        left: The timeline that the store is on and the source has left.
        lsn: The LSN at which the source left it.
        gap: The changes in the log that belong to the old timeline alone, or None if there are none.
    """

    left: int
    lsn: int
    gap: TimelineGap | None


@dataclass(slots=True, frozen=True)
class Plan:
    """The actions of one start.

    Attributes:
        plugin: The output plugin that decodes.
        identity: The identity of the source.
        timeline: The timeline of the source.
        first: True if the store is empty, so that its history begins now.
        make_slot: True if the slot does not exist yet.
        snapshot: True if the slot is created with an exported snapshot, from which consumers are filled.
        failover: The new value of the slot's failover property, or None to leave it as it is.
        finishing: True if the session only completes a transaction of which the log has the beginning.
        branch: The point at which the source left the store's timeline, or None if it did not leave it.
    """

    plugin: str
    identity: Identity
    timeline: int
    first: bool = False
    make_slot: bool = False
    snapshot: bool = False
    failover: bool | None = None
    finishing: bool = False
    branch: Branch | None = None


def decide(config: Config, facts: Facts, *, consistent: bool = False, unpublished: bool = False) -> Plan:
    """Return the plan of a start, or raise the error of the first refusal.

    Args:
        config: The configuration.
        facts: The facts about source and store.
        consistent: True for `run --consistent`.
        unpublished: True if the rest of an unfinished transaction cannot be decoded, because a publication did not
            exist when its WAL was written.
    """
    _raise(refusal(config, facts))
    _raise(_other_plugin(config, facts))
    history, unfinished = facts.store.history, facts.store.tail.unfinished is not None
    branch = None
    if history is not None and history.timeline != facts.timeline:
        branch = _branch(config, history, facts)
    return Plan(
        wanted_plugin(config, facts),
        facts.source.identity,
        facts.timeline,
        first=history is None,
        make_slot=facts.source.slot is None,
        snapshot=facts.source.slot is None and consistent,
        failover=_failover(config, facts),
        finishing=unfinished and not unpublished and (branch is None or branch.gap is None),
        branch=branch,
    )


def wanted_plugin(config: Config, facts: Facts) -> str:
    """Return the output plugin that the configuration selects.

    With `auto`, the plugin of the store's history is kept, or else the plugin of the existing slot. A new slot gets
    wal2json if that is new enough and the database is UTF8, and pgoutput otherwise.
    """
    if config.source.plugin != "auto":
        return config.source.plugin
    if facts.store.history is not None:
        return facts.store.history.plugin
    if facts.source.slot is not None:
        return facts.source.slot.plugin
    return "wal2json" if facts.wal2json and facts.source.encoding == "UTF8" else "pgoutput"


def refusal(config: Config, facts: Facts) -> Refusal | None:
    """Return the first reason why store, source and slot do not fit together, or None.

    If the source is on another timeline than the store, the LSNs are not compared here: the store's end may move.
    """
    return next(_refusals(config, facts), None)


def _refusals(config: Config, facts: Facts) -> Iterator[Refusal]:
    history, name = facts.store.history, config.source.slot
    if history is not None and (error := other_source(history, facts.source.identity, name)):
        yield Refusal("other_source", error)
    if lost := slot_refusal(name, facts):
        yield lost
    same = history is not None and history.timeline == facts.timeline
    if same and (unfit := ends_refusal(name, facts.store.tail.end_lsn, facts)):
        yield unfit


def other_source(history: History, source: Identity, slot: str) -> OperatorNeeded | None:
    """Return the error for a store that holds the changes of another source, or None.

    A renamed database is the same source, because it keeps its OID.
    """
    database = history.database if history.database_oid == source.database_oid else source.database
    if history.database_oid not in (None, source.database_oid) and database == history.database:
        return OperatorNeeded(
            f"this store holds the changes of another source: the database {database} was dropped and created again",
            hint="One store schema serves one source: set store.schema to another name.",
        )
    for what, stored, found in (
        ("system identifier", history.system_identifier, source.system_identifier),
        ("database", history.database, database),
        ("slot", history.slot, slot),
    ):
        if stored != found:
            return OperatorNeeded(
                f"this store holds the changes of another source: its {what} is {stored!r}, the source's is {found!r}",
                hint=f"Set source.slot back to {stored}. A second slot needs a store of its own, in another"
                ' store.schema: docs/OPERATIONS.md, "Changing source.plugin".'
                if what == "slot"
                else "One store schema serves one source: set store.schema to another name, or correct source.dsn.",
            )
    return None


def slot_refusal(name: str, facts: Facts) -> Refusal | None:
    """Return the refusal for a slot that is lost, or that is missing although the store has a history with it."""
    slot = facts.source.slot
    if slot is None:
        if facts.store.history is None:
            return None
        return Refusal("slot_gone", OperatorNeeded(f"{name}: {SLOT_GONE}", hint=_RECREATE))
    if slot.wal_status != "lost":
        return None
    error = OperatorNeeded(
        f"the slot {name!r} is lost ({slot.invalidation or 'its WAL was removed'}): changes after"
        f" {format_lsn(facts.source.slot_lsn)} are lost",
        hint=_RECREATE,
    )
    return Refusal("slot_lost", error)


def ends_refusal(name: str, end: int, facts: Facts) -> Refusal | None:
    """Return the refusal for a slot that begins after `end`, or for a source whose WAL ends before it.

    A standby may still replay the missing WAL. Its refusal is therefore a SourceUnavailable, which `run` retries.

    Args:
        name: The name of the slot.
        end: The LSN up to which the store has all changes.
        facts: The facts about source and store.
    """
    if end > facts.wal_end and facts.source.on_standby:
        behind = SourceUnavailable(
            f"source: the standby has replayed up to {format_lsn(facts.wal_end)}, and the store ends at"
            f" {format_lsn(end)}"
        )
        return Refusal("standby_behind", behind)
    if end > facts.wal_end:
        set_back = OperatorNeeded(
            f"the store ends at {format_lsn(end)}, but the source's WAL at {format_lsn(facts.wal_end)}: the source"
            " was restored to an earlier state, so its new commits could be mistaken for known ones",
            hint="Use a new store.schema for the source's new history.",
        )
        return Refusal("source_set_back", set_back)
    if facts.source.slot_lsn > end:
        return Refusal("slot_beyond_store", beyond_store(name, end, facts.source.slot_lsn))
    return None


def beyond_store(name: str, end: int, slot_lsn: int) -> OperatorNeeded:
    """Return the error for a slot that was confirmed beyond the store's end."""
    return OperatorNeeded(
        f"the slot {name!r} has confirmed {format_lsn(slot_lsn)}, but the store ends at"
        f" {format_lsn(end)}: the changes between them are lost (the slot was recreated or advanced, or the store"
        " was restored)",
        hint=f"`cdcbridge slot skip --to {format_lsn(slot_lsn)}` continues after a gap message.",
    )


def _other_plugin(config: Config, facts: Facts) -> Refusal | None:
    history, wanted = facts.store.history, wanted_plugin(config, facts)
    if history is None or wanted == history.plugin:
        return None
    error = OperatorNeeded(
        f"the store's changes were decoded by {history.plugin}, and source.plugin is {wanted}: their positions"
        " do not match",
        hint=f"Set source.plugin back to {history.plugin}. To change to {wanted}, use a second slot and a second store:"
        ' docs/OPERATIONS.md, "Changing source.plugin".',
    )
    return Refusal("other_plugin", error)


def _branch(config: Config, history: History, facts: Facts) -> Branch:
    """Find the point at which the source left the store's timeline.

    Raises OperatorNeeded if the source's timeline does not descend from the store's. Raises the error of
    `ends_refusal()` if the slot or the source's WAL does not fit the store.
    """
    tail, branch, slot_lsn = facts.store.tail, facts.branch, facts.source.slot_lsn
    if branch is None:
        raise OperatorNeeded(
            f"the source is on timeline {facts.timeline}, which does not descend from timeline {history.timeline}. The"
            f" store holds changes of that one up to {format_lsn(tail.known_lsn)}",
            hint="It is another history: use a new store.schema for it.",
        )
    gap = None
    # After a failover, a slot that was synchronized to the standby is confirmed at most up to the branch. A slot that
    # is confirmed after the branch was already read on the new timeline.
    if branch < tail.known_lsn and slot_lsn <= branch:
        gap = TimelineGap(min(branch, tail.end_lsn), tail.known_lsn)
    _raise(ends_refusal(config.source.slot, tail.end_lsn if gap is None else gap.first, facts))
    return Branch(history.timeline, branch, gap)


def wants_failover(config: Config, source: SourceFacts) -> bool:
    """Return whether standbys should keep the slot: source.failover allows it and the server supports it."""
    return config.source.failover is not False and source.may_fail_over


def _failover(config: Config, facts: Facts) -> bool | None:
    """Return the new value of an existing slot's failover property, or None if it stays or cannot be altered."""
    slot, wanted = facts.source.slot, wants_failover(config, facts.source)
    if slot is None or slot.failover is None or slot.failover == wanted or facts.source.on_standby:
        return None
    return wanted


def _raise(found: Refusal | None) -> None:
    if found is not None:
        raise found.error
