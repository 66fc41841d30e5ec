"""How long a client's call may take: the clock, the limits, and the pauses between two attempts.

Knows no session. Never decides that a call is given up: _sessions_async.py does, by these limits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from typing import Any, Final, TypeVar

import psycopg

from cdcbridge.errors import UsageError

ANSWER: Final = 5.0  # seconds for an answer of the server; a session that stays silent for longer is given up
COUNTING: Final = 600.0  # the same for a statement that counts the log
PATIENCE: Final = 10.0  # seconds of further attempts for a call that has neither a lease nor a `wait`
LONGEST: Final = 300.0  # and for one whose lease is longer than this
LEAVING: Final = 2.0  # seconds of further attempts to give back what was fetched and not begun
MANY: Final = 5_000  # deliveries whose end may take longer than ANSWER
AWAY: Final = 0.5  # seconds between two tries of a loop, each of which has made its own attempts
IDLE: Final = 1.0  # messages() and workers wait at least so long for a message, whatever `wait` is

T = TypeVar("T")

if hasattr(time, "CLOCK_BOOTTIME"):

    def now() -> float:
        """Seconds that pass while the process is stopped and while the machine sleeps, too: leases end then."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)
else:
    now = time.monotonic


class NoAnswer(psycopg.OperationalError):
    """The server, or a proxy before it, takes statements and does not answer."""


def limited(steps: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    """The steps of one exchange with the server. Raises NoAnswer where one takes longer than this without a byte.

    psycopg resumes the steps ten times a second with 0 where nothing arrived.
    """
    end = now() + seconds
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if ready:
                end = now() + seconds
            elif now() > end:
                raise NoAnswer(f"no answer within {seconds:g} s")
            wanted = steps.send(ready)
    except StopIteration as last:
        result: T = last.value
        return result


class Pace:
    """Growing pauses, from 0.05 to 2 seconds, with jitter."""

    def __init__(self) -> None:
        self._next = 0.05

    def next(self) -> float:
        pause, self._next = self._next, min(2.0, self._next * 2)
        return pause * random.uniform(0.5, 1)  # noqa: S311 - no secret depends on it


def refuse_bad_time(name: str, value: float | None, *, zero: bool = True) -> None:
    """Raise UsageError where the value of an argument is no number of seconds. None is a default, and good."""
    if value is not None and not (value >= 0 if zero else value > 0):
        raise UsageError(f"{name} is {value}; it must be {'at least' if zero else 'more than'} 0 seconds")


def patient(wait: float, stop_when_empty: bool) -> float:
    """How long a loop waits for messages: without end, a `wait` of 0 would ask a thousand times a second."""
    return wait if stop_when_empty else max(wait, IDLE)
