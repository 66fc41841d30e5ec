"""A worker, which fetches messages, passes them to a handler, and settles them by the handler's result.

`_worker.py` is made from this file by `make client`: change this one.

The table in docs/CONSUMERS.md lists how a handler can end. Never begins a handler whose delivery may have expired.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from cdcbridge.client._common import by_key
from cdcbridge.client._handlers import refuse_handler, refuse_unrun
from cdcbridge.client._tasks import ASYNCHRONOUS, Cancelled, Group, Handler, Slots, being_cancelled, on_signals
from cdcbridge.errors import CdcbridgeError

if TYPE_CHECKING:
    from cdcbridge.client._async import AsyncQueue
    from cdcbridge.client._settling_async import AsyncMessage

_TICK: Final = 0.25  # longest time in seconds until stop() is noticed while all handlers are busy
log: Final = logging.getLogger("cdcbridge.client")


class AsyncWorker:
    """A handler with a queue, made by worker(). Calling it calls the handler, and run() handles messages."""

    def __init__(
        self, queue: AsyncQueue, handler: Handler[AsyncMessage], concurrency: int, wait: float, grace: float
    ) -> None:
        refuse_handler(handler, asynchronous=ASYNCHRONOUS)
        self._queue = queue
        self._handler = handler
        self._concurrency = concurrency
        self._wait = wait
        self._grace = grace
        self._fetched: set[AsyncMessage] = set()  # messages whose job has not ended
        self._ending = False
        self._exit: BaseException | None = None  # SystemExit or KeyboardInterrupt of a handler

    async def __call__(self, message: AsyncMessage) -> object:
        return await self._handler(message)

    async def run(self) -> None:
        """Handle messages until stop(), SIGTERM or SIGINT, then wait for the running handlers.

        If a handler raises SystemExit or KeyboardInterrupt, the worker stops in the same way, and run() raises that
        error at its end. The handlers get the `grace` of worker() to end.

        Raises:
            UsageError: The client is closed, or belongs to another process.
        """
        queue = self._queue
        queue._refuse_unusable()
        self._ending, self._exit = False, None
        try:
            with on_signals(queue.stop):
                async with Group(self._grace) as group:
                    try:
                        await self._take(group)
                    finally:
                        self._ending = True
        finally:
            await self._end()
        if self._exit is not None:
            raise self._exit

    async def _take(self, group: Group) -> None:
        """Fetch messages while handlers are free. Start a job for each key, and for each message without a key."""
        queue, slots = self._queue, Slots(self._concurrency)
        while not queue.stopped:
            free = await slots.take(_TICK)
            if not free:
                continue
            fetched = await queue._fetch(free, self._wait) or []
            self._fetched.update(fetched)
            jobs = by_key(fetched)
            slots.give(free - len(jobs))
            for job in jobs:
                group.start(self._work, job, slots)

    async def _end(self) -> None:
        """Give back the messages that were not begun.

        A message that is still being handled is delivered again when its lease ends.
        """
        for message in await self._queue._give_back_rest(self._fetched):
            log.warning(
                "message %s of %s was still being handled when the worker ended", message.seq, self._queue.consumer
            )

    async def _work(self, job: list[AsyncMessage], slots: Slots) -> None:
        """Handle the messages of one key, in order.

        In fifo, the later messages are given back after one that is not finished.
        """
        queue = self._queue
        try:
            for number, message in enumerate(job):
                if queue.stopped or self._ending:
                    return await queue._give_back(job[number:])
                if await queue._begin(message):
                    await self._handle(message)
                    if not await queue._let_next(message):
                        return None
                elif queue.mode == "fifo":
                    return await queue._give_back(job[number + 1 :])
        except CdcbridgeError as error:
            log.warning("%s. The messages being handled will be delivered again", error)
        finally:
            self._fetched.difference_update(job)
            slots.give(1)

    async def _handle(self, message: AsyncMessage) -> None:
        """Call the handler, then ack the message, or nack it if the handler raised."""
        queue = self._queue
        try:
            refuse_unrun(self._handler, await self._handler(message))
        except BaseException as error:
            await self._failed(message, error)
            if isinstance(error, Cancelled) and being_cancelled():
                raise
        else:
            if message.settled is None and not await message.ack():
                log.warning("message %s of %s was handled, but its delivery had expired", message.seq, queue.consumer)
        finally:
            queue._done(message)

    async def _failed(self, message: AsyncMessage, error: BaseException) -> None:
        """Give back the message of a handler that raised. SystemExit and KeyboardInterrupt stop the worker, too."""
        fate = await self._queue._give_up(message, error)
        what = f"message {message.seq} of {self._queue.consumer} failed"
        log.error("%s", f"{what}: {fate}" if fate else what, exc_info=error)
        if isinstance(error, SystemExit | KeyboardInterrupt):
            self._exit = self._exit or error
            self._ending = True
            self._queue.stop()
