"""Read which source a store belongs to, and where its log ends.

A store that an older version of this program made can be read, too, because `check` looks before anything is migrated.
Never changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cdcbridge.changes.position import START, Position
from cdcbridge.database import Connection, store_errors
from cdcbridge.lsn import parse_lsn
from cdcbridge.store.migrate import schema_version

# As JSON, because an older store lacks some of the columns. `catalog` is large, and is not needed here.
_LOOK: Final = """
    select (select to_jsonb(s) - 'catalog' - 'feeds' from source s),
           (select to_jsonb(p) from positions p order by p.id desc limit 1)
"""


@dataclass(slots=True, frozen=True)
class History:
    """The source whose changes the store holds.

    Attributes:
        database_oid: None in a store that began before this was kept.
    """

    system_identifier: str
    timeline: int
    database: str
    slot: str
    plugin: str
    database_oid: int | None = None


@dataclass(slots=True, frozen=True)
class Tail:
    """The end of the log.

    Attributes:
        position: The position of the last change.
        end_lsn: The end of the last complete transaction.
        unfinished: If the position is inside a transaction, the options with which that transaction was begun, else
            None.
        effective_time: The greatest commit time of the transactions in the log, in microseconds since 2000-01-01 UTC.
    """

    position: Position = START
    end_lsn: int = 0
    unfinished: dict[str, Any] | None = None
    effective_time: int = 0

    @property
    def known_lsn(self) -> int:
        """The LSN up to which the log has changes.

        It includes the appended part of an unfinished transaction, which ends after `end_lsn`.
        """
        return self.end_lsn if self.unfinished is None else max(self.end_lsn, self.position.commit_lsn + 1)


@dataclass(slots=True, frozen=True)
class StoreFacts:
    """The state of the store at one moment.

    Attributes:
        history: None if the store is empty, or does not exist yet.
        capture: The publications and tables with which the last session began, in the form of Capture.dump().
    """

    history: History | None = None
    tail: Tail = Tail()
    capture: dict[str, Any] | None = None


def look_at_store(connection: Connection) -> StoreFacts:
    """Read the source and the end of the log, in one statement.

    Raises:
        StoreUnavailable: The store cannot be reached.
    """
    with store_errors():
        row = connection.execute(_LOOK).fetchone() if schema_version(connection) else None
    source, position = row or (None, None)
    if source is None:
        return StoreFacts()
    names = ("system_identifier", "timeline", "database", "slot", "plugin", "database_oid")
    tail = Tail()
    if position is not None:
        where = Position(parse_lsn(position["commit_lsn"]), position["ordinal"])
        latest = position.get("effective_time") or 0
        tail = Tail(where, parse_lsn(position["end_lsn"]), position.get("unfinished"), latest)
    return StoreFacts(History(*(source.get(name) for name in names)), tail, source.get("capture"))
