"""Count the deliveries of one sink in this process since its last report to the store, and keep its present errors.

The module is pure: `runner` writes the numbers to the store.
"""

from __future__ import annotations

from typing import Any

import structlog

from cdcbridge.sinks.target import Outgoing

log = structlog.get_logger()


class Stats:
    """The counters of one sink in this process, and its present errors.

    An error belongs to a lane, so that one lane that delivers does not hide the error of another one.

    Args:
        name: The name of the consumer.

    Attributes:
        delivered: The number of messages that the target has acknowledged.
        failed: The number of messages that became dead letters.
        retried: The number of failed attempts at a message that is tried again.
        batches: The number of batches.
        seconds: How long these batches took, in seconds.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._errors: dict[int | None, str] = {}
        self._blocked: dict[int, dict[str, Any]] = {}
        self._told: tuple[str | None, dict[str, Any] | None] = (None, None)
        self._refusal = ""
        self._zero()

    def _zero(self) -> None:
        self.delivered = self.failed = self.retried = self.batches = 0
        self.seconds = 0.0

    @property
    def error(self) -> str | None:
        """The newest error that lasts, or None."""
        return next(reversed(self._errors.values()), None)

    @property
    def blocked(self) -> dict[str, Any] | None:
        """The first message for which others wait, or None."""
        return self._blocked[min(self._blocked)] if self._blocked else None

    def delivers(self, messages: int, seconds: float, lane: int | None = None) -> None:
        """Count a batch of which so many messages were delivered.

        Args:
            messages: The number of messages.
            seconds: How long it took.
            lane: The number of the lane, or None for claims.
        """
        self.delivered += messages
        self.batches += 1
        self.seconds += seconds
        if messages and self._errors.pop(lane, None) is not None:
            log.info("sink.recovered", consumer=self._name)

    def fails(self, reason: str, *, hint: str | None = None, lane: int | None = None) -> None:
        """Record an error of the target, with its fix. An error that lasts is logged once."""
        error = f"{reason} (fix: {hint})" if hint else reason
        if error not in self._errors.values():
            log.warning("sink.failed", consumer=self._name, error=reason, **({"hint": hint} if hint else {}))
        self._errors.pop(lane, None)
        self._errors[lane] = error

    def retries(self, reason: str, messages: int) -> None:
        """Count failed attempts at messages that are tried again. A reason that repeats is logged once."""
        self.retried += messages
        if reason != self._refusal:
            log.info("sink.retried", consumer=self._name, reason=reason)
        self._refusal = reason

    def buries(self, seq: int, reason: str) -> None:
        """Count a message that became a dead letter."""
        self.failed += 1
        self._blocked.pop(seq, None)
        log.warning("sink.dead_letter", consumer=self._name, seq=seq, reason=reason)

    def blocks(self, message: Outgoing, reason: str) -> None:
        """Record a message that the target refuses, and for which others wait."""
        topic = message.headers.get("cdcbridge-topic", "")
        blocked = {"seq": message.seq, "topic": topic, "key": message.key, "reason": reason}
        if self._blocked.get(message.seq) != blocked:
            log.error("sink.blocked", consumer=self._name, **blocked)
        self._blocked[message.seq] = blocked

    def passes(self, seq: int) -> None:
        """Record that a message was delivered, for which others may have waited."""
        self._blocked.pop(seq, None)

    def take(self) -> tuple[list[int], float, str | None, dict[str, Any] | None] | None:
        """Return the counters and the present state for the store, and begin at zero. None: nothing has changed."""
        counts = [self.delivered, self.failed, self.retried, self.batches]
        state = (self.error, self.blocked)
        if not any(counts) and state == self._told:
            return None
        seconds = self.seconds
        self._zero()
        self._told = state
        return counts, seconds, *state
