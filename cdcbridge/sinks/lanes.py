"""Share the lanes of a stream consumer among processes: hold leases, and deliver the lanes that this process holds.

A process renews its leases several times within their time, and gives up a lane when another process should have it.
Never delivers a lane without a lease.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

from cdcbridge.errors import StoreUnavailable
from cdcbridge.sinks.lane import LaneDelivery
from cdcbridge.sinks.parts import Parts
from cdcbridge.sinks.store import Held, SinkStore
from cdcbridge.sinks.target import Lane

# Seconds. A process that was killed is noticed within a lease and a tick, which together are less than 5 s.
LEASE: Final = 2.5
TICK: Final = 0.5
_LEAVING: Final = 5.0  # seconds to wait for the batches in progress at the end


class Lanes:
    """The lanes of one sink that this process delivers.

    Args:
        parts: The parts of the sink.
        ticks: A session for leases and counters, which no long read delays.
        store: A name of the store that no other store has.
        partitions: The number of the log's partitions.
    """

    def __init__(self, parts: Parts, ticks: SinkStore, store: str, partitions: int) -> None:
        self._parts = parts
        self._ticks = ticks
        self._store = store
        self._count = parts.target_class.lanes(parts.sink, partitions)
        self._running: dict[int, tuple[LaneDelivery, asyncio.Task[None]]] = {}
        self._valid_until = 0.0

    async def tick(self) -> None:
        """Renew the leases, begin the lanes that this process has got, and end those that it has lost.

        Raises:
            StoreUnavailable: The leases have ended, or soon will, because the store did not renew them.
        """
        asked = monotonic()
        try:
            async with asyncio.timeout(LEASE / 2):
                held = await self._ticks.lease(self._parts.consumer_id, self._count, LEASE)
        except (StoreUnavailable, TimeoutError) as error:
            if asked >= self._valid_until - TICK:
                raise StoreUnavailable("store: the leases of the lanes cannot be renewed") from error
            return
        self._valid_until = asked + LEASE
        self._parts.rate.share(len(held) / self._count)
        for one in held:
            self._hold(one)
        for number in self._running.keys() - {one.lane for one in held}:
            self._running[number][1].cancel()
        await self._collect()

    async def close(self) -> None:
        """End all lanes. At the end of the process the batches in progress are finished first."""
        tasks = [task for _, task in self._running.values()]
        if tasks and self._parts.stopping.is_set():
            await asyncio.wait(tasks, timeout=max(0.0, min(_LEAVING, self._valid_until - monotonic())))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running.clear()

    def _hold(self, held: Held) -> None:
        """Deliver a lane that this process holds, or leave it after the batch in progress."""
        if held.lane in self._running:
            delivery, task = self._running[held.lane]
            delivery.valid_until = self._valid_until
            delivery.leaving = held.surplus
            if held.surplus and not delivery.busy:
                task.cancel()  # it waits for messages
        elif not held.surplus:
            lane = Lane(self._parts.name, self._store, held.lane, self._count)
            delivery = LaneDelivery(self._parts, lane, held, self._valid_until)
            self._running[held.lane] = (delivery, asyncio.create_task(delivery.run()))

    async def _collect(self) -> None:
        """Forget lanes that have ended, and give them to other processes. Raise the error that ended one."""
        for number, (_, task) in list(self._running.items()):
            if task.done():
                del self._running[number]
                await self._ticks.leave(self._parts.consumer_id, number)
                if not task.cancelled():
                    task.result()
