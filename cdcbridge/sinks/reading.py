"""Read the messages of a lane, judge and shape them, and cut them into batches.

Batches are made ahead, while another one is delivered. Never moves an offset.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncGenerator, Sequence
from itertools import accumulate
from time import monotonic
from typing import Final, NamedTuple

import orjson

from cdcbridge.changes.keys import key_text
from cdcbridge.routing.dead_reasons import undecodable
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.logical_messages import members
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import Bury, Pass, verdict
from cdcbridge.sinks.log_row import LogRow, lsn_text, time_json
from cdcbridge.sinks.message import Origin, SinkMessage, in_one_line, op_of
from cdcbridge.sinks.parts import Parts, wait_for
from cdcbridge.sinks.plain_form import plain_form
from cdcbridge.sinks.shaper import Unshaped
from cdcbridge.sinks.target import Outgoing

LOOK_EVERY: Final = 2.0  # seconds between two looks, in case a notification is lost
_END_EVERY: Final = 1.0  # seconds between two looks for the end of a lane that has nothing to deliver
_FIRST_READ: Final = 100  # rows of the first read, before the size of rows is known
_ROOM: Final = 4  # a read takes about so many times the bytes of a batch


class LaneBatch(NamedTuple):
    """A batch of a lane.

    Attributes:
        messages: The messages to be delivered, in order.
        refused: The messages that become dead letters.
        upto: Everything in the lane up to this seq is in this batch, in an earlier one, or not wanted.
    """

    messages: list[Outgoing]
    refused: list[Unshaped]
    upto: int


def judge(row: LogRow, wanted: Subscription, origin: Origin, *, projected: bool) -> SinkMessage | Unshaped | None:
    """Decide on a message of the log for a stream consumer with a sink. None: its filter refuses the message.

    Args:
        row: The message.
        wanted: The consumer's filter and key.
        origin: The identity of the source.
        projected: Whether the sink gets `row.shown`, which has only some columns.
    """
    # Unpacked, because this runs for each message, and reading an attribute of a tuple takes five times as long.
    seq, topic, key, partition, text, shown, lsn, ordinal, xid, commit_time, inserted_at, old_key = row
    commit_lsn = lsn_text(lsn)
    data = in_one_line(text)
    op = op_of(data)
    reason: str | None = None
    # A character has at most four bytes.
    if not wanted.plain or (len(data) * 4 > wanted.max_bytes and len(data.encode()) > wanted.max_bytes):
        its_key = _own_key(data, wanted.key) if wanted.key is not None else None
        size = len(data.encode())
        said = verdict(wanted, Logged(data, topic, key, commit_lsn, ordinal, xid, old_key, its_key, size=size))
        if isinstance(said, Pass):
            return None
        key = said.key
        reason = said.reason if isinstance(said, Bury) else None
    if projected and op not in ("gap", "message"):
        if shown is None:
            reason = reason or undecodable("its columns cannot be separated")
        else:
            data = in_one_line(shown)
    identity = origin.identity(seq, op, commit_lsn, ordinal)
    times = time_json(commit_time), time_json(inserted_at)
    old_key = old_key if wanted.key is None else None  # of the log's key
    message = SinkMessage(seq, identity, topic, key, partition, op, data, commit_lsn, ordinal, xid, *times, 1, old_key)
    return message if reason is None else Unshaped(message, reason)


def _own_key(data: str, columns: Sequence[str]) -> str | None:
    """Return the key that the consumer's columns make, from the values as they are in the log."""
    record = dict(members(data)).get("record", "null")
    row = {name: orjson.Fragment(value) for name, value in members(record)} if record != "null" else None
    return key_text(row, columns)


class LaneReader:
    """The reader of one lane.

    Args:
        parts: The parts of the sink.
        lane: The number of the lane.
        lanes: The number of lanes.
        after: The seq after which it begins.
    """

    def __init__(self, parts: Parts, lane: int, lanes: int, after: int) -> None:
        self._parts = parts
        self._lane = lane
        self._lanes = lanes
        self._after = after
        self._end_at = 0.0
        self._ended = -1
        self._size = 0.0  # average bytes of a row; 0 before the first row
        self._wakeup = asyncio.Event()

    async def batches(self) -> AsyncGenerator[LaneBatch, None]:
        """Yield batches until the process is to end. While there are no messages, wait for a notification."""
        parts, limits = self._parts, self._parts.sink.batching
        parts.wakeups.add(self._wakeup)
        ahead: asyncio.Task[list[LogRow]] | None = None
        try:
            while not parts.stopping.is_set():
                self._wakeup.clear()
                most = self._most()
                rows = await (ahead or self._read(most))
                more = len(rows) >= most
                if rows and len(rows) < min(most, limits.max_messages) and limits.linger:
                    await parts.sleep(limits.linger)
                    rows += await self._read(limits.max_messages - len(rows))
                # The log is read while these rows are shaped and delivered.
                ahead = asyncio.create_task(self._read(self._most())) if more else None
                for batch in self._cut(rows, await parts.store.origin() if rows else None):
                    yield batch
                if not more:
                    if not rows and (rest := await self._rest()) is not None:
                        yield rest
                    await wait_for(self._wakeup, LOOK_EVERY)
        finally:
            parts.wakeups.discard(self._wakeup)
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    async def _read(self, most: int) -> list[LogRow]:
        rows = await self._parts.log.read(self._parts.consumer_id, self._lane, self._lanes, self._after, most)
        if rows:
            self._after = rows[-1].seq
            self._size = sum([len(row.data) for row in rows]) / len(rows)
        return rows

    def _most(self) -> int:
        """Return how many rows to read at once: about the bytes of some batches, however large a row is."""
        limits = self._parts.sink.batching
        if not self._size:
            return min(_FIRST_READ, limits.max_messages)
        return max(1, min(limits.max_messages * _ROOM, int(limits.max_bytes * _ROOM / self._size)))

    async def _rest(self) -> LaneBatch | None:
        """Return an empty batch at the end of the lane, so that the offset passes other consumers' messages.

        This happens at most once a second, and only if the end is another one than before.
        """
        if monotonic() < self._end_at:
            return None
        self._end_at = monotonic() + _END_EVERY
        self._after = await self._parts.store.end(self._parts.consumer_id, self._lane, self._lanes, self._after)
        if self._after == self._ended:
            return None
        self._ended = self._after
        return LaneBatch([], [], self._after)

    def _cut(self, rows: Sequence[LogRow], origin: Origin | None) -> list[LaneBatch]:
        """Judge and shape rows, and cut them into batches."""
        if origin is None:
            return []
        parts, limits = self._parts, self._parts.sink.batching
        most = min(limits.max_messages, parts.rate.most or limits.max_messages)
        if (place := parts.plain_place) is not None:
            messages = plain_form(rows, origin, place, parts.wanted.max_bytes)
            if messages is not None:
                return _whole(messages, most, limits.max_bytes)
        return self._judged(rows, origin, most)

    def _judged(self, rows: Sequence[LogRow], origin: Origin, most: int) -> list[LaneBatch]:
        parts, limits = self._parts, self._parts.sink.batching
        wanted, shape, projected = parts.wanted, parts.shaper.shape, parts.consumer.columns is not None
        found: list[LaneBatch] = []
        messages: list[Outgoing] = []
        refused: list[Unshaped] = []
        size = 0
        for row in rows:
            said = judge(row, wanted, origin, projected=projected)
            shaped = shape(said) if isinstance(said, SinkMessage) else said
            if isinstance(shaped, Unshaped):
                refused.append(shaped)
            elif shaped is not None:
                messages += shaped
                for one in shaped:
                    size += len(one.body or b"")
            if len(messages) >= most or size >= limits.max_bytes:
                found.append(LaneBatch(messages, refused, row.seq))
                messages, refused, size = [], [], 0
        if rows and (not found or found[-1].upto < rows[-1].seq):
            found.append(LaneBatch(messages, refused, rows[-1].seq))
        return found


def _whole(messages: list[Outgoing], most: int, max_bytes: int) -> list[LaneBatch]:
    """Cut messages into batches of at most so many messages, each of which ends with the message that fills it."""
    ends = [*accumulate([len(one.body or b"") for one in messages], initial=0)]
    found: list[LaneBatch] = []
    first = 0
    while first < len(messages):
        end = min(first + most, bisect_left(ends, ends[first] + max_bytes, first + 1))
        found.append(LaneBatch(messages[first:end], [], messages[min(end, len(messages)) - 1].seq))
        first = end
    return found
