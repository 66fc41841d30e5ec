"""Find open transactions that keep messages from consumers, with their age and the statement that ends each.

A receiver that stays in its transaction keeps the messages that it claimed. A group member keeps its partitions. A
publisher delays every reader of published messages. This module only reads, and waits for no lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final

from cdcbridge.database import Connection
from cdcbridge.problem import Alarm

ALARM_AFTER: Final = 60.0  # seconds that a transaction may be open; for a queue at least its visibility timeout
_LOOK: Final = "select * from consumer_holders(%s, make_interval(secs => %s))"
_UNSEEN: Final = "for a time that only pg_read_all_stats shows"


@dataclass(slots=True, frozen=True)
class ConsumerHolder:
    """One open transaction and one consumer that waits for it.

    Attributes:
        kind: receiver, member (of a stream's group) or publisher.
        pid: None for a prepared transaction. Then `name` is its gid.
        age_seconds: None if the store's role may not see the age.
        messages: The least number of messages that wait for the transaction, or None if that is unknown.
    """

    consumer: str
    mode: str
    kind: str
    pid: int | None
    name: str | None
    age_seconds: float | None
    state: str | None
    query: str | None
    messages: int | None
    partitions: list[int] | None
    limit_reached: bool | None

    @property
    def fix(self) -> str:
        """The SQL statement that ends the transaction."""
        if self.pid is None:
            return "rollback prepared '{}'".format((self.name or "").replace("'", "''"))
        return f"select pg_terminate_backend({self.pid})"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "fix": self.fix}


def consumer_holders(connection: Connection, consumer: str | None = None, *, seconds: float) -> list[ConsumerHolder]:
    """Return the transactions that have been open for some time, the oldest first.

    Args:
        connection: A session on the store.
        consumer: The name of the only consumer to look at, or None for all.
        seconds: The least age of a transaction.
    """
    return [ConsumerHolder(*row) for row in connection.execute(_LOOK, (consumer, seconds)).fetchall()]


def told(holders: Iterable[ConsumerHolder]) -> list[str]:
    """Return one sentence for each receiver and member, and one for each publisher with all its waiting consumers."""
    lines = []
    for _, same in groupby(holders, key=lambda h: (h.pid, h.name) if h.kind == "publisher" else h):
        group = list(same)
        lines.append(_published(group) if group[0].kind == "publisher" else _held(group[0]))
    return lines


def held_alarms(holders: Iterable[ConsumerHolder], timeouts: Mapping[str, float]) -> list[Alarm]:
    """Return an alarm for each transaction that has been open for too long.

    Args:
        holders: The transactions.
        timeouts: The visibility timeouts of the consumers, in seconds.
    """
    return [
        Alarm("consumer_held", "", told([holder])[0], holder.consumer)
        for holder in holders
        if (holder.age_seconds or 0.0) >= max(ALARM_AFTER, timeouts.get(holder.consumer, 0.0)) and holder.messages != 0
    ]


def about(seconds: float) -> str:
    """Return a duration in one unit, for example 12 s, 2 min, 3 h or 4 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _held(holder: ConsumerHolder) -> str:
    if holder.kind == "member":
        numbers = ", ".join(map(str, holder.partitions or ()))
        what = f"partition{'' if len(holder.partitions or ()) == 1 else 's'} {numbers}"
        with_ = f" with {_count(holder.messages)}" if holder.messages else ""
        verb = "is" if len(holder.partitions or ()) == 1 else "are"
        return f"{holder.consumer}: {what}{with_} {verb} held by {_who(holder)}"
    least = "at least " if holder.mode == "fifo" and holder.messages is not None else ""
    verb = "is" if holder.messages == 1 else "are"
    end = ". max_in_flight is reached, so no other messages are received" if holder.limit_reached else ""
    return f"{holder.consumer}: {least}{_count(holder.messages)} {verb} held by {_who(holder)}{end}"


def _published(group: list[ConsumerHolder]) -> str:
    waiting = " and ".join(
        f"{holder.consumer} ({_count(holder.messages)})" if holder.messages else holder.consumer for holder in group
    )
    verb = "waits" if len(group) == 1 else "wait"
    return f"{waiting} {verb} for {_who(group[0])}. That transaction published a message"


def _who(holder: ConsumerHolder) -> str:
    since = f"open for {_UNSEEN if holder.age_seconds is None else about(holder.age_seconds)}"
    if holder.pid is None:
        return f"the prepared transaction {holder.name}, {since}: `{holder.fix}`"
    return f"the transaction of pid {holder.pid} ({holder.name}), {since}: `{holder.fix}`"


def _count(messages: int | None) -> str:
    if messages is None:
        return "an unknown number of messages"
    return f"{messages} message{'' if messages == 1 else 's'}"
