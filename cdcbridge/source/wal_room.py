"""Find out how much WAL the source may still keep, and how much WAL other slots keep.

PostgreSQL itself does not report the free space on its disk. The operating system does, but only if the data directory
of this very server is on this machine and readable. This module never changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cdcbridge.database import Connection, source_errors
from cdcbridge.problem import Alarm
from cdcbridge.units import human_size

_LIMIT: Final = "select nullif(setting::bigint, -1) * 1048576 from pg_settings where name = 'max_slot_wal_keep_size'"
# A role without pg_read_all_settings sees no such row.
_DIRECTORY: Final = """
    select s.setting, (select c.system_identifier from pg_control_system() c)::text
    from pg_settings s where s.name = 'data_directory'
"""
_OTHERS: Final = """
    select slot_name, slot_type, plugin, database, active, wal_status,
           pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
                           restart_lsn)::bigint
    from pg_replication_slots where slot_name <> %s
    order by 7 desc nulls last, slot_name
"""


@dataclass(slots=True, frozen=True)
class OtherSlot:
    """A slot that does not belong to the bridge. If it keeps no WAL, `retained_bytes` is None."""

    name: str
    slot_type: str
    plugin: str | None
    database: str | None
    active: bool
    wal_status: str | None
    retained_bytes: int | None


@dataclass(slots=True, frozen=True)
class WalRoom:
    """The limits of the WAL on the source.

    Attributes:
        limit_bytes: The setting max_slot_wal_keep_size in bytes. None means that there is no limit, and slots may fill
            the disk.
        free_bytes: Free bytes on the disk of the WAL, or None if this process cannot find that out.
        others: All slots except the bridge's, beginning with the one that keeps most.
    """

    limit_bytes: int | None = None
    free_bytes: int | None = None
    others: tuple[OtherSlot, ...] = ()


def wal_room(connection: Connection, own: str) -> WalRoom:
    """Look up the limits once. The parameter `own` is the name of the bridge's slot."""
    with source_errors():
        limit = connection.execute(_LIMIT).fetchone()
        directory = connection.execute(_DIRECTORY).fetchone()
        others = connection.execute(_OTHERS, (own,)).fetchall()
    free = free_bytes(Path(directory[0]), directory[1]) if directory else None
    return WalRoom(limit[0] if limit else None, free, tuple(OtherSlot(*row) for row in others))


def free_bytes(directory: Path, system_identifier: str) -> int | None:
    """Return the free bytes for the WAL of the server with this data directory.

    The result is None if the directory is not readable, or belongs to another server.

    Source: PostgreSQL, src/include/catalog/pg_control.h: the file begins with the system identifier, of 8 bytes.
    """
    try:
        with (directory / "global" / "pg_control").open("rb") as control:
            found = control.read(8)
        if int(system_identifier) not in (int.from_bytes(found, "little"), int.from_bytes(found, "big")):
            return None
        room = os.statvfs(directory / "pg_wal")
    except OSError:
        return None
    return room.f_bavail * room.f_frsize


def other_alarms(others: Iterable[OtherSlot], max_retained: int) -> list[Alarm]:
    """Return an alarm for each other slot that keeps more than `max_retained` bytes, because it fills the same disk."""
    return [
        Alarm(
            "other_slot_retains_too_much",
            slot.name,
            f"the slot {slot.name}, which is not this bridge's, retains {human_size(slot.retained_bytes)} of WAL on the"
            f" same disk: {'make its reader faster' if slot.active else 'start its reader'}, or drop it: `select"
            f" pg_drop_replication_slot('{slot.name}')`",
        )
        for slot in others
        if slot.retained_bytes is not None and slot.retained_bytes > max_retained
    ]
