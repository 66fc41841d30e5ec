"""Hold everything that one append commits, as plain data.

A batch has log rows, their fan-out, dead letters, the progress of backfills, and the position. The module is pure and
never decides which consumer gets a message: `collector` and `verdict` do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from cdcbridge.changes.position import START, Position
from cdcbridge.routing.mirror_marks import TransactionMark
from cdcbridge.routing.overtaken import Chunk

ROW_OVERHEAD: Final = 100  # bytes of memory that a row costs in addition to its data; they count for a batch's size


@dataclass(slots=True)
class AppendBatch:
    """Everything that one append commits.

    An index is the place of a row in `rows`. The append turns it into a seq.

    Attributes:
        rows: The messages as rows for COPY, without their seqs.
        keys: The log's key of each row.
        partitions: The partition of each row.
        barriers: The indexes of truncates.
        in_order: The ids of all fifo consumers, which need order by key.
        groups: For consumers that get the same rows and use the log's keys: their ids → the indexes.
        streams: The ids of the stream consumers that read some of these rows. They read the log itself.
        keyed: For a consumer with keys of its own: its id → the indexes, and its key of each.
        later: Messages that must not be delivered before a time: (consumer, index, key, time in ISO 8601).
        refused: How many messages in the WAL were refused, and why: (event, topic, reason) → count.
        own: Messages for which a consumer gets other data than the log has: (consumer, index, key, data).
        dead: Dead letters: (consumer, index, reason, key).
        chunks: The chunks of backfills in this batch, each with the number of messages that it became.
        spilled: Blocks of transactions in progress: (xid, number of the block, block).
        unspilled: The xids of transactions whose blocks the append deletes from the store.
        gap: Whether the batch has a gap message.
        gaps: The record of each gap message, and the names of the consumers that get it.
        capture: The new record of the publications and tables that are captured, or of the gaps of `dropped_changes`.
            The append stores it. None: the stored one stays.
        fed_again: The id of the consumer that the gap message is for, because the bridge did not feed it for a while.
            The append also deletes the note of that gap, so that no later session reports it again.
        size: About how many bytes of memory the batch takes.
        position: The position of the last change that was read.
        end_lsn: The LSN at which the last complete transaction ends.
        open: Whether the position is inside a transaction, the rest of which has not arrived yet.
        commit_time: The commit time of the last transaction, in microseconds since 2000-01-01 UTC. None: the source had
            sent everything.
        effective_time: The greatest commit time of the transactions up to here, in the same unit.
        marks: Notes about transactions, for the mirrors, by commit LSN.
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
    fed_again: int | None = None
    size: int = 0
    position: Position = START
    end_lsn: int = 0
    open: bool = False
    commit_time: int | None = None
    effective_time: int = 0
    marks: dict[int, TransactionMark] = field(default_factory=dict)
