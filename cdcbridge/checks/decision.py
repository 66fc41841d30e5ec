"""How a start goes on, decided from the facts. Pure: each case is a row of a test that needs no server.

Makes no choice that could lose a change: where store and slot do not fit together it says from where to where, and
refuses. For example, a source that was restored from a backup gives new commits LSNs that the store knows already.
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
    "the slot does not exist any more, and the store knows of it: changes after the store's end are lost to it"
)
_RECREATE: Final = "`cdcbridge slot recreate` makes it anew and goes on behind a gap message."


class Refusal(NamedTuple):
    """Why no session can start. `code`: as `check` calls it."""

    code: str
    error: CdcbridgeError


class TimelineGap(NamedTuple):
    """LSNs between which the log has changes of a timeline that the source has left."""

    first: int
    last: int


class Branch(NamedTuple):
    """The timeline that the store is on and the source has left, at which LSN, and the gap that this makes, if any."""

    left: int
    lsn: int
    gap: TimelineGap | None


@dataclass(slots=True, frozen=True)
class Plan:
    """What a start does.

    plugin: the output plugin that decodes.
    identity: of the source.
    timeline: the source's.
    first: the store is empty, and its history begins.
    make_slot: there is no slot yet.
    snapshot: the slot is made with an exported snapshot, from which consumers are filled.
    failover: what the slot's failover property is to become; None where it stays.
    finishing: the session only completes the transaction that the log has in part.
    branch: where the source has left the store's timeline, if it has.
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
    """Decide what a start does. Raises the error of a refusal.

    consistent: `run --consistent`.
    unpublished: the rest of an unfinished transaction cannot be decoded, because a publication did not exist.
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
    """The plugin that the configuration means. `auto` keeps the one that there is.

    A new slot gets wal2json where that is new enough and the database is UTF8.
    """
    if config.source.plugin != "auto":
        return config.source.plugin
    if facts.store.history is not None:
        return facts.store.history.plugin
    if facts.source.slot is not None:
        return facts.source.slot.plugin
    return "wal2json" if facts.wal2json and facts.source.encoding == "UTF8" else "pgoutput"


def refusal(config: Config, facts: Facts) -> Refusal | None:
    """The first reason why store, source and slot do not fit together, or None.

    Knows nothing of timelines: on a new one the store's end may move.
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
    """The error for a store with another source's changes, or None. A renamed database is the same source."""
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
    """The refusal of a slot that is lost, or that is gone although the store has begun with it."""
    slot = facts.source.slot
    if slot is None:
        if facts.store.history is None:
            return None
        return Refusal("slot_gone", OperatorNeeded(f"{name}: {SLOT_GONE}", hint=_RECREATE))
    if slot.wal_status != "lost":
        return None
    error = OperatorNeeded(
        f"the slot {name!r} is lost ({slot.invalidation or 'its WAL was removed'}): changes after"
        f" {format_lsn(facts.source.slot_lsn)} are gone",
        hint=_RECREATE,
    )
    return Refusal("slot_lost", error)


def ends_refusal(name: str, end: int, facts: Facts) -> Refusal | None:
    """The refusal of a slot that begins behind the store's `end`, or of a source whose WAL ends before it."""
    if end > facts.wal_end and facts.source.on_standby:
        behind = SourceUnavailable(
            f"source: the standby has replayed up to {format_lsn(facts.wal_end)}, and the store ends at"
            f" {format_lsn(end)}"
        )
        return Refusal("standby_behind", behind)
    if end > facts.wal_end:
        set_back = OperatorNeeded(
            f"the store ends at {format_lsn(end)}, but the source's WAL at {format_lsn(facts.wal_end)}: the source"
            " was set back (restored), and new commits would be taken for ones that are known",
            hint="Use a new store.schema for the source's new history.",
        )
        return Refusal("source_set_back", set_back)
    if facts.source.slot_lsn > end:
        return Refusal("slot_beyond_store", beyond_store(name, end, facts.source.slot_lsn))
    return None


def beyond_store(name: str, end: int, slot_lsn: int) -> OperatorNeeded:
    """The error for a slot that has confirmed more than the store has."""
    return OperatorNeeded(
        f"the slot {name!r} has confirmed {format_lsn(slot_lsn)}, but the store ends at"
        f" {format_lsn(end)}: what lies between is gone (the slot was recreated or advanced, or the store"
        " was restored)",
        hint=f"`cdcbridge slot skip --to {format_lsn(slot_lsn)}` goes on behind a gap message.",
    )


def _other_plugin(config: Config, facts: Facts) -> Refusal | None:
    history, wanted = facts.store.history, wanted_plugin(config, facts)
    if history is None or wanted == history.plugin:
        return None
    error = OperatorNeeded(
        f"the store's changes were decoded by {history.plugin}, and source.plugin is {wanted}: positions of one are"
        " not those of the other",
        hint=f"Set source.plugin back to {history.plugin}. The way to {wanted} is a second slot and a second store:"
        ' docs/OPERATIONS.md, "Changing source.plugin".',
    )
    return Refusal("other_plugin", error)


def _branch(config: Config, history: History, facts: Facts) -> Branch:
    """Where the source has left the store's timeline. Raises OperatorNeeded where it does not come from that one."""
    tail, branch, slot_lsn = facts.store.tail, facts.branch, facts.source.slot_lsn
    if branch is None:
        raise OperatorNeeded(
            f"the source is on timeline {facts.timeline}, which does not come from timeline {history.timeline}; the"
            f" store holds changes up to {format_lsn(tail.known_lsn)} of that one",
            hint="It is another history: use a new store.schema for it.",
        )
    gap = None
    # A slot that was kept in step is never confirmed behind the branch: one that is has been read on the new timeline.
    if branch < tail.known_lsn and slot_lsn <= branch:
        gap = TimelineGap(min(branch, tail.end_lsn), tail.known_lsn)
    _raise(ends_refusal(config.source.slot, tail.end_lsn if gap is None else gap.first, facts))
    return Branch(history.timeline, branch, gap)


def wants_failover(config: Config, source: SourceFacts) -> bool:
    """Whether standbys are to keep the slot, as source.failover has it and the server can."""
    return config.source.failover is not False and source.may_fail_over


def _failover(config: Config, facts: Facts) -> bool | None:
    """What an existing slot's failover property is to become; None where it stays, or cannot be altered."""
    slot, wanted = facts.source.slot, wants_failover(config, facts.source)
    if slot is None or slot.failover is None or slot.failover == wanted or facts.source.on_standby:
        return None
    return wanted


def _raise(found: Refusal | None) -> None:
    if found is not None:
        raise found.error
