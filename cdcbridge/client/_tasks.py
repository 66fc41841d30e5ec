"""Locks, background tasks, concurrency and signals of the asynchronous clients.

`_threads.py` provides the same names for the synchronous clients. Never uses a session.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeAlias, TypeVar

T = TypeVar("T")
Handler: TypeAlias = Callable[[T], Awaitable[object]]
Lock = asyncio.Lock
sleep = asyncio.sleep
Cancelled = asyncio.CancelledError
ASYNCHRONOUS = True  # which kind of handler a worker takes
_GIVING_BACK = 5.0  # seconds that a cancelled handler has to end


async def acquired(lock: Lock, timeout: float) -> bool:  # noqa: ASYNC109 - the signature that _threads.py has
    """Acquire the lock, and return whether that succeeded within `timeout` seconds."""
    if lock.locked() and timeout <= 0:
        return False
    try:
        async with asyncio.timeout(timeout if lock.locked() else None):
            await lock.acquire()
    except TimeoutError:
        return False
    return True


def if_unused(lock: Lock, call: Callable[[], None]) -> None:
    """Make the call if the lock is free. The call does not wait, so no other task acquires the lock meanwhile."""
    if not lock.locked():
        call()


def being_cancelled() -> bool:
    """Return whether the current task is being cancelled.

    If not, a CancelledError in this task is the error of another task that it waited for.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def begin(call: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """Run the call in a background task."""
    return asyncio.create_task(call(), name="cdcbridge leases")


def end(task: asyncio.Task[None]) -> None:
    """Cancel a background task."""
    task.cancel()


class Closing(AsyncGenerator[T, None]):
    """A generator that is closed as soon as a loop over it was left.

    By default the event loop closes it later, and never if the event loop ends first. For example, asyncio.run() ends
    so after a `return` inside `async for`. Here the closing task exists at once, and asyncio.run() waits for it.
    """

    def __init__(self, inner: AsyncGenerator[T, None]) -> None:
        self._inner = inner
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def asend(self, value: None) -> T:
        self._loop = asyncio.get_running_loop()
        return await self._inner.asend(value)

    async def athrow(self, *details: Any) -> T:
        return await self._inner.athrow(*details)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def __del__(self) -> None:
        with suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            if loop is self._loop:
                task = loop.create_task(self._inner.aclose())
                _closing.add(task)
                task.add_done_callback(_closing.discard)


_closing: set[asyncio.Task[None]] = set()


class Slots:
    """A number of free slots, one for each handler that may run at the same time."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._changed = asyncio.Event()

    async def take(self, timeout: float) -> int:  # noqa: ASYNC109 - the signature that _threads.py has
        """Take all free slots, and wait for one if there is none.

        Returns:
            The number of slots, or 0 if none became free within `timeout` seconds.
        """
        if not self._free:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)
        taken, self._free = self._free, 0
        return taken

    def give(self, number: int) -> None:
        """Give this number of slots back."""
        self._free += number
        self._changed.set()


class Group:
    """Calls that run at the same time. On leaving, the group waits up to `grace` seconds for them.

    Then it cancels the remaining tasks, and waits _GIVING_BACK seconds for their end.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._tasks: set[asyncio.Future[Any]] = set()

    def start(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Run the call in a task."""
        task = asyncio.ensure_future(call(*arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=self._grace)
        finally:
            late = list(self._tasks)
            for task in late:
                task.cancel()
        if late:
            await asyncio.wait(late, timeout=_GIVING_BACK)


@contextmanager
def on_signals(call: Callable[[], None]) -> Iterator[None]:
    """Make SIGTERM and SIGINT run the call, once.

    A second signal has its default effect again. Outside of the main thread, signals are not handled here.
    """
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
        yield  # not in the main thread, whose code has to call stop()
        return
    try:
        yield
    finally:
        forget()
