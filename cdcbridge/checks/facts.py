"""The facts of both sides, which decide how a start goes on. Part of the rim; changes nothing.

The order of the looks matters, because a bridge may be running meanwhile. The slot comes first: it is never confirmed
beyond the store's end. The WAL's end comes last: the store never ends behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cdcbridge.config import Config
from cdcbridge.database import Connection
from cdcbridge.source import plugins
from cdcbridge.source.facts import SourceFacts, look_at_source
from cdcbridge.source.replication import ReplicationStream
from cdcbridge.source.slots import current_lsn
from cdcbridge.store.facts import StoreFacts, look_at_store


@dataclass(slots=True, frozen=True)
class Facts:
    """Source and store, as they were found.

    wal_end: where the source's WAL ends; on a standby, up to where it has replayed.
    timeline: the source's timeline. 0 on a standby that was looked at without a replication session.
    branch: where that timeline left the store's. None where they are the same, where the one does not come from the
        other, and without a replication session.
    wal2json: whether wal2json is there and knows numeric-data-types-as-string. None where that decides nothing.
    """

    source: SourceFacts
    store: StoreFacts
    wal_end: int
    timeline: int
    branch: int | None = None
    wal2json: bool | None = None


def look(
    config: Config,
    connection: Connection,
    store: Connection | None,
    stream: ReplicationStream | None = None,
    *,
    wal2json: bool | None = None,
) -> Facts:
    """Look at both sides. Raises SourceUnavailable or StoreUnavailable.

    store: None where it is out of reach, or not there yet.
    stream: a replication session, which knows timelines.
    wal2json: see Facts. None: it is tried here, with a temporary slot, if the first start needs it.
    """
    source = look_at_source(connection, config.source.slot)
    timeline = source.timeline if stream is None else stream.identify()[1]
    stored = StoreFacts() if store is None else look_at_store(store)
    history = stored.history
    branch = None
    if stream is not None and history is not None and timeline != history.timeline:
        branch = stream.branch(history.timeline, timeline)
    if wal2json is None and config.source.plugin == "auto" and source.slot is None and history is None:
        wal2json = plugins.supports_numbers_as_text(config.source_dsn)
    return Facts(source, stored, current_lsn(connection), timeline, branch, wal2json)
