"""A worker: takes messages, hands them to a handler, and settles them by how that ends.

Made from `_worker.py` by `make client`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from cdcbridge.client._common import by_key
from cdcbridge.client._threads import Group, Handler, Slots, on_signals, sleep
from cdcbridge.errors import StoreUnavailable

if TYPE_CHECKING:
    from cdcbridge.client._sync import Message, Queue

_TICK: Final = 0.25  # seconds between looks at what has to be extended
log: Final = logging.getLogger("cdcbridge.client")


class Worker:
    """What worker() makes of a handler. Calling it calls the handler; run() works until it is stopped."""

    def __init__(self, queue: Queue, handler: Handler[Message], concurrency: int, wait: float, grace: float) -> None:
        self._queue = queue
        self._handler = handler
        self._concurrency = concurrency
        self._wait = wait
        self._grace = grace
        self._held: set[Message] = set()
        self._ending = False

    def __call__(self, message: Message) -> object:
        return self._handler(message)

    def run(self) -> None:
        """Handle messages until stop(), SIGTERM or SIGINT; then let those that are being handled end."""
        queue, slots = self._queue, Slots(self._concurrency)
        with on_signals(queue.stop):
            with Group(_TICK * 4) as beside:
                beside.start(self._keep)
                with Group(self._grace) as group:
                    while not queue.stopped:
                        free = slots.take(_TICK)
                        if not free:
                            continue
                        jobs = by_key(queue.receive_or_pause(free, self._wait))
                        slots.give(free - len(jobs))
                        for job in jobs:
                            self._held.update(job)
                            group.start(self._work, job, slots)
                self._ending = True

    def _work(self, job: list[Message], slots: Slots) -> None:
        """Messages of one key, in order. In fifo, one that failed took the later ones back with it."""
        try:
            for number, message in enumerate(job):
                if number and self._queue.stopped:
                    self._queue.extend(job[number:], 0)
                    return
                if not self._handle(message) and self._queue.mode == "fifo":
                    return
        except StoreUnavailable as error:
            log.warning("%s; what was being handled comes again", error)
        finally:
            self._held.difference_update(job)
            slots.give(1)

    def _handle(self, message: Message) -> bool:
        """Whether it was handled, and not given back."""
        try:
            self._handler(message)
        except Exception as error:
            log.exception("message %s of %s failed", message.seq, self._queue.consumer)
            if message.settled is None:
                message.nack(reason=f"{type(error).__name__}: {error}"[:500])
            return False
        if message.settled is None and not message.ack():
            log.warning("message %s of %s was handled, but its delivery had expired", message.seq, self._queue.consumer)
        return message.settled == "acked"

    def _keep(self) -> None:
        """Extend what is being handled, or waits for one of its key, before it expires."""
        while not self._ending:
            sleep(_TICK)
            due = [message for message in list(self._held) if message.settled is None and message.half_over]
            if not due:
                continue
            try:
                self._queue.extend(due, max(message.visibility for message in due))
            except StoreUnavailable as error:
                log.warning("%s; what is being handled may come again", error)
