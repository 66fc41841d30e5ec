"""Read the facts about source and store that decide how the bridge starts.

A bridge may be running at the same time, so the order of the reads matters. The slot is read before the store, because
it is never confirmed beyond the store's end. The WAL's end is read last, because the store never ends after it. This
module never changes a database. It may create a temporary slot.
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
    """The source and the store at one moment.

    Attributes:
        source: The facts about the source and its slot.
        store: The facts about the store.
        wal_end: The LSN at which the source's WAL ends. On a standby, the LSN up to which it has replayed.
        timeline: The source's timeline, or 0 on a standby that was read without a replication session.
        branch: The LSN at which that timeline left the store's. None if both are the same, if the source's timeline
            does not descend from the store's, or if there was no replication session.
        wal2json: Whether wal2json knows numeric-data-types-as-string. None if there is no usable wal2json, or if the
            answer is not needed.
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
    """Read the facts about source and store.

    Args:
        config: The configuration.
        connection: A session on the source.
        store: A session on the store, or None if it cannot be reached or does not exist yet.
        stream: A replication session, which can report timelines.
        wal2json: As in Facts. If it is None and the first start needs it, this function finds out with a temporary
            slot.

    Raises:
        SourceUnavailable: The source cannot be reached.
        StoreUnavailable: The store cannot be reached.
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
