"""A worker: takes messages, hands them to a handler, and settles them by how that ends.

`_worker.py` is made from this file by `make client`: change this one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from cdcbridge.client._common import by_key
from cdcbridge.client._tasks import Group, Handler, Slots, on_signals, sleep
from cdcbridge.errors import StoreUnavailable

if TYPE_CHECKING:
    from cdcbridge.client._async import AsyncMessage, AsyncQueue

_TICK: Final = 0.25  # seconds between looks at what has to be extended
log: Final = logging.getLogger("cdcbridge.client")


class AsyncWorker:
    """What worker() makes of a handler. Calling it calls the handler; run() works until it is stopped."""

    def __init__(
        self, queue: AsyncQueue, handler: Handler[AsyncMessage], concurrency: int, wait: float, grace: float
    ) -> None:
        self._queue = queue
        self._handler = handler
        self._concurrency = concurrency
        self._wait = wait
        self._grace = grace
        self._held: set[AsyncMessage] = set()
        self._ending = False

    async def __call__(self, message: AsyncMessage) -> object:
        return await self._handler(message)

    async def run(self) -> None:
        """Handle messages until stop(), SIGTERM or SIGINT; then let those that are being handled end."""
        queue, slots = self._queue, Slots(self._concurrency)
        with on_signals(queue.stop):
            async with Group(_TICK * 4) as beside:
                beside.start(self._keep)
                async with Group(self._grace) as group:
                    while not queue.stopped:
                        free = await slots.take(_TICK)
                        if not free:
                            continue
                        jobs = by_key(await queue.receive_or_pause(free, self._wait))
                        slots.give(free - len(jobs))
                        for job in jobs:
                            self._held.update(job)
                            group.start(self._work, job, slots)
                self._ending = True

    async def _work(self, job: list[AsyncMessage], slots: Slots) -> None:
        """Messages of one key, in order. In fifo, one that failed took the later ones back with it."""
        try:
            for number, message in enumerate(job):
                if number and self._queue.stopped:
                    await self._queue.extend(job[number:], 0)
                    return
                if not await self._handle(message) and self._queue.mode == "fifo":
                    return
        except StoreUnavailable as error:
            log.warning("%s; what was being handled comes again", error)
        finally:
            self._held.difference_update(job)
            slots.give(1)

    async def _handle(self, message: AsyncMessage) -> bool:
        """Whether it was handled, and not given back."""
        try:
            await self._handler(message)
        except Exception as error:
            log.exception("message %s of %s failed", message.seq, self._queue.consumer)
            if message.settled is None:
                await message.nack(reason=f"{type(error).__name__}: {error}"[:500])
            return False
        if message.settled is None and not await message.ack():
            log.warning("message %s of %s was handled, but its delivery had expired", message.seq, self._queue.consumer)
        return message.settled == "acked"

    async def _keep(self) -> None:
        """Extend what is being handled, or waits for one of its key, before it expires."""
        while not self._ending:
            await sleep(_TICK)
            due = [message for message in list(self._held) if message.settled is None and message.half_over]
            if not due:
                continue
            try:
                await self._queue.extend(due, max(message.visibility for message in due))
            except StoreUnavailable as error:
                log.warning("%s; what is being handled may come again", error)
