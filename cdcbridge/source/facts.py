"""Read the facts about the source and its slot once.

The commands `check`, `run`, `slot recreate` and `lag` use the same facts, so that they cannot report different things
about one slot. This module never changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cdcbridge.database import Connection, source_errors
from cdcbridge.source.slots import Identity, Slot, slots

_FAILOVER_SLOTS: Final = 170000
# The name from pg_walfile_name() begins with the timeline in eight hexadecimal digits. On a standby the function raises
# an error.
_SERVER: Final = """
    select s.system_identifier::text, d.datname::text, d.oid::int8, pg_is_in_recovery(),
           case when not pg_is_in_recovery() then pg_walfile_name(pg_current_wal_lsn()) end,
           current_setting('server_encoding')
    from pg_control_system() s join pg_database d on d.datname = current_database()
"""


@dataclass(slots=True, frozen=True)
class SourceFacts:
    """The facts about the source at one moment.

    Attributes:
        version: The number that `SHOW server_version_num` prints, for example 180001.
        timeline: The timeline that the server writes. It is 0 on a standby, which reports its timeline only in a
            replication session.
        encoding: The encoding of the database, for example UTF8.
        slot: The configured slot, or None if the server has no slot with that name.
    """

    identity: Identity
    version: int
    on_standby: bool
    timeline: int
    encoding: str
    slot: Slot | None

    @property
    def slot_lsn(self) -> int:
        """The LSN up to which the slot was confirmed, or 0 without a slot."""
        return 0 if self.slot is None else self.slot.confirmed_flush_lsn or 0

    @property
    def may_fail_over(self) -> bool:
        """Return whether the server can keep the slot on its standbys.

        Source: PostgreSQL manual, "Logical Replication Failover".
        """
        return self.version >= _FAILOVER_SLOTS and not self.on_standby


def look_at_source(connection: Connection, slot: str) -> SourceFacts:
    """Read the facts about the server and its slot.

    If a standby is promoted between the two queries, the facts still describe a standby. The bridge therefore looks
    again before it appends.

    Raises:
        SourceUnavailable: The source cannot be reached.
    """
    with source_errors():
        [row] = connection.execute(_SERVER).fetchall()
    system_identifier, database, oid, on_standby, wal_file, encoding = row
    found = slots(connection, slot)
    return SourceFacts(
        Identity(system_identifier, database, oid),
        connection.info.server_version,
        on_standby,
        int(wal_file[:8], 16) if wal_file else 0,
        encoding,
        found[0] if found else None,
    )
