"""A message of the log as a sink reads it, and its identity.

The module is pure and never reads the log: `log_session` and `claims` do.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

_OP: Final = re.compile(r'\s*\{\s*"op"\s*:\s*"(\w+)"')
HEAD: Final = 20  # characters in which the operation of a change ends: few texts, which are remembered
_BREAKS: Final = re.compile(r"[\r\n]")


class SinkMessage(NamedTuple):
    """A message that a sink delivers.

    Attributes:
        seq: The number of the message in the log.
        id: Its identity.
        topic: The name of the table or of the published topic.
        key: The consumer's key of the message, or None.
        partition: The partition of the log.
        op: The operation, for example `insert`.
        data: The JSON text of `data`, in one line.
        commit_lsn: The commit LSN, or None for a published message.
        ordinal: The place of the change in its transaction, or None.
        xid: The transaction, or None if it is not known.
        commit_time: The JSON text of the time of the commit, or `null`.
        inserted_at: The JSON text of the time at which the message was added to the log.
        deliver_count: The number of deliveries, this one included.
        old_key: The key before an update that changed it. None: the same key, or the mode is not `stream`.
    """

    seq: int
    id: str
    topic: str
    key: str | None
    partition: int
    op: str
    data: str
    commit_lsn: str | None
    ordinal: int | None
    xid: int | None
    commit_time: str
    inserted_at: str
    deliver_count: int = 1
    old_key: str | None = None


class Origin(NamedTuple):
    """The identity of the source, from which the identities of messages are made.

    Attributes:
        system: The system identifier of the source's server.
        database: The name of the source's database.
        slot: The replication slot. No other store of the server uses it.
        from_seqs: The first seq of each timeline, ascending.
        timelines: The number of each timeline.
    """

    system: str
    database: str
    slot: str
    from_seqs: Sequence[int]
    timelines: Sequence[int]

    @property
    def store(self) -> str:
        """A name of the store that no other store has, also if both have a consumer of one name and one target."""
        return f"{self.system}-{self.slot}"

    def identity(self, seq: int, op: str, commit_lsn: str | None, ordinal: int | None) -> str:
        """Return the identity of a message, which is the same at each delivery.

        A change has `SYSTEM/TIMELINE/COMMIT_LSN/ORDINAL`. A published message and a row that a backfill read have
        `SYSTEM/seq/SEQ`.
        """
        if commit_lsn is None or op == "read":
            return f"{self.system}/seq/{seq}"
        return f"{self.system}/{self.timeline(seq)}/{commit_lsn}/{ordinal}"

    def timeline(self, seq: int) -> int:
        """Return the timeline on which a message was committed."""
        if len(self.timelines) == 1:
            return self.timelines[0]
        return self.timelines[bisect_right(self.from_seqs, seq) - 1]


def op_of(data: str) -> str:
    """Return the operation that a message's `data` contains."""
    return op_at_start(data[:HEAD]) or _operation(data) or "message"


def _operation(text: str) -> str | None:
    found = _OP.match(text)
    return found[1] if found is not None else None


op_at_start: Final = lru_cache(256)(_operation)


def in_one_line(data: str) -> str:
    """Return JSON text without line breaks. JSON has raw line breaks only between tokens."""
    return _BREAKS.sub(" ", data) if "\n" in data or "\r" in data else data
