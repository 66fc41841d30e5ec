"""The base of every thread of the bridge: its name, start, stop, end and error. Never knows what a thread works on.

docs/ARCHITECTURE.md has a table of all threads. Threads exchange values through a mailbox (mailbox.py).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Final, Self

import structlog

PATIENCE: Final = 5.0  # seconds
log = structlog.get_logger()


class Background(ABC):
    """A daemon thread that runs _work() until that returns. _work() ends soon after `_stop` was set.

    In a `with` block the thread lives from entry to exit, and the exit waits up to `patience` seconds for its end.
    Otherwise use start(), stop() and join(). A subclass that has to wake its thread extends stop().
    """

    def __init__(self, name: str, *, patience: float | None = PATIENCE) -> None:
        self.error: BaseException | None = None  # the exception that ended _work(), written by the thread alone
        self._patience = patience
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.join(self._patience)

    @property
    def name(self) -> str:
        return self._thread.name

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def start(self) -> None:
        """Start the thread, unless it was told to stop before. Call once."""
        if not self._stop.is_set():
            self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end; returns at once. Safe from another thread, before the start, and more than once."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, up to `timeout` seconds; whether no thread is left. True for one that was never started."""
        if self.started:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @abstractmethod
    def _work(self) -> None:
        """Run in the thread."""

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
            raise  # to threading.excepthook, which is log_failure() in a running bridge


def log_failure(failure: threading.ExceptHookArgs) -> None:
    """Log the exception that ended a thread, with its traceback: this is a mistake in the program.

    The program continues without that thread, for example without housekeeping, until its session starts anew.
    """
    log.error(
        "thread.failed",
        thread=failure.thread.name if failure.thread else "",
        error=" ".join(str(failure.exc_value).split()) or failure.exc_type.__name__,
        exc_info=failure.exc_value,
    )
