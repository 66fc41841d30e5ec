"""The base class of every thread of the bridge: its name, start, stop, end and error.

docs/ARCHITECTURE.md has a table of all threads. Threads exchange values through a mailbox (mailbox.py). Never knows the
work that a thread does.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Final, Self

import structlog

PATIENCE: Final = 5.0  # seconds
log = structlog.get_logger()


class Background(ABC):
    """A daemon thread that runs _work() until that method returns.

    _work() must return soon after `_stop` was set. In a `with` block the thread lives from entry to exit, and the exit
    waits up to `patience` seconds for its end. Without a `with` block, callers use start(), stop() and join(). A
    subclass that has to wake its thread extends stop().

    Args:
        name: The name of the thread.
        patience: Seconds that the exit of a `with` block waits for the end of the thread. None waits without a limit.
    """

    def __init__(self, name: str, *, patience: float | None = PATIENCE) -> None:
        self.error: BaseException | None = None  # the exception that ended _work(), written only by the thread
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
        """Start the thread, unless stop() was called before. Call this once."""
        if not self._stop.is_set():
            self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, and return at once.

        Any thread may call this, also before the start and more than once.
        """
        self._stop.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds for the thread to end, and return whether it has ended.

        A thread that was never started counts as ended.
        """
        if self.started:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @abstractmethod
    def _work(self) -> None:
        """Do the work of the thread. This runs in the thread itself."""

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
            raise  # to threading.excepthook, which is log_failure() in a running bridge


def log_failure(failure: threading.ExceptHookArgs) -> None:
    """Log the exception that ended a thread, with its traceback.

    Such an exception is a mistake in the program. The program continues without that thread until it starts to stream
    again. For example, it does no housekeeping in the meantime.
    """
    log.error(
        "thread.failed",
        thread=failure.thread.name if failure.thread else "",
        error=" ".join(str(failure.exc_value).split()) or failure.exc_type.__name__,
        exc_info=failure.exc_value,
    )
