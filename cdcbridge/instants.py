"""Named moments on the way of a change, where a test kills the bridge, stops it or acts beside it. Pure.

For example, a test kills the process at "rows copied": the log has the rows, and the position is not written. Only a
call of listen() makes reach() do anything. This module must never read a variable, an option or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, TypeAlias, TypeVar, get_args

Instant: TypeAlias = Literal[
    "received",  # a message of the plugin has arrived, and is not decoded
    "decoded",  # the event of the message is known
    "collected",  # the event is in the batch, or was passed over
    "submitted",  # the batch belongs to the thread that appends
    "append begun",  # the append holds the fence of its epoch
    "rows copied",  # log rows, fan-out and dead letters are written
    "position written",  # everything of the append is written, and nothing is committed
    "committed",  # the append is durable
    "about to confirm",  # the next status update for PostgreSQL is known, and not sent
    "confirmed",  # PostgreSQL may remove the WAL
    "about to note feeds",  # the leader has not stored yet which consumers it feeds
    "log page filled in",  # a consumer has got one page of the messages that the log holds
    "table described",  # a backfill knows the columns of its table, and has read no row
    "chunk handed over",  # rows that a backfill read wait for their watermark
]
INSTANTS: Final[tuple[Instant, ...]] = get_args(Instant)
Listener: TypeAlias = Callable[[Instant], None]
_Thing = TypeVar("_Thing")

_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Call this listener at each instant, in the thread that reaches it. None: listen no more."""
    global _listener
    _listener = listener


def reach(instant: Instant) -> None:
    """Tell the listener, if there is one."""
    if _listener is not None:
        _listener(instant)


def reach_each(before: Instant, things: Iterable[_Thing], after: Instant | None = None) -> Iterable[_Thing]:
    """Tell the listener before each thing is used, and after it. Without a listener no row costs a call."""
    return things if _listener is None else _told(before, things, after)


def _told(before: Instant, things: Iterable[_Thing], after: Instant | None) -> Iterator[_Thing]:
    for thing in things:
        reach(before)
        yield thing
        if after is not None:
            reach(after)
