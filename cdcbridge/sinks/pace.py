"""When a sink may deliver next: the back-off after a failure, and the limit of `rate`.

The module is pure. Its callers sleep.
"""

from __future__ import annotations

import random
from typing import Final

_FIRST: Final = 0.1
_LONGEST: Final = 30.0


class Backoff:
    """The waiting times between attempts: a random time whose upper bound doubles from 0.1 s to 30 s."""

    def __init__(self) -> None:
        self._attempts = 0

    def next(self, at_least: float | None = None) -> float:
        """Return the seconds to wait before the next attempt.

        Args:
            at_least: The time that the target named, in seconds.
        """
        bound = min(_LONGEST, _FIRST * 2 ** min(self._attempts, 20))
        self._attempts += 1
        return max(at_least or 0.0, random.uniform(bound / 2, bound))  # noqa: S311 - not a secret

    def reset(self) -> None:
        """Begin anew, because something was delivered."""
        self._attempts = 0


class Rate:
    """A limit of messages in a second, of which this process has a share.

    Args:
        limit: The number of messages of all processes together, or None for no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self._whole = limit
        self._limit = limit
        self._free_at = 0.0

    def share(self, part: float) -> None:
        """Set the share of this process, for example 0.5. With 0 it delivers nothing, so that the last one remains."""
        if self._whole is not None and part > 0:
            self._limit = self._whole * part

    @property
    def most(self) -> int | None:
        """The most messages of a batch: those of one second, so that no batch is a burst. None: no limit."""
        return None if self._limit is None else max(1, int(self._limit))

    def wait(self, messages: int, now: float) -> float:
        """Return the seconds to wait before a batch of so many messages may be delivered.

        Args:
            messages: The number of messages of the batch.
            now: The present time on a clock that never steps back, in seconds.
        """
        if self._limit is None:
            return 0.0
        begins = max(self._free_at, now)
        self._free_at = begins + messages / self._limit
        return begins - now
