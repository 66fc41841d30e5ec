"""What the asynchronous client runs on. `_threads.py` has the same for the other one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeAlias, TypeVar

T = TypeVar("T")
Handler: TypeAlias = Callable[[T], Awaitable[object]]
Lock = asyncio.Lock
sleep = asyncio.sleep


class Slots:
    """So many may be taken at a time."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._changed = asyncio.Event()

    async def take(self, timeout: float) -> int:  # noqa: ASYNC109 - as the threads' has it
        """All that are free, once one is; 0 where none became free in time."""
        if not self._free:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)
        taken, self._free = self._free, 0
        return taken

    def give(self, number: int) -> None:
        """Give some back."""
        self._free += number
        self._changed.set()


class Group:
    """Runs calls beside each other; on leaving waits for them up to `grace` seconds, and then leaves them behind."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._tasks: set[asyncio.Future[Any]] = set()

    def start(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        task = asyncio.ensure_future(call(*arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._tasks:
            _done, late = await asyncio.wait(self._tasks, timeout=self._grace)
            for task in late:
                task.cancel()


@contextmanager
def on_signals(call: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call this once; a second one does what it always did."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        forget()
        call()

    def forget() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
    except (RuntimeError, ValueError, NotImplementedError):
        yield  # not in the main thread: whoever is there stops us
        return
    try:
        yield
    finally:
        forget()
