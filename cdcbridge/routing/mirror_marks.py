"""Read the marker that a mirror writes into each transaction that it applies.

The marker is a transactional logical message, and the first thing that the transaction writes. It names the database
from which the changes came, and the LSN up to which that database's changes are applied with this commit. The reader of
the WAL therefore knows which transactions a mirror must not send back. It also knows what each later transaction of its
own side has seen. The module is pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import orjson

from cdcbridge.lsn import format_lsn, parse_lsn

MARKER_PREFIX: Final = "cdcbridge.mirror"
# A message outside of any transaction. A mirror that must know the newest changes of its target writes one, and waits
# until the target's log has passed it.
PROBE_PREFIX: Final = "cdcbridge.probe"


@dataclass(slots=True, frozen=True)
class Marker:
    """The origin of a transaction that a mirror applied.

    Attributes:
        source: The identity of the database from which the changes came, as source_identity() returns it.
        lsn: The commit LSN, in that database's WAL, up to which its changes are applied.
        mirror: The name of the mirror. Another mirror from the same database may have come less far.
    """

    source: str
    lsn: int
    mirror: str

    def dump(self) -> str:
        """Return the content of the logical message."""
        content = {"source": self.source, "lsn": format_lsn(self.lsn), "mirror": self.mirror}
        return orjson.dumps(content).decode()

    @classmethod
    def read(cls, content: bytes) -> Marker | None:
        """Return the marker in a logical message, or None if the content is not one."""
        try:
            parsed = orjson.loads(content)
            return cls(str(parsed["source"]), parse_lsn(parsed["lsn"]), str(parsed["mirror"]))
        except (ValueError, TypeError, KeyError):
            return None


@dataclass(slots=True, frozen=True)
class TransactionMark:
    """A note about one transaction, which the log keeps for the mirrors.

    Attributes:
        commit_lsn: The LSN at which the transaction committed.
        marker: Where its changes came from. None: it was written here.
        effective_time: The commit time with which conflicts are decided, in microseconds since 2000-01-01 UTC. It is
            never less than that of an earlier transaction. None: the commit time itself.
    """

    commit_lsn: int
    marker: Marker | None
    effective_time: int | None


def source_identity(system_identifier: str, database_oid: int) -> str:
    """Return the identity of a database, for example `7412345678901234567/16384`."""
    return f"{system_identifier}/{database_oid}"
