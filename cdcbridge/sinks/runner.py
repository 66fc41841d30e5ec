"""Run one sink in this process: its lanes for a stream consumer, or its claims for queue and fifo.

A runner lives as long as the sink's settings. Its counters reach the store about once a second. Never ends because the
store or the target is away.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from cdcbridge.config import Config, Consumer
from cdcbridge.errors import CdcbridgeError, StoreUnavailable, UsageError
from cdcbridge.routing.subscription import Subscription
from cdcbridge.sinks.claims import SIDE_BY_SIDE, ClaimDelivery, SharedTarget
from cdcbridge.sinks.lanes import LEASE, TICK, Lanes
from cdcbridge.sinks.log_session import LogSession
from cdcbridge.sinks.pace import Backoff, Rate
from cdcbridge.sinks.parts import Parts, wait_for
from cdcbridge.sinks.shaper import Names, Shaper
from cdcbridge.sinks.stats import Stats
from cdcbridge.sinks.store import SinkStore
from cdcbridge.sinks.targets import target_class
from cdcbridge.store.consumers import stored_config

log = structlog.get_logger()


class Runner:
    """The tasks of one sink in this process.

    Args:
        config: The configuration.
        consumer: The consumer, which has a sink.
        member: The name of this process among those that share the lanes.

    Attributes:
        consumer: The consumer.
        consumer_id: The consumer's id in the store, or 0 before it is known.
    """

    def __init__(self, config: Config, consumer: Consumer, member: str) -> None:
        self._config = config
        self._member = member
        self._stopping = asyncio.Event()
        self._stats = Stats(consumer.name)
        self._parts: Parts | None = None
        self.consumer = consumer
        self.consumer_id = 0

    def wake(self) -> None:
        """Look for messages now."""
        if self._parts is not None:
            self._parts.wake()

    def stop(self) -> None:
        """End after the batches in progress."""
        self._stopping.set()
        self.wake()

    async def run(self) -> None:
        """Deliver until stop(). After an error of the store, begin anew."""
        backoff = Backoff()
        while not self._stopping.is_set():
            store, ticks = self._session(), self._session()
            reading = LogSession(self._config.store_dsn, self._config.store.schema_)
            wait = 0.0
            try:
                if await self._deliver(store, ticks, reading):
                    backoff.reset()
                wait = TICK
            except StoreUnavailable as error:
                log.warning("sink.store_away", consumer=self.consumer.name, error=str(error))
                wait = backoff.next()
            except CdcbridgeError as error:
                log.warning("sink.stopped", consumer=self.consumer.name, error=str(error), hint=error.hint)
                self._stats.fails(str(error), hint=error.hint)
                wait = backoff.next()
            finally:
                await self._leave(ticks)
                await reading.close()
                await store.close()
                await ticks.close()
            await wait_for(self._stopping, wait)

    def _session(self) -> SinkStore:
        return SinkStore(self._config.store_dsn, self._config.store.schema_, self._member)

    async def _deliver(self, store: SinkStore, ticks: SinkStore, reading: LogSession) -> bool:
        """Deliver until the consumer is paused or removed, or the process is to end.

        Return False if the store does not know the consumer yet, or if it is paused.
        """
        found = await store.consumer(self.consumer.name)
        if found is None or found[1]:
            return False
        self.consumer_id = found[0]
        origin = await store.origin()
        parts = self._parts = self._put_together(
            store, reading, Names(self._config.source.name or origin.database, origin.database)
        )
        partitions = await store.partitions()
        if self.consumer.mode == "stream":
            lanes = Lanes(parts, ticks, origin.store, partitions)
            try:
                await self._tick(ticks, lanes, parts.rate)
            finally:
                await lanes.close()
        else:
            await self._claim(parts, ticks, partitions)
        return True

    def _put_together(self, store: SinkStore, reading: LogSession, names: Names) -> Parts:
        consumer, sink = self.consumer, self.consumer.needed_sink
        adapter = target_class(sink)
        if sink.content_mode == "binary" and adapter.attribute_prefix is None:
            raise UsageError(
                f"consumer {consumer.name!r}: a sink of type {sink.type} has no headers for content_mode: binary",
                hint="Write content_mode: structured.",
            )
        stored = stored_config(consumer)
        return Parts(
            consumer,
            self.consumer_id,
            sink,
            Subscription.from_config(self.consumer_id, consumer.name, consumer.mode, stored),
            adapter,
            Shaper(consumer, names, adapter.attribute_prefix),
            store,
            reading,
            self._stats,
            Rate(sink.rate),
            self._stopping,
        )

    async def _tick(self, ticks: SinkStore, lanes: Lanes | None, rate: Rate) -> None:
        """Renew leases and store the counters, until the consumer is paused or removed, or the process is to end."""
        while not self._stopping.is_set():
            if lanes is not None:
                await lanes.tick()
            else:
                await ticks.lease(self.consumer_id, 0, LEASE)  # no lanes, but the presence of this process
                if rate.most is not None:
                    rate.share(1 / await ticks.members(self.consumer_id, LEASE))
            found = await ticks.consumer(self.consumer.name)
            if found is None or found[1] or found[0] != self.consumer_id:
                return
            await self._note(ticks)
            await wait_for(self._stopping, TICK)

    async def _claim(self, parts: Parts, ticks: SinkStore, partitions: int) -> None:
        """Deliver claims side by side, until one task ends or raises an error."""
        shared = SharedTarget(parts)
        attempts: dict[int, int] = {}
        deliveries = [ClaimDelivery(parts, shared, partitions, attempts) for _ in range(SIDE_BY_SIDE)]
        tasks = [asyncio.create_task(one.run()) for one in deliveries]
        tasks.append(asyncio.create_task(self._tick(ticks, None, parts.rate)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                parts.wake()
                await asyncio.wait(tasks, timeout=parts.sink.timeout)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await shared.close()

    async def _note(self, ticks: SinkStore) -> None:
        if (taken := self._stats.take()) is not None:
            await ticks.note(self.consumer_id, *taken)

    async def _leave(self, ticks: SinkStore) -> None:
        """Store the last counters, and give the lanes to other processes."""
        if self.consumer_id:
            with suppress(CdcbridgeError):
                await self._note(ticks)
                await ticks.leave(self.consumer_id, None)
