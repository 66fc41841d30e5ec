"""Wake long polls when messages arrive.

One session of the process listens for the notifications of the store. A poll that found nothing waits in the room of
its consumer. A notification wakes one poll of the room, and a poll that found messages wakes the next one. A thousand
polls of one consumer therefore cause one claim for a message, and not a thousand.

A reader that follows a stream needs each message, so a notification wakes all of them. They have a room of their own.

Timeouts and delays end without a notification. next_visible() says when, and the room wakes a poll then. While the
session is away, it wakes one each second. Never claims a message itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

import psycopg
import structlog
from psycopg import sql

from cdcbridge.database import store_errors
from cdcbridge.errors import CdcbridgeError

T = TypeVar("T")
_LONGEST: Final = 10.0  # seconds between two looks, in case a notification is lost
_DEAF: Final = 1.0  # the same while the session that listens is away
_SHORTEST: Final = 0.02  # seconds until a message is visible at least
_HELD: Final = 0.1  # seconds between two looks while messages are visible that cannot be claimed
_PAUSES: Final = (0.1, 0.5, 2.0)  # seconds between attempts to listen again
log = structlog.get_logger()


class WaitingRoom:
    """The polls that wait for messages of one consumer.

    Attributes:
        id: The id of the consumer in the store, which notifications contain.
        together: Whether a notification wakes all polls.
        version: Increases with each notification.
    """

    def __init__(self, consumer_id: int, *, together: bool = False) -> None:
        self.id = consumer_id
        self.together = together
        self.version = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def tell(self) -> None:
        """Note that messages may be there, and wake one poll, or all of them."""
        self.version += 1
        self.wake()

    def wake(self) -> None:
        """Wake the poll that has waited longest, or all of them if they are woken together."""
        while self._waiting:
            poll = self._waiting.popleft()
            if not poll.done():
                poll.set_result(None)
                if not self.together:
                    return

    def wake_all(self) -> None:
        """Wake all polls, and let those that are about to wait look again."""
        self.version += 1
        for _ in range(len(self._waiting)):
            self.wake()

    def leave(self) -> None:
        """Wake the next poll, because one that has left may have been meant by the same notification."""
        if not self.together:
            self.wake()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def wait(self, seen: int, due: float, left: float) -> None:
        """Wait until the next look.

        Args:
            seen: The version before the last look. If it has changed since, the call returns at once.
            due: Seconds until a message becomes visible without a notification.
            left: Seconds that the poll still waits.
        """
        if seen != self.version:
            return
        loop = asyncio.get_running_loop()
        self._wake_at(loop, loop.time() + (due if due > _SHORTEST else _HELD))
        poll = loop.create_future()
        self._waiting.append(poll)
        try:
            async with asyncio.timeout(left):
                await poll
        except TimeoutError:
            pass
        finally:
            with suppress(ValueError):
                self._waiting.remove(poll)

    def _wake_at(self, loop: asyncio.AbstractEventLoop, time: float) -> None:
        if self._timer is not None and not self._timer.cancelled():
            if loop.time() < self._timer.when() <= time:
                return
            self._timer.cancel()
        self._timer = loop.call_at(time, self.wake)


class Arrivals:
    """The rooms of all consumers, and the session that listens.

    Args:
        connect: Opens a session on the store.
        schema: The schema of the store, which is the channel of its notifications.
    """

    def __init__(self, connect: Callable[[], Awaitable[psycopg.AsyncConnection]], schema: str) -> None:
        self._connect = connect
        self._schema = schema
        self._rooms: dict[tuple[str, bool], WaitingRoom] = {}
        self._longest = _DEAF
        self.stopped = asyncio.Event()

    @property
    def stopping(self) -> bool:
        return self.stopped.is_set()

    @property
    def waiting(self) -> int:
        """The number of polls that wait."""
        return sum(room.waiting for room in self._rooms.values())

    def stop(self) -> None:
        """Let all polls answer now, and all later ones at once."""
        self.stopped.set()
        for room in self._rooms.values():
            room.wake_all()

    async def listen(self) -> None:
        """Listen until the task is cancelled. A session that is lost is opened again."""
        failures = 0
        while True:
            try:
                with store_errors():
                    async with await self._connect() as session:
                        await session.execute(sql.SQL("listen {}").format(sql.Identifier(self._schema)))
                        self._longest, failures = _LONGEST, 0
                        self._tell()  # what arrived before is found now
                        async for one in session.notifies():
                            self._tell(one.payload)
            except (CdcbridgeError, OSError) as error:
                if not failures:
                    log.warning("api.deaf", error=str(error))
            self._longest = _DEAF
            self._tell()
            await asyncio.sleep(_PAUSES[min(failures, len(_PAUSES) - 1)])
            failures += 1

    def tell(self, consumer: str) -> None:
        """Wake a poll of a consumer whose messages may be visible now, without a notification of the store."""
        if (room := self._rooms.get((consumer, False))) is not None:
            room.tell()

    def _tell(self, payload: str = "") -> None:
        """Wake the rooms that a payload names, for example "3,17". An empty one names all."""
        named = payload.split(",") if payload else None
        for room in self._rooms.values():
            if named is None or str(room.id) in named:
                room.tell()

    async def poll(
        self,
        consumer: str,
        wait: float,
        look: Callable[[], Awaitable[list[T]]],
        due: Callable[[], Awaitable[tuple[int, float | None]]],
        gone: Callable[[], Awaitable[bool]],
        *,
        together: bool = False,
    ) -> list[T]:
        """Return the messages that `look` finds, or [] if it finds none within `wait` seconds.

        However a poll ends, it wakes the next one of its room, which may have been meant by the same notification.

        Args:
            consumer: The name of the consumer.
            wait: Seconds to wait for the first message.
            look: Claims messages.
            due: Returns the consumer's id, and the seconds until the next look, or None.
            gone: Returns whether the caller has disconnected. Such a poll claims nothing any more.
            together: Whether a message is for all polls of the consumer that are called with it.
        """
        loop = asyncio.get_running_loop()
        key = (consumer, together)
        deadline = loop.time() + wait
        try:
            while True:
                room = self._rooms.get(key)
                seen = -1 if room is None else room.version
                found = await look()
                if found or loop.time() >= deadline or self.stopping:
                    return found
                number, seconds = await due()
                room = self._room(key, number)
                if self.stopping:
                    return []
                if seen >= 0:  # otherwise a notification before the room was made may have been missed
                    least = self._longest if seconds is None else min(self._longest, seconds)
                    await room.wait(seen, least, deadline - loop.time())
                    if await gone():
                        return []
        finally:
            if (last := self._rooms.get(key)) is not None:
                last.leave()

    def _room(self, key: tuple[str, bool], number: int) -> WaitingRoom:
        """Return the room of a consumer. One that was removed and added again has another id, and gets a new room."""
        room = self._rooms.get(key)
        if room is None or room.id != number:
            if room is not None:
                room.wake_all()
            room = self._rooms[key] = WaitingRoom(number, together=key[1])
        return room
