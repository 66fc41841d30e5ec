"""What one append commits: log rows, who gets them, dead letters, backfills' progress, and the position. Plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from cdcbridge.changes.position import START, Position
from cdcbridge.routing.overtaken import Chunk

ROW_OVERHEAD: Final = 100  # bytes beside the data that a row costs in memory, for the batch's bound


@dataclass(slots=True)
class AppendBatch:
    """What one append commits.

    `rows`: for COPY, less their seqs; `keys` and `partitions`: theirs; `barriers`: the indexes of truncates.
    `in_order`: which consumers want order by key. `groups`: consumers that get the same rows → indexes into `rows`;
    `streams`: those that read some of it from the log itself. `keyed`: consumer with a key of its own → indexes and
    keys. `own`: (consumer, index, key, data) where the data is not the log's.
    `later`: (consumer, index, key, time) of messages that are not delivered before. `dead`: (consumer, index,
    reason, key). `refused`: what was wrong with messages in the WAL → how many, as (event, topic, reason).
    `chunks`: what backfills read, with how many messages that made.
    `spilled`: blocks of transactions in progress, as (xid, n, block); `unspilled`: transactions whose blocks may go.
    `gap`: the row is a gap message, with the `capture` to be remembered. `gaps`: each one's record, and the names of
    its consumers. `position` is of the last change read; `end_lsn` of the last transaction that is complete. `open`
    tells that the position stands inside a transaction whose rest is still to come. `commit_time` is of the last
    transaction, None where the source had nothing more.
    """

    rows: list[bytes] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    partitions: list[int] = field(default_factory=list)
    barriers: list[int] = field(default_factory=list)
    in_order: frozenset[int] = frozenset()
    groups: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    streams: set[int] = field(default_factory=set)
    keyed: dict[int, tuple[list[int], list[str | None]]] = field(default_factory=dict)
    later: list[tuple[int, int, str | None, str]] = field(default_factory=list)
    refused: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    own: list[tuple[int, int, str | None, bytes]] = field(default_factory=list)
    dead: list[tuple[int, int, str, str | None]] = field(default_factory=list)
    chunks: list[tuple[Chunk, int]] = field(default_factory=list)
    spilled: list[tuple[int, int, bytes]] = field(default_factory=list)
    unspilled: list[int] = field(default_factory=list)
    gap: bool = False
    gaps: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    capture: dict[str, Any] | None = None
    fed_again: int | None = (
        None  # the consumer that the gap message is for: its gap is told, and no other session tells it
    )
    size: int = 0
    position: Position = START
    end_lsn: int = 0
    open: bool = False
    commit_time: int | None = None
