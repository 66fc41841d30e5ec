"""Deliver the messages of a queue or fifo consumer: claim, deliver, ack.

Several claims are delivered side by side. A message that the target refuses is given back with the consumer's
retry_delay, and becomes a dead letter as `on_failure` says. While the target is away, the claim is kept and delivered
again. Never acks a message that the target has not acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any, Final, NamedTuple

import structlog

from cdcbridge.changes.keys import partition_of
from cdcbridge.errors import CdcbridgeError, StoreUnavailable
from cdcbridge.instants import reach
from cdcbridge.sinks.message import SinkMessage, in_one_line, op_of
from cdcbridge.sinks.pace import Backoff
from cdcbridge.sinks.parts import Parts, wait_for
from cdcbridge.sinks.reading import LOOK_EVERY
from cdcbridge.sinks.shaper import SINK, Unshaped
from cdcbridge.sinks.target import Failure, Outgoing, Target, TargetGone

SIDE_BY_SIDE: Final = 4  # claims that one process delivers at the same time
_RECEIVE: Final = """
    select receipt, seq, topic, key, data::text, deliver_count, commit_lsn::text, ordinal,
           coalesce(to_json(commit_time)::text, 'null'), to_json(inserted_at)::text
    from receive(%s, %s)"""
log = structlog.get_logger()


class Claimed(NamedTuple):
    """A claimed message in the form in which it is delivered, with its receipt."""

    receipt: str
    outgoing: Outgoing


class SharedTarget:
    """One open target for all tasks of a sink, which is opened again after an error.

    Args:
        parts: The parts of the sink.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._target: Target[Any] | None = None
        self._opening = asyncio.Lock()

    async def get(self) -> Target[Any]:
        """Return the target, and open it if necessary."""
        async with self._opening:
            if self._target is None:
                target = self._parts.target_class(self._parts.sink, None)
                try:
                    async with asyncio.timeout(self._parts.sink.timeout):
                        await target.open()
                except BaseException:
                    await target.close()
                    raise
                self._target = target
                reach("target opened")
            return self._target

    async def broken(self, target: Target[Any]) -> None:
        """Close a target that failed, unless another task has done so."""
        async with self._opening:
            if self._target is target:
                self._target = None
                await target.close()

    async def close(self) -> None:
        if self._target is not None:
            await self._target.close()


class ClaimDelivery:
    """One of the tasks that claim and deliver.

    Args:
        parts: The parts of the sink.
        shared: The target, which all tasks of the sink share.
        partitions: The number of the log's partitions.
        attempts: How often each message that is put off has failed in this process, by its seq.
    """

    def __init__(self, parts: Parts, shared: SharedTarget, partitions: int, attempts: dict[int, int]) -> None:
        self._parts = parts
        self._shared = shared
        self._partitions = partitions
        self._attempts = attempts
        self._backoff = Backoff()
        self._wakeup = asyncio.Event()
        self._valid_until = 0.0  # time.monotonic() after which another process may have the claim

    async def run(self) -> None:
        """Claim and deliver until the process is to end.

        Raises:
            StoreUnavailable: The store cannot be reached.
        """
        self._parts.wakeups.add(self._wakeup)
        try:
            while not self._parts.stopping.is_set():
                self._wakeup.clear()
                if claim := await self._claim():
                    await self._deliver(claim)
                    continue
                due = await self._parts.store.value("select next_visible(%s)", (self._parts.name,))
                await wait_for(self._wakeup, LOOK_EVERY if due is None else min(LOOK_EVERY, max(0.001, due)))
        finally:
            self._parts.wakeups.discard(self._wakeup)

    # claiming

    async def _claim(self) -> list[Claimed]:
        """Claim messages. Messages that cannot be shaped become dead letters at once."""
        parts, limits = self._parts, self._parts.sink.batching
        most = min(limits.max_messages, parts.rate.most or limits.max_messages)
        self._valid_until = monotonic() + parts.consumer.visibility_timeout
        rows = await parts.store.rows(_RECEIVE, (parts.name, most))
        if rows and len(rows) < most and limits.linger:
            await parts.sleep(limits.linger)
            rows += await parts.store.rows(_RECEIVE, (parts.name, most - len(rows)))
        claim: list[Claimed] = []
        origin = await parts.store.origin() if rows else None
        for row in rows:
            message = self._message(row, origin)
            shaped = parts.shaper.shape(message)
            if isinstance(shaped, Unshaped):
                await self._bury(row[0], message.seq, shaped.reason)
            else:
                claim += [Claimed(row[0], one) for one in shaped]
        if claim:
            reach("claimed")
        return claim

    def _message(self, row: Sequence[Any], origin: Any) -> SinkMessage:
        _, seq, topic, key, text, deliver_count, commit_lsn, ordinal, commit_time, inserted_at = row
        data = in_one_line(text)
        op = op_of(data)
        return SinkMessage(
            seq,
            origin.identity(seq, op, commit_lsn, ordinal),
            topic,
            key,
            partition_of(None if key is None else key.encode(), self._partitions),
            op,
            data,
            commit_lsn,
            ordinal,
            None,
            commit_time,
            inserted_at,
            deliver_count,
        )

    # delivering

    async def _deliver(self, claim: list[Claimed]) -> None:
        """Deliver a claim. While the target is away, keep the claim and try again."""
        parts = self._parts
        receipts = list(dict.fromkeys(one.receipt for one in claim))  # a delete and its tombstone have the same one
        keeper = asyncio.create_task(self._keep(receipts))
        try:
            if wait := parts.rate.wait(len(claim), monotonic()):
                await parts.sleep(wait)
            while not parts.stopping.is_set() and self._is_valid():
                failures = await self._attempt([one.outgoing for one in claim])
                if failures is not None:
                    await self._settle(claim, failures)
                    reach("settled")
                    return
        except TargetGone:
            pass  # the consumer is paused: the claim is given back, and does not count
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError, CdcbridgeError):
                await keeper
        with suppress(CdcbridgeError):
            await self._call("give_back", receipts)

    async def _attempt(self, batch: list[Outgoing]) -> dict[int, Failure] | None:
        """Deliver once. Return the failures, or None if the target is away or the claim is no longer valid."""
        parts = self._parts
        target: Target[Any] | None = None
        began = monotonic()
        try:
            target = await self._shared.get()
            if not self._is_valid():
                return None
            reach("delivering")
            async with asyncio.timeout(parts.sink.timeout):
                failures = dict(await target.deliver(batch))
        except Exception as error:
            reason = str(error) or f"no answer within {parts.sink.timeout:g} s"
            if not isinstance(error, CdcbridgeError | TimeoutError):  # a mistake in an adapter
                log.exception("sink.crashed", consumer=parts.name)
                reason = f"{type(error).__name__}: {error}"
            parts.stats.fails(reason, hint=getattr(error, "hint", None))
            if target is not None:
                await self._shared.broken(target)
            if isinstance(error, TargetGone):
                log.warning("sink.paused", consumer=parts.name, reason=reason)
                await parts.store.pause(parts.consumer_id)
                raise
            await parts.sleep(self._backoff.next(getattr(error, "retry_after", None)))
            return None
        reach("delivered")
        self._backoff.reset()
        parts.stats.delivers(len(batch) - len(failures), monotonic() - began)
        return failures

    async def _settle(self, claim: list[Claimed], failures: dict[int, Failure]) -> None:
        """Ack the delivered messages. Put off the others, or make dead letters of them."""
        parts = self._parts
        done = [one for index, one in enumerate(claim) if index not in failures]
        if done:
            await self._call("ack", [one.receipt for one in done])
            for one in done if self._attempts else ():
                self._attempts.pop(one.outgoing.seq, None)
                parts.stats.passes(one.outgoing.seq)
        put_off: set[str] = set()
        after_dead: set[str] = set()
        for index in sorted(failures):
            one, failure, key = claim[index], failures[index], claim[index].outgoing.key
            if parts.consumer.mode == "fifo" and key is not None and key in put_off:
                continue  # it was put off with the first message of its key
            if parts.consumer.mode == "fifo" and key is not None and key in after_dead:
                await self._call("give_back", [one.receipt])
                put_off.add(key)
                continue
            dead = await self._fail(one, failure)
            if key is not None:
                (after_dead if dead else put_off).add(key)

    async def _fail(self, one: Claimed, failure: Failure) -> bool:
        """Settle a message that was not delivered. Return whether it is a dead letter now."""
        parts, message = self._parts, one.outgoing
        delay = None if failure.retry_after is None else timedelta(seconds=failure.retry_after)
        if parts.sink.on_failure == "dead_letter" and failure.for_good:
            await self._bury(one.receipt, message.seq, SINK + failure.reason)
            return True
        parts.stats.retries(failure.reason, 1)
        if parts.sink.on_failure == "dead_letter":
            await self._call("nack", [one.receipt], delay, SINK + failure.reason)
            return False
        if failure.for_good:
            parts.stats.blocks(message, failure.reason)
        attempts = self._attempts[message.seq] = self._attempts.get(message.seq, 0) + 1
        retry = parts.consumer.retry_delay
        wait = min(retry.max, retry.initial * retry.factor ** min(attempts - 1, 100))
        await self._call("put_off", [one.receipt], timedelta(seconds=wait) if delay is None else delay)
        return False

    async def _bury(self, receipt: str, seq: int, reason: str) -> None:
        await self._call("bury_claimed", [receipt], reason)
        self._parts.stats.buries(seq, reason)

    async def _call(self, function: str, receipts: list[str], *further: Any) -> list[Any]:
        """Call a function of the store for deliveries, and return its rows."""
        places = ", ".join(["%s"] * (2 + len(further)))
        return await self._parts.store.rows(f"select {function}({places})", (self._parts.name, receipts, *further))

    def _is_valid(self) -> bool:
        return monotonic() < self._valid_until

    async def _keep(self, receipts: list[str]) -> None:
        """Extend the visibility timeout of the claim for as long as it is being delivered.

        The claim is no longer valid if a receipt is stale, or if the store could not be reached in time.
        """
        seconds = self._parts.consumer.visibility_timeout
        while True:
            await asyncio.sleep(seconds / 3)
            began = monotonic()
            with suppress(StoreUnavailable):
                ((extended,),) = await self._call("extend", receipts, timedelta(seconds=seconds))
                self._valid_until = began + seconds if extended == len(receipts) else 0.0
