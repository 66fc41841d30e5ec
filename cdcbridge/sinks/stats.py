"""What a process has delivered for one sink since it last told the store, and what keeps it from delivering.

The module is pure: `runner` writes the numbers to the store.
"""

from __future__ import annotations

from typing import Any

import structlog

from cdcbridge.sinks.target import Outgoing

log = structlog.get_logger()


class Stats:
    """The counters of one sink in this process.

    Args:
        name: The name of the consumer.

    Attributes:
        delivered: The number of messages that the target has acknowledged.
        failed: The number of messages that became dead letters.
        retried: The number of failed attempts at a message that is tried again.
        batches: The number of batches.
        seconds: How long these batches took, in seconds.
        error: The present error, or None.
        blocked: The message for which others wait, or None.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.delivered = self.failed = self.retried = self.batches = 0
        self.seconds = 0.0
        self.error: str | None = None
        self.blocked: dict[str, Any] | None = None
        self._told: tuple[str | None, dict[str, Any] | None] = (None, None)

    def delivers(self, messages: int, seconds: float) -> None:
        """Count a batch of which so many messages were delivered."""
        self.delivered += messages
        self.batches += 1
        self.seconds += seconds
        if messages:
            if self.error is not None:
                log.info("sink.recovered", consumer=self._name)
            self.error = None

    def fails(self, reason: str, messages: int = 0, **facts: Any) -> None:
        """Record an error. An error that lasts is logged once."""
        self.retried += messages
        if reason != self.error:
            log.warning("sink.failed", consumer=self._name, error=reason, **facts)
        self.error = reason

    def buries(self, seq: int, reason: str) -> None:
        """Count a message that became a dead letter."""
        self.failed += 1
        log.warning("sink.dead_letter", consumer=self._name, seq=seq, reason=reason)

    def blocks(self, message: Outgoing, topic: str, reason: str) -> None:
        """Record the message for which others wait."""
        blocked = {"seq": message.seq, "topic": topic, "key": message.key, "reason": reason}
        if self.blocked != blocked:
            log.error("sink.blocked", consumer=self._name, **blocked)
        self.blocked = blocked

    def take(self) -> tuple[list[int], float, str | None, dict[str, Any] | None] | None:
        """Return the counters and the present state for the store, and begin at zero. None: nothing has changed."""
        counts = [self.delivered, self.failed, self.retried, self.batches]
        state = (self.error, self.blocked)
        if not any(counts) and state == self._told:
            return None
        taken = (counts, self.seconds, *state)
        self.delivered = self.failed = self.retried = self.batches = 0
        self.seconds = 0.0
        self._told = state
        return taken
