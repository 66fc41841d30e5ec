"""The parts that the tasks of one sink share: its settings, its sessions, its counters and its events.

Plain data, which `runner` puts together.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from cdcbridge.config import Consumer
from cdcbridge.config.sink_base import SinkBase
from cdcbridge.routing.subscription import Subscription
from cdcbridge.sinks.log_session import LogSession
from cdcbridge.sinks.pace import Rate
from cdcbridge.sinks.plain_form import Place
from cdcbridge.sinks.shaper import Shaper
from cdcbridge.sinks.stats import Stats
from cdcbridge.sinks.store import SinkStore
from cdcbridge.sinks.target import Target


@dataclass(slots=True)
class Parts:
    """What the tasks of one sink share.

    Attributes:
        consumer: The consumer's settings from the file.
        consumer_id: The consumer's id in the store.
        sink: The settings of its sink.
        wanted: The consumer's filter and key, which a stream applies while it reads.
        target_class: The adapter.
        shaper: Makes the form in which messages are delivered.
        store: The session that claims and settles messages.
        log: The session that reads the log for lanes.
        stats: The counters.
        rate: The limit of messages in a second.
        stopping: Set when the process is to end after the batches in progress.
        wakeups: One event for each task that waits for messages.
    """

    consumer: Consumer
    consumer_id: int
    sink: SinkBase
    wanted: Subscription
    target_class: type[Target[Any]]
    shaper: Shaper
    store: SinkStore
    log: LogSession
    stats: Stats
    rate: Rate
    stopping: asyncio.Event
    wakeups: set[asyncio.Event] = field(default_factory=set)

    @property
    def plain_place(self) -> Place | None:
        """The place of messages that need no judgement and have the content of the log. None: they need more."""
        return self.shaper.plain_place if self.wanted.plain and self.consumer.columns is None else None

    @property
    def name(self) -> str:
        """The name of the consumer."""
        return self.consumer.name

    def wake(self) -> None:
        """Wake every task of the sink: there may be messages, or the process is to end."""
        for event in self.wakeups:
            event.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until the process is to end."""
        await wait_for(self.stopping, seconds)


async def wait_for(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, at most so many seconds. Return whether it is set.

    In Python 3.11, asyncio.wait_for() swallows a cancellation that arrives together with the event, and its task would
    then wait for ever.
    """
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
