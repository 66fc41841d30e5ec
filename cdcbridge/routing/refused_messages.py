"""What was not delivered of the messages that applications wrote into the WAL, in the bridge's log.

Counts come with batches that are durable. Says each kind for a topic once a minute at most: an application may write
thousands a second.
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
    """What was said when, and what has yet to be said."""

    def __init__(self) -> None:
        self._next: dict[tuple[str, str, str], float] = {}
        self._untold: Counter[tuple[str, str, str]] = Counter()

    def tell(self, batch: AppendBatch) -> None:
        """Log what the batch counted, for example `published.malformed topic=invoices reason=… messages=3`."""
        if not batch.refused:
            return
        self._untold.update(batch.refused)
        now = time.monotonic()
        for what in batch.refused:
            if now >= self._next.get(what, 0.0):
                event, topic, reason = what
                log.warning(event, topic=topic, reason=reason, messages=self._untold.pop(what))
                self._next[what] = now + _EVERY
