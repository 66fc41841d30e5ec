"""`cdcbridge`, but killed with SIGKILL at a named instant: python -m tests.harness.crash INSTANT COUNT -- ARGUMENTS.

The instants are steps of a change's path; the process dies the COUNT-th time it comes there. With CRASH_SIGNAL=SIGSTOP in
the environment it is stopped instead, and can be woken again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cdcbridge import cli
from cdcbridge.bridge.session import StreamingSession
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.wal2json import Wal2jsonDecoder
from cdcbridge.routing.collector import Collector
from cdcbridge.source.replication import ReplicationStream
from cdcbridge.store.log import Store

# instant → (class, method, whether to die before or after it)
INSTANTS: dict[str, tuple[tuple[type, ...], str, str]] = {
    "received": ((PgoutputDecoder, Wal2jsonDecoder), "_row", "before"),
    "decoded": ((Collector,), "_change", "before"),
    "collected": ((Collector,), "_change", "after"),
    "submitted": ((StreamingSession,), "_submit", "after"),
    "append begun": ((Store,), "_begin", "after"),
    "rows copied": ((Store,), "_write", "after"),
    "position written": ((Store,), "_finish", "after"),
    "committed": ((Store,), "append", "after"),
    "about to note feeds": ((Store,), "set_feeds", "before"),
    "about to confirm": ((ReplicationStream,), "confirm", "before"),
    "confirmed": ((ReplicationStream,), "confirm", "after"),
}


def die_at(owner: type, name: str, when: str, count: int) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    left = count
    number = getattr(signal, os.environ.get("CRASH_SIGNAL", "SIGKILL"))

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if left == 0 and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, dying)


def prepare(instant: str, count: int) -> None:
    """Let this process die at the instant, the `count`-th time that it comes there."""
    owners, method, moment = INSTANTS[instant]
    for one in owners:
        die_at(one, method, moment, count)


if __name__ == "__main__":
    instant, times, _, *arguments = sys.argv[1:]
    prepare(instant, int(times))
    sys.argv = ["cdcbridge", *arguments]
    cli.main()
