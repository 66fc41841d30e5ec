"""Log the messages that applications wrote into the WAL and that were not delivered as they were written.

The counts arrive with batches that are durable. Messages of the same event, topic and reason are one kind. Each kind is
logged at most once a minute, because an application may write thousands of messages a second.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

import structlog

from cdcbridge.routing.batch import AppendBatch

_EVERY: Final = 60.0  # seconds
log = structlog.get_logger()


class Refused:
    """The counts that are not logged yet, and the times before which each kind must not be logged again."""

    def __init__(self) -> None:
        self._next: dict[tuple[str, str, str], float] = {}
        self._untold: Counter[tuple[str, str, str]] = Counter()

    def tell(self, batch: AppendBatch) -> None:
        """Log the counts of a batch, for example `published.malformed topic=invoices reason=… messages=3`.

        A count that must not be logged yet is kept. The first batch after the minute that has a message of the same
        kind logs both.
        """
        if not batch.refused:
            return
        self._untold.update(batch.refused)
        now = time.monotonic()
        for what in batch.refused:
            if now >= self._next.get(what, 0.0):
                event, topic, reason = what
                log.warning(event, topic=topic, reason=reason, messages=self._untold.pop(what))
                self._next[what] = now + _EVERY
