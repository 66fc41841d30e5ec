"""Handle the server's notices in the stream.

wal2json reports a change that it drops only by such a notice. Each notice is handled before the next message of the
stream is decoded, so that its gap message is in the same append. This module never stops the stream because of a table:
the changes of all other tables continue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Final

import structlog

from cdcbridge.changes.events import Relation
from cdcbridge.errors import DecodeError
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.dropped_changes import Missing, add_gap, opening
from cdcbridge.routing.router import Router

_DROPPED: Final = re.compile(r'no tuple identifier for (UPDATE|DELETE) in table "(.+)"\."(.+)"')
log = structlog.get_logger()


class Notices:
    """The handler of the stream's notices: it opens a gap for the table of each dropped change."""

    def __init__(
        self,
        collector: Collector,
        router: Router,
        find: Callable[[str, str, str], Relation | None],
        left_out: Collection[str],
        missing: Missing,
    ) -> None:
        """Begin with the gaps that are reported already.

        Args:
            collector: Collects the stream. The gap message is added to its batch.
            router: Knows the consumers of each table.
            find: Returns the relation of (schema, table, action) as the transaction in progress has it. None: the table
                is not captured.
            left_out: The tables that are known to have no identity.
            missing: The gaps that are reported already.
        """
        self._collector = collector
        self._router = router
        self._find = find
        self._left_out = left_out
        self._missing = missing
        self._waiting: list[str] = []
        self.reason = ""  # why the session must start anew, once the gap message is in the store

    def note(self, message: str) -> None:
        """Keep a notice until the stream continues. libpq calls this in the middle of another call."""
        self._waiting.append(message)

    def heeded(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the stream's messages, and handle each notice at its place between them."""
        for message in messages:
            if self._waiting:
                self._heed()
            yield message

    def _heed(self) -> None:
        """Open a gap for each notice of a dropped change that a consumer takes, and log notices of other kinds."""
        for message in self._waiting:
            match = _DROPPED.search(message)
            if match is None:
                log.warning("source.notice", message=message)
                continue
            relation = self._find(match[2], match[3], match[1][0])
            if relation is not None and self._router.plan(relation, match[1].lower()) is not None:
                self._tell(relation, match[1])
        self._waiting.clear()

    def _tell(self, relation: Relation, operation: str) -> None:
        """Add a gap message for the table to the batch and log the gap, unless an earlier message covers the change."""
        batch, begin = self._collector.at_hand
        topic = relation.topic
        if begin is None or begin.commit_lsn is None:
            raise DecodeError("wal2json", f"a dropped {operation} of {topic} outside a transaction")
        commit_lsn = begin.commit_lsn
        if self._missing.tells(topic, commit_lsn):
            return
        number = self._missing.open(topic, commit_lsn)
        writes = {"update", "delete"}
        takers = [s for s in self._router.subscriptions(*topic.split(".", 1)) if s.operations & writes]
        add_gap(batch, begin, takers, opening(topic, commit_lsn), number)
        batch.capture = self._missing.dump()
        log.error(
            "changes.missing",
            table=topic,
            first=operation,
            from_lsn=format_lsn(commit_lsn),
            consumers=[taker.name for taker in takers],
            reason="it has no replica identity, so wal2json drops its updates and deletes. All other changes are"
            " delivered",
            fix=f"alter table {_quoted(relation)} replica identity full; -- or give it a primary key",
        )
        if topic not in self._left_out:
            self.reason = f"updates or deletes of {topic} are missing. The bridge starts again without them"


def _quoted(relation: Relation) -> str:
    return ".".join('"' + name.replace('"', '""') + '"' for name in (relation.schema, relation.table))
