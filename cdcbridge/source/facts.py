"""What the source is, and where its slot stands, read once. Part of the rim; changes nothing.

`check`, `run`, `slot recreate` and `lag` go by the same facts, so that they cannot say different things of one slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cdcbridge.database import Connection, source_errors
from cdcbridge.source.slots import Identity, Slot, slots

_FAILOVER_SLOTS: Final = 170000
# pg_walfile_name() begins with the timeline in eight hexadecimal digits. On a standby it raises an error.
_SERVER: Final = """
    select s.system_identifier::text, d.datname::text, d.oid::int8, pg_is_in_recovery(),
           case when not pg_is_in_recovery() then pg_walfile_name(pg_current_wal_lsn()) end,
           current_setting('server_encoding')
    from pg_control_system() s join pg_database d on d.datname = current_database()
"""


@dataclass(slots=True, frozen=True)
class SourceFacts:
    """The source at one moment.

    version: as `SHOW server_version_num` has it, for example 180001.
    timeline: the one that the server writes. 0 on a standby, which tells it in a replication session alone.
    encoding: of the database, for example UTF8.
    slot: the configured slot, None where the server has none of that name.
    """

    identity: Identity
    version: int
    on_standby: bool
    timeline: int
    encoding: str
    slot: Slot | None

    @property
    def slot_lsn(self) -> int:
        """Up to which LSN the slot was confirmed; 0 without a slot."""
        return 0 if self.slot is None else self.slot.confirmed_flush_lsn or 0

    @property
    def may_fail_over(self) -> bool:
        """Whether the server can keep the slot on its standbys.

        Source: PostgreSQL manual, "Logical Replication Failover".
        """
        return self.version >= _FAILOVER_SLOTS and not self.on_standby


def look_at_source(connection: Connection, slot: str) -> SourceFacts:
    """Look at the server and its slot. Raises SourceUnavailable.

    A standby that is promoted between the two is still a standby in the facts, so the bridge looks again before it
    appends.
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
