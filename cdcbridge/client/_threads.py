"""Locks, background threads, concurrency and signals of the synchronous clients.

`_tasks.py` provides the same names for the asynchronous clients. Never uses a session.
"""

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
    """Acquire the lock, and return whether that succeeded within `timeout` seconds."""
    return lock.acquire(timeout=timeout) if timeout > 0 else lock.acquire(blocking=False)


def if_unused(lock: threading.Lock, call: Callable[[], None]) -> None:
    """Make the call under the lock, if the lock is free."""
    if lock.acquire(blocking=False):
        try:
            call()
        finally:
            lock.release()


def being_cancelled() -> bool:
    """Return False, because a thread cannot be cancelled."""
    return False


def begin(call: Callable[[], None]) -> threading.Thread:
    """Run the call in a background thread."""
    thread = threading.Thread(target=call, daemon=True, name="cdcbridge leases")
    thread.start()
    return thread


def end(_thread: threading.Thread) -> None:
    """Do nothing: a background thread ends by itself."""


def Closing(inner: Generator[T, None, None]) -> Generator[T, None, None]:  # noqa: N802 - a class in _tasks.py
    """Return the generator itself. Python closes it as soon as a loop over it was left."""
    return inner


class Slots:
    """A number of free slots, one for each handler that may run at the same time."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._changed = threading.Condition()

    def take(self, timeout: float) -> int:
        """Take all free slots, and wait for one if there is none.

        Returns:
            The number of slots, or 0 if none became free within `timeout` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free, timeout)
            taken, self._free = self._free, 0
            return taken

    def give(self, number: int) -> None:
        """Give this number of slots back."""
        with self._changed:
            self._free += number
            self._changed.notify_all()


class Group:
    """Calls that run at the same time. On leaving, the group waits up to `grace` seconds for them.

    Then it leaves the remaining threads running.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._threads: list[threading.Thread] = []

    def start(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Run the call in a thread."""
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
    """Make SIGTERM and SIGINT run the call, once.

    A second signal has the effect that it had before. Outside of the main thread, signals are not handled here.
    """
    before: dict[int, Any] = {}

    def stop(_number: int, _frame: object) -> None:
        forget()
        call()

    def forget() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():
        yield  # not in the main thread, whose code has to call stop()
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        forget()
