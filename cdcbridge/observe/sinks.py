"""The state of the sinks, for `sinks list`, `lag`, metrics and alarms.

The sinks' processes store their counters and their last error. Never contacts a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from cdcbridge.config import Config
from cdcbridge.config.sink import shown_destination
from cdcbridge.config.sink_base import SinkBase
from cdcbridge.database import Connection, store_errors
from cdcbridge.observe.consumer_lag import ConsumerLag
from cdcbridge.problem import Alarm
from cdcbridge.units import human_duration

State = Literal["delivering", "failing", "blocked", "paused", "not running", "new"]
_ALIVE: Final = 5.0  # seconds after which a process that has not stored its presence counts as gone
_NEW: Final = "the store has no such consumer yet: `cdcbridge consumers apply` adds it, or the next start of `run`"
_UNBLOCK: Final = "fix: correct the target, or set `on_failure: dead_letter`"
_QUERY: Final = """
    select c.name, coalesce(s.delivered, 0), coalesce(s.failed, 0), coalesce(s.retried, 0), coalesce(s.batches, 0),
           coalesce(s.seconds, 0), s.error, s.blocked,
           (select count(*) from sink_members m
            where m.consumer_id = c.id and m.seen_at > clock_timestamp() - make_interval(secs => %s))
    from consumers c left join sinks s on s.consumer_id = c.id
    where c.name = any (%s)"""


@dataclass(slots=True, frozen=True)
class SinkState:
    """The state of one sink.

    Attributes:
        name: The name of the consumer.
        type: The type of the sink, for example `kafka`.
        destination: The template of the destination, without secrets.
        state: Its state. `new`: the store does not know the consumer yet.
        reason: The last error, or the message for which others wait, in words with the fix. None: it delivers.
        delivered: The number of messages that the target has acknowledged.
        failed: The number of messages that became dead letters.
        retried: The number of failed attempts at a message that was tried again.
        behind: The number of messages that are not delivered yet.
        oldest_seconds: How long the oldest of these has waited, or None.
        batches: The number of batches that were delivered.
        seconds: How long these batches took, in seconds.
        processes: The number of processes that deliver for the consumer.
    """

    name: str
    type: str
    destination: str
    state: State
    reason: str | None = None
    delivered: int = 0
    failed: int = 0
    retried: int = 0
    behind: int = 0
    oldest_seconds: float | None = None
    batches: int = 0
    seconds: float = 0.0
    processes: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def sink_states(store: Connection, config: Config, consumers: Iterable[ConsumerLag]) -> list[SinkState]:
    """Return the state of each consumer of the file that has a sink, in the order of the file.

    Args:
        store: A session on the store, as its owner.
        config: The configuration.
        consumers: The measurements of all consumers.
    """
    wanted = [(one.name, one.sink) for one in config.consumers if one.sink is not None]
    if not wanted:
        return []
    with store_errors():
        rows = store.execute(_QUERY, (_ALIVE, [name for name, _ in wanted])).fetchall()
    found = {row[0]: row[1:] for row in rows}
    lags = {one.name: one for one in consumers}
    return [_state(name, sink, found.get(name), lags.get(name)) for name, sink in wanted]


def _state(name: str, sink: SinkBase, row: Sequence[Any] | None, lag: ConsumerLag | None) -> SinkState:
    destination = shown_destination(sink)
    if row is None or lag is None:
        return SinkState(name, sink.type, destination, "new", _NEW)
    delivered, failed, retried, batches, seconds, error, blocked, processes = row
    state: State = "delivering"
    reason = error
    if blocked is not None:
        state = "blocked"
        message = f"message {blocked['seq']} ({blocked['topic']}, key {blocked['key']})"
        reason = f"{message} is refused: {blocked['reason']} ({_UNBLOCK})"
    elif error is not None:
        state = "failing"
    if lag.paused:
        state = "paused"
    elif not processes:
        state, reason = "not running", "no process delivers: start `cdcbridge run` or `cdcbridge sinks run`"
    behind, oldest = lag.pending + lag.in_flight, lag.oldest_due_age_seconds
    counts = (delivered, failed, retried, behind, oldest, batches, seconds, processes)
    return SinkState(name, sink.type, destination, state, reason, *counts)


def sink_alarms(sinks: Iterable[SinkState]) -> list[Alarm]:
    """Return an alarm for each sink that does not deliver although messages wait for it."""
    found = []
    for one in sinks:
        waiting = f"{one.behind} messages wait"
        if one.oldest_seconds is not None:
            waiting += f", the oldest for {human_duration(one.oldest_seconds)}"
        if one.behind and one.state in ("failing", "blocked", "not running"):
            code = f"sink_{one.state.replace(' ', '_')}"
            text = f"the sink of {one.name} ({one.type}) delivers nothing: {one.reason}; {waiting}"
            found.append(Alarm(code, "", text, one.name))
    return found
