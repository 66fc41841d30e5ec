"""Measure the unfinished messages of the consumers.

This module only reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from cdcbridge.database import Connection


@dataclass(slots=True, frozen=True)
class ConsumerLag:
    """The measurements of one consumer, with times in seconds.

    Attributes:
        pending: Messages that wait.
        in_flight: Messages that are delivered and not finished.
        dead: Dead letters.
        oldest_age_seconds: Age of the oldest unfinished message.
        delayed: How many of `pending` wait for their time.
        oldest_due_age_seconds: How long the oldest message has waited that may be delivered now, or is delivered and
            not finished.
        held: How many of `pending`, at least, open transactions of receivers keep from all other receivers.
    """

    name: str
    mode: str
    pending: int
    in_flight: int
    dead: int
    oldest_age_seconds: float | None
    delayed: int = 0
    oldest_due_age_seconds: float | None = None
    paused: bool = False
    held: int = 0


def consumer_lags(store: Connection) -> list[ConsumerLag]:
    """Return the measurements of the consumers that the session's role may read."""
    return [ConsumerLag(*row) for row in store.execute("select * from consumer_lag()")]
