"""Whether the store's history is the source's, and where the two end. Raises where they do not fit; changes nothing.

A change's position counts within one history of one source. For example, a source that was restored from a backup gives
new commits LSNs that the store knows already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cdcbridge.errors import OperatorNeeded, SourceUnavailable
from cdcbridge.lsn import format_lsn
from cdcbridge.source.slots import Identity, Slot
from cdcbridge.store.log import History

SLOT_GONE: Final = (
    "the slot does not exist any more, and the store knows of it: changes after the store's end are lost to it"
)
_RECREATE: Final = "`cdcbridge slot recreate` makes it anew and goes on behind a gap message."


def refuse_lost(name: str, found: Sequence[Slot], *, begun: bool) -> None:
    """Raises OperatorNeeded where the slot is lost, or is gone although the store has begun with it."""
    if begun and not found:
        raise OperatorNeeded(f"{name}: {SLOT_GONE}", hint=_RECREATE)
    for slot in found:
        if slot.wal_status == "lost":
            raise OperatorNeeded(
                f"the slot {slot.name!r} is lost ({slot.invalidation or 'its WAL was removed'}): changes after"
                f" {format_lsn(slot.confirmed_flush_lsn or 0)} are gone",
                hint=_RECREATE,
            )


def compare_ends(slot: str, stored: int, slot_lsn: int, wal_end: int, *, on_standby: bool) -> None:
    """Raises OperatorNeeded where the slot begins behind the store's end, or the source's WAL ends before it."""
    if stored > wal_end and on_standby:
        raise SourceUnavailable(
            f"source: the standby has replayed up to {format_lsn(wal_end)}, and the store ends at {format_lsn(stored)}"
        )
    if stored > wal_end:
        raise OperatorNeeded(
            f"the store ends at {format_lsn(stored)}, but the source's WAL at {format_lsn(wal_end)}: the source"
            " was set back (restored), and new commits would be taken for ones that are known",
            hint="Use a new store.schema for the source's new history.",
        )
    if slot_lsn > stored:
        raise OperatorNeeded(
            f"the slot {slot!r} has confirmed {format_lsn(slot_lsn)}, but the store ends at"
            f" {format_lsn(stored)}: what lies between is gone (the slot was recreated or advanced, or the store"
            " was restored)",
            hint=f"`cdcbridge slot skip --to {format_lsn(slot_lsn)}` goes on behind a gap message.",
        )


def compare_history(history: History, source: Identity, slot: str) -> None:
    """Raises OperatorNeeded where the store holds another source's changes. A renamed database is the same source."""
    database = history.database if history.database_oid == source.database_oid else source.database
    if history.database_oid not in (None, source.database_oid) and database == history.database:
        raise OperatorNeeded(
            f"this store holds the changes of another source: the database {database} was dropped and created again",
            hint="One store schema serves one source: set store.schema to another name.",
        )
    for what, stored, found in (
        ("system identifier", history.system_identifier, source.system_identifier),
        ("database", history.database, database),
        ("slot", history.slot, slot),
    ):
        if stored != found:
            raise OperatorNeeded(
                f"this store holds the changes of another source: its {what} is {stored!r}, the source's is {found!r}",
                hint=f"Set source.slot back to {stored}. A second slot needs a store of its own, in another"
                ' store.schema: docs/OPERATIONS.md, "Changing source.plugin".'
                if what == "slot"
                else "One store schema serves one source: set store.schema to another name, or correct source.dsn.",
            )
