"""Store the notes about transactions that mirrors need. The bridge does so in the append of their rows."""

from __future__ import annotations

from collections.abc import Collection

from cdcbridge.database import Connection
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.mirror_marks import TransactionMark


def mark_transactions(connection: Connection, marks: Collection[TransactionMark]) -> None:
    """Store these notes in the open transaction of the store."""
    connection.execute(
        "select mark_transactions(%s::pg_lsn[], %s, %s, %s::pg_lsn[], %s)",
        (
            [format_lsn(mark.commit_lsn) for mark in marks],
            [mark.marker and mark.marker.source for mark in marks],
            [mark.marker and mark.marker.mirror for mark in marks],
            [mark.marker and format_lsn(mark.marker.lsn) for mark in marks],
            [mark.effective_time for mark in marks],
        ),
    )
