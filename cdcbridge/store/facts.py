"""What the store holds: of which source, and up to where, read once. Part of the rim; changes nothing.

Reads a store that an older version of this program made, too: `check` looks before anything is migrated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cdcbridge.changes.position import START, Position
from cdcbridge.database import Connection, store_errors
from cdcbridge.lsn import parse_lsn
from cdcbridge.store.migrate import schema_version

# As JSON, because an older store lacks some of the columns. `catalog` is large, and not needed here.
_LOOK: Final = """
    select (select to_jsonb(s) - 'catalog' - 'feeds' from source s),
           (select to_jsonb(p) from positions p order by p.id desc limit 1)
"""


@dataclass(slots=True, frozen=True)
class History:
    """The source whose changes the store holds. `database_oid`: None in a store that began before it was kept."""

    system_identifier: str
    timeline: int
    database: str
    slot: str
    plugin: str
    database_oid: int | None = None


@dataclass(slots=True, frozen=True)
class Tail:
    """Where the log ends: the last change's position, the end of the last complete transaction, and, where the
    position stands inside a transaction, the options that it was begun with.
    """

    position: Position = START
    end_lsn: int = 0
    unfinished: dict[str, Any] | None = None

    @property
    def known_lsn(self) -> int:
        """Up to which LSN the log has changes. It has some of an unfinished transaction, which ends later."""
        return self.end_lsn if self.unfinished is None else max(self.end_lsn, self.position.commit_lsn + 1)


@dataclass(slots=True, frozen=True)
class StoreFacts:
    """The store at one moment. Without a history: it is empty, or not there yet.

    capture: what the last session began with, as Capture.dump() has it.
    """

    history: History | None = None
    tail: Tail = Tail()
    capture: dict[str, Any] | None = None


def look_at_store(connection: Connection) -> StoreFacts:
    """Look at the history and the log's end, in one statement. Raises StoreUnavailable."""
    with store_errors():
        row = connection.execute(_LOOK).fetchone() if schema_version(connection) else None
    source, position = row or (None, None)
    if source is None:
        return StoreFacts()
    names = ("system_identifier", "timeline", "database", "slot", "plugin", "database_oid")
    tail = Tail()
    if position is not None:
        where = Position(parse_lsn(position["commit_lsn"]), position["ordinal"])
        tail = Tail(where, parse_lsn(position["end_lsn"]), position.get("unfinished"))
    return StoreFacts(History(*(source.get(name) for name in names)), tail, source.get("capture"))
