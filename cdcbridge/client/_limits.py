"""Time limits of a client's calls: the clock, the limits, and the pauses between two attempts.

Never uses a session, and never ends a call: _sessions_async.py does that by these limits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from datetime import datetime
from typing import Any, Final, TypeVar

import psycopg

from cdcbridge.errors import UsageError
from cdcbridge.units import parse_duration

ANSWER: Final = 5.0  # seconds for an answer of the server, after which the session is closed
COUNTING: Final = 600.0  # the same for a statement that counts messages of the log
PATIENCE: Final = 10.0  # seconds of further attempts for a call without a lease or `wait`
LONGEST: Final = 300.0  # upper limit of these seconds for a call with a lease
LEAVING: Final = 2.0  # seconds of further attempts to give back messages that were not begun
MANY: Final = 5_000  # deliveries whose ack or nack may take longer than ANSWER
AWAY: Final = 0.5  # seconds between two fetches of a loop, each of which has made its own attempts
IDLE: Final = 1.0  # seconds that each fetch of messages(), batches() and workers waits at least

T = TypeVar("T")

if hasattr(time, "CLOCK_BOOTTIME"):

    def now() -> float:
        """Return seconds of a clock that also runs while the process is stopped or the machine sleeps."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)
else:
    now = time.monotonic


class NoAnswer(psycopg.OperationalError):
    """The server, or a proxy in front of it, accepts statements and does not answer."""


def limited(steps: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    """Run the steps of one exchange with the server, and limit the silence.

    psycopg resumes the steps ten times a second with 0 if nothing arrived.

    Args:
        steps: psycopg's generator of the exchange.
        seconds: Longest time without a byte from the server.

    Raises:
        NoAnswer: The server stayed silent for longer.
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
    """Pauses that grow from 0.05 to 2 seconds. Each one is shortened at random, by up to half."""

    def __init__(self) -> None:
        self._next = 0.05

    def next(self) -> float:
        """Return the next pause in seconds."""
        pause, self._next = self._next, min(2.0, self._next * 2)
        return pause * random.uniform(0.5, 1)  # noqa: S311 - no secret depends on it


def refuse_bad_time(name: str, value: float | None, *, zero: bool = True) -> None:
    """Raise UsageError for an argument that is not a number of seconds. None means a default.

    Args:
        name: Name of the argument.
        value: Its value in seconds.
        zero: Whether 0 is allowed.
    """
    if value is not None and not (value >= 0 if zero else value > 0):
        raise UsageError(f"{name} is {value}, but must be {'at least' if zero else 'more than'} 0 seconds")


def refuse_bad_delay(delay: float | str | None, deliver_at: datetime | None) -> float | None:
    """Return the delay of a published message in seconds, for example 300 for "5m".

    Raises:
        UsageError: `delay` is not a time, `deliver_at` has no time zone, or both are given.
    """
    if isinstance(delay, str):
        try:
            delay = parse_duration(delay)
        except ValueError as error:
            raise UsageError(f"delay: {error}") from None
    refuse_bad_time("delay", delay)
    if delay is not None and deliver_at is not None:
        raise UsageError(
            f"delay is {delay:g} s and deliver_at is {deliver_at}: both are given", hint="Give one of them."
        )
    refuse_no_zone("deliver_at", deliver_at)
    return delay


def refuse_no_zone(name: str, time: datetime | None) -> None:
    """Raise UsageError for a time without a time zone, because it names no instant."""
    if time is not None and time.utcoffset() is None:
        raise UsageError(
            f"{name} is {time.isoformat(sep=' ')}, which has no time zone",
            hint="datetime.now(UTC), or datetime(…, tzinfo=ZoneInfo('Europe/Berlin')).",
        )


def patient(wait: float, stop_when_empty: bool) -> float:
    """Return the seconds that a loop waits for messages in each of its fetches.

    A loop that does not stop when it finds no message waits at least IDLE seconds. With `wait=0` it would ask a
    thousand times a second.
    """
    return wait if stop_when_empty else max(wait, IDLE)
