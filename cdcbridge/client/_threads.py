"""What the synchronous client runs on. `_tasks.py` has the same for the other one."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeAlias, TypeVar

T = TypeVar("T")
Handler: TypeAlias = Callable[[T], object]
Lock = threading.Lock
sleep = time.sleep
Cancelled = asyncio.CancelledError
ASYNCHRONOUS = False  # which kind of handler a worker takes


def acquired(lock: threading.Lock, timeout: float) -> bool:
    """Whether the lock was taken in time."""
    return lock.acquire(timeout=timeout) if timeout > 0 else lock.acquire(blocking=False)


def if_unused(lock: threading.Lock, call: Callable[[], None]) -> None:
    """Do it under the lock, where that is free."""
    if lock.acquire(blocking=False):
        try:
            call()
        finally:
            lock.release()


def being_cancelled() -> bool:
    """Nobody can tell a thread to end."""
    return False


def begin(call: Callable[[], None]) -> threading.Thread:
    """Run it in the background."""
    thread = threading.Thread(target=call, daemon=True, name="cdcbridge leases")
    thread.start()
    return thread


def end(_thread: threading.Thread) -> None:
    """A background thread ends by itself."""


def Closing(inner: Generator[T, None, None]) -> Generator[T, None, None]:  # noqa: N802 - the tasks' needs a class
    """Return the generator: Python closes it as soon as a loop over it was left."""
    return inner


class Slots:
    """So many may be taken at a time."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._changed = threading.Condition()

    def take(self, timeout: float) -> int:
        """All that are free, once one is; 0 where none became free in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._free, timeout)
            taken, self._free = self._free, 0
            return taken

    def give(self, number: int) -> None:
        """Give some back."""
        with self._changed:
            self._free += number
            self._changed.notify_all()


class Group:
    """Runs calls beside each other; on leaving waits for them up to `grace` seconds, and then leaves them behind."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._threads: list[threading.Thread] = []

    def start(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=call, args=arguments, daemon=True, name="cdcbridge worker")
        self._threads.append(thread)
        thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + self._grace
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def on_signals(call: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call this once; a second one does what it always did."""
    before: dict[int, Any] = {}

    def stop(_number: int, _frame: object) -> None:
        forget()
        call()

    def forget() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread: whoever is there stops us
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        forget()
