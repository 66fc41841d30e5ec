"""Deliver one lane of a stream consumer: its messages in order, batch by batch, each once where the target allows it.

The lane asks the target for its last message, and delivers the messages that follow it in the log. After every error it
begins again from there. Never moves the offset before the target has acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from time import monotonic
from typing import Any, Final

import structlog

from cdcbridge.errors import CdcbridgeError
from cdcbridge.instants import reach
from cdcbridge.sinks.pace import Backoff
from cdcbridge.sinks.parts import Parts
from cdcbridge.sinks.reading import LaneBatch, LaneReader
from cdcbridge.sinks.shaper import SINK
from cdcbridge.sinks.store import Held
from cdcbridge.sinks.target import Displaced, Failure, Lane, Outgoing, Target, TargetGone, Unusable

_MOVE_EVERY: Final = 1.0  # seconds between two moves of the offset, if the target remembers its place
_AHEAD: Final = 1  # batches that are read and shaped while another one is delivered
log = structlog.get_logger()


class _Ends(Exception):
    """The lane is to end before the batch in progress is finished."""


class LaneDelivery:
    """The delivery of one lane, which runs until it is cancelled, displaced or the process is to end.

    Args:
        parts: The parts of the sink.
        lane: The lane.
        held: What the store knows about the lane.

    Attributes:
        valid_until: The end of the lease, on the clock of time.monotonic(). The runner moves it.
        leaving: True if the lane is to end after the batch in progress, because another process should have it.
        busy: True while a batch is in progress.
    """

    def __init__(self, parts: Parts, lane: Lane, held: Held, valid_until: float) -> None:
        self._parts = parts
        self._lane = lane
        self._seq = held.seq
        self._first_seq = held.first_seq
        self._moved_at = 0.0
        self._backoff = Backoff()
        self.valid_until = valid_until
        self.leaving = False
        self.busy = False

    async def run(self) -> None:
        """Deliver the lane."""
        while not self._ends():
            target = self._parts.target_class(self._parts.sink, self._lane)
            wait: float | None = None
            try:
                await self._deliver_from(target)
            except TargetGone as error:
                await self._pause(error)
                return
            except Displaced as error:
                log.info("sink.displaced", consumer=self._parts.name, lane=self._lane.number, reason=str(error))
                return
            except _Ends:
                return
            except CdcbridgeError as error:
                self._fails(str(error), hint=error.hint)
                wait = self._backoff.next(getattr(error, "retry_after", None))
            except TimeoutError:
                self._fails(f"no answer within {self._parts.sink.timeout:g} s")
                wait = self._backoff.next()
            except Exception as error:  # a mistake in an adapter must not end the other sinks
                log.exception("sink.crashed", consumer=self._parts.name, lane=self._lane.number)
                self._fails(f"{type(error).__name__}: {error}")
                wait = self._backoff.next()
            finally:
                self.busy = False
                await target.close()
            if wait is not None:
                await self._parts.sleep(wait)

    async def _deliver_from(self, target: Target[Any]) -> None:
        """Open the target, and deliver the messages after its last one until the lane ends."""
        async with asyncio.timeout(self._parts.sink.timeout):
            await target.open()
            after = await self._place(target)
        reach("target opened")
        reader = LaneReader(self._parts, self._lane.number, self._lane.of, after)
        async with aclosing(_ahead(reader.batches())) as batches:
            async for batch in batches:
                if self._ends():
                    break
                self.busy = True
                await self._finish(target, batch)
                await self._move(batch.upto, now=not target.remembers or not batch.messages)
                self.busy = False
                reach("settled")
        await self._move(self._seq, now=True)

    async def _place(self, target: Target[Any]) -> int:
        """Return the seq after which to begin: the target's last message, or else the offset."""
        last = await target.position() if target.remembers else None
        if last is None:
            return self._seq
        if last == 0:
            if self._seq > self._first_seq:
                log.warning(
                    "sink.empty", consumer=self._parts.name, lane=self._lane.number, from_seq=self._first_seq + 1
                )
            return self._first_seq
        end = await self._parts.store.log_end()
        if last > end:
            raise Unusable(
                f"the target has messages up to seq {last} of {self._lane.name}, but the log ends at seq {end}: another"
                " store wrote them, or this one was restored from a backup",
                hint="Deliver to another destination, or remove the messages and the progress there.",
            )
        return last

    async def _finish(self, target: Target[Any], batch: LaneBatch) -> None:
        """Deliver a batch, and try again until each message is delivered or a dead letter."""
        await self._bury([(one.message.seq, one.message.key, one.reason) for one in batch.refused])
        pending = batch.messages
        if pending and (wait := self._parts.rate.wait(len(pending), monotonic())):
            await self._parts.sleep(wait)
        while pending and not self._ends():
            began = monotonic()
            reach("delivering")
            failures = await self._attempt(target, pending)
            reach("delivered")
            self._parts.stats.delivers(len(pending) - len(failures), monotonic() - began, self._lane.number)
            left = await self._settle(pending, failures)
            if len(left) == len(pending) or any(not failure.for_good for failure in failures.values()):
                await self._wait(failures)
            elif not left:
                self._backoff.reset()
            pending = left
        if pending:
            raise _Ends

    async def _attempt(self, target: Target[Any], pending: list[Outgoing]) -> dict[int, Failure]:
        """Deliver once, within the time limit and while the lease is valid."""
        async with asyncio.timeout(self._parts.sink.timeout):
            if monotonic() >= self.valid_until:
                raise Displaced("the lease of the lane has ended")
            return dict(await target.deliver(pending))

    async def _settle(self, pending: list[Outgoing], failures: dict[int, Failure]) -> list[Outgoing]:
        """Make dead letters of refused messages if the sink says so, and return the messages to try again."""
        left: list[Outgoing] = []
        refused: list[tuple[int, str | None, str]] = []
        for index in sorted(failures):
            message, failure = pending[index], failures[index]
            if not failure.for_good:
                left.append(message)
            elif self._parts.sink.on_failure == "dead_letter":
                refused.append((message.seq, message.key, SINK + failure.reason))
            else:
                left.append(message)
                self._parts.stats.blocks(message, failure.reason)
        if left:
            reason = next(failures[index].reason for index in sorted(failures) if pending[index] in left)
            self._parts.stats.retries(reason, len(left))
            self._fails(reason)
        if self._parts.stats.blocked is not None:
            for index, message in enumerate(pending):
                if index not in failures:
                    self._parts.stats.passes(message.seq)
        await self._bury(refused)
        return left

    async def _wait(self, failures: dict[int, Failure]) -> None:
        named = [failure.retry_after for failure in failures.values() if failure.retry_after is not None]
        await self._parts.sleep(self._backoff.next(max(named, default=None)))

    async def _bury(self, refused: list[tuple[int, str | None, str]]) -> None:
        if refused:
            await self._parts.store.bury(self._parts.consumer_id, refused)
            for seq, _, reason in refused:
                self._parts.stats.buries(seq, reason)

    async def _move(self, seq: int, *, now: bool) -> None:
        """Move the offset. If the target remembers its place, that is only a note for people, and made rarely."""
        self._seq = max(self._seq, seq)
        if now or monotonic() >= self._moved_at + _MOVE_EVERY:
            self._moved_at = monotonic()
            if not await self._parts.store.move(self._parts.consumer_id, self._lane.number, self._lane.of, self._seq):
                raise Displaced("the lease of the lane has ended")

    async def _pause(self, error: TargetGone) -> None:
        self._fails(str(error), hint=error.hint)
        log.warning("sink.paused", consumer=self._parts.name, reason=str(error))
        with suppress(CdcbridgeError):
            await self._parts.store.pause(self._parts.consumer_id)

    def _fails(self, reason: str, *, hint: str | None = None) -> None:
        self._parts.stats.fails(reason, hint=hint, lane=self._lane.number)

    def _ends(self) -> bool:
        return self.leaving or self._parts.stopping.is_set()


async def _ahead(batches: AsyncGenerator[LaneBatch, None]) -> AsyncGenerator[LaneBatch, None]:
    """Yield the same batches, and make the next ones while the caller handles one."""
    queue: asyncio.Queue[LaneBatch | BaseException | None] = asyncio.Queue(_AHEAD)

    async def fill() -> None:
        try:
            async with aclosing(batches):
                async for batch in batches:
                    await queue.put(batch)
        except Exception as error:  # noqa: BLE001 - it is raised again in the caller's task
            await queue.put(error)
        else:
            await queue.put(None)

    task = asyncio.create_task(fill())
    try:
        while (found := await queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
