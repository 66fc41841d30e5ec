"""`cdcbridge`, but killed with SIGKILL at a named instant: python -m tests.harness.crash INSTANT COUNT -- ARGUMENTS.

cdcbridge/instants.py has the list. The process dies the COUNT-th time that it reaches the instant. With
CRASH_SIGNAL=SIGSTOP in the environment it is stopped instead, and can be woken again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from cdcbridge import cli
from cdcbridge.instants import ALERT_INSTANTS, INSTANTS, MIRROR_INSTANTS, SINK_INSTANTS, AnyInstant, Instant, listen


def die_at(instant: AnyInstant, count: int) -> None:
    """Let this process die at the instant, the `count`-th time that it comes there."""
    assert instant in (*INSTANTS, *SINK_INSTANTS, *ALERT_INSTANTS, *MIRROR_INSTANTS), instant
    left = count
    number = getattr(signal, os.environ.get("CRASH_SIGNAL", "SIGKILL"))

    def die(reached: AnyInstant) -> None:
        nonlocal left
        if reached == instant:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    listen(die)


@contextmanager
def at(instant: Instant, act: Callable[[], object]) -> Iterator[None]:
    """Let this process act once, when it reaches the instant first. Fails where it never does."""
    acted = False

    def once(reached: AnyInstant) -> None:
        nonlocal acted
        if reached == instant and not acted:
            acted = True
            act()

    listen(once)
    try:
        yield
    finally:
        listen(None)
    assert acted, f"never reached: {instant}"


if __name__ == "__main__":
    name, times, _, *arguments = sys.argv[1:]
    die_at(cast("Instant", name), int(times))
    sys.argv = ["cdcbridge", *arguments]
    cli.main()
