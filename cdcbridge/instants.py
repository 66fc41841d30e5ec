"""Named moments on the path of a change, at which a test kills or stops the bridge or acts together with it.

For example, a test kills the process at "rows copied": the log has the rows, but the position is not written yet.
reach() does nothing unless a test has called listen(). This module is pure. Never reads a variable, an option or a
file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, TypeAlias, TypeVar, get_args

Instant: TypeAlias = Literal[
    "received",  # a message of the plugin has arrived, and is not decoded yet
    "decoded",  # the message has become an event
    "collected",  # the event is in the batch, or was skipped
    "submitted",  # the batch was handed to the thread that appends
    "append begun",  # the append holds the fence of its epoch
    "rows copied",  # log rows, fan-out and dead letters are written
    "position written",  # the whole append is written, and nothing of it is committed yet
    "committed",  # the append is durable
    "about to confirm",  # the next status update for PostgreSQL is due, and not sent yet
    "confirmed",  # PostgreSQL may remove the WAL
    "about to note feeds",  # the leader is about to store which consumers it feeds
    "log page filled in",  # a consumer has received one page of the messages in the log
    "table described",  # a backfill knows the columns of its table, and has read no row yet
    "chunk handed over",  # rows that a backfill read wait for their watermark
]
SinkInstant: TypeAlias = Literal[
    "target opened",  # a sink's target has told which message it has last
    "claimed",  # a sink has claimed messages (queue and fifo)
    "delivering",  # a batch is about to be handed to the target
    "delivered",  # the target has acknowledged the batch
    "settled",  # the offset has moved, or the messages are acked
]
AlertInstant: TypeAlias = Literal[
    "alert queued",  # a judgement is in the store with its notifications, and nothing of it is delivered yet
    "alert accepted",  # a destination has accepted a notification, and the store does not know it yet
]
MirrorInstant: TypeAlias = Literal[
    "mirror prepared",  # the mirror knows the place from which it continues
    "mirror begun",  # a transaction in the target has its marker, and nothing else
    "mirror applied",  # the rows of a chunk are written
    "mirror about to commit",  # the whole transaction is written, without its place
    "mirror committed",  # the target has the rows and the place, and the source's store does not know it
]
INSTANTS: Final[tuple[Instant, ...]] = get_args(Instant)
SINK_INSTANTS: Final[tuple[SinkInstant, ...]] = get_args(SinkInstant)
MIRROR_INSTANTS: Final[tuple[MirrorInstant, ...]] = get_args(MirrorInstant)
ALERT_INSTANTS: Final[tuple[AlertInstant, ...]] = get_args(AlertInstant)
AnyInstant: TypeAlias = Instant | SinkInstant | AlertInstant | MirrorInstant
Listener: TypeAlias = Callable[[AnyInstant], None]
_Thing = TypeVar("_Thing")

_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Call `listener` at each instant, in the thread that reaches the instant. None removes the listener."""
    global _listener
    _listener = listener


def reach(instant: AnyInstant) -> None:
    """Call the listener with this instant, if there is a listener."""
    if _listener is not None:
        _listener(instant)


def reach_each(before: Instant, things: Iterable[_Thing], after: Instant | None = None) -> Iterable[_Thing]:
    """Return `things`, and reach one instant before each thing is used and another one after it.

    Without a listener this returns `things` itself, so that no row costs a call.

    Args:
        before: The instant before each thing.
        things: The things that are iterated over.
        after: The instant after each thing, or None for no such instant.
    """
    return things if _listener is None else _told(before, things, after)


def _told(before: Instant, things: Iterable[_Thing], after: Instant | None) -> Iterator[_Thing]:
    for thing in things:
        reach(before)
        yield thing
        if after is not None:
            reach(after)
