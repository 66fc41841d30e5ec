"""Measure the mirrors: their states, what they applied, how much waits, and the reason if one does not apply.

The values are in the source's store, so the measurement never connects to a target. This module only reads.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from cdcbridge.config import Config, Mirror
from cdcbridge.database import Connection, database_place, store_errors
from cdcbridge.observe.consumer_lag import ConsumerLag
from cdcbridge.problem import Alarm
from cdcbridge.units import human_duration

State = Literal["running", "copying", "paused", "stopped", "waiting", "not running", "new"]
_FRESH: Final = 60.0  # seconds after which an error counts as that of a process that has ended
AWAY: Final = 60.0  # seconds that messages wait for a mirror before it is an alarm
_NEW: Final = "the store has no such mirror yet: the next start of `cdcbridge run` adds it"
_IDLE: Final = "no process applies it: start `cdcbridge run` or `cdcbridge mirror run`"
_QUERY: Final = """
    select c.name, m.stopped, m.hint, m.stopped_at, m.error,
           extract(epoch from clock_timestamp() - m.error_at)::float8, m.note, m.note_at,
           coalesce(m.transactions, 0), coalesce(m.changes, 0), coalesce(m.conflicts, 0), coalesce(m.held, 0),
           m.applied_at, mirror_runs(c.id),
           exists (select from backfills b where b.consumer_id = c.id and b.finished_at is null),
           (select min(o.seq) from newest_offsets(c.id) o)
    from consumers c left join mirrors m on m.consumer_id = c.id
    where c.name = any (%s) and c.config ? 'mirror'"""


@dataclass(slots=True, frozen=True)
class MirrorLag:
    """The measurements of one mirror.

    Attributes:
        target: The target's database, without secrets.
        state: Its state. `new`: the store does not know the mirror yet.
        reason: Why it does not apply, in words, or None.
        behind: The number of messages that are not applied yet.
        lag_seconds: The age of the oldest of these in seconds, or None.
        transactions: The number of transactions in the target that applied changes.
        changes: The number of applied changes.
        conflicts: The number of conflicts since the mirror began.
        held: The number of conflicts that wait for a decision, at most 1,000.
        hint: The next step after a stop, or None.
        stopped_at: When it stopped, or None.
        note: The last finding that is no error, or None.
        note_at: The time of the note.
        applied_at: When a change was applied last, or None.
        seq: The seq up to which the target has everything, or None.
    """

    name: str
    target: str
    state: State
    reason: str | None = None
    behind: int = 0
    lag_seconds: float | None = None
    transactions: int = 0
    changes: int = 0
    conflicts: int = 0
    held: int = 0
    hint: str | None = None
    stopped_at: dt.datetime | None = None
    note: str | None = None
    note_at: dt.datetime | None = None
    applied_at: dt.datetime | None = None
    seq: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            name: value.isoformat() if isinstance(value, dt.datetime) else value for name, value in asdict(self).items()
        }


def mirror_lags(store: Connection, config: Config, consumers: Iterable[ConsumerLag]) -> list[MirrorLag]:
    """Return the measurements of each mirror, in the order of the file.

    Args:
        store: A session on the store, as its owner.
        config: The configuration.
        consumers: The measurements of all consumers.
    """
    if not config.mirrors:
        return []
    with store_errors():
        rows = store.execute(_QUERY, ([mirror.name for mirror in config.mirrors],)).fetchall()
    found = {row[0]: row[1:] for row in rows}
    lags = {one.name: one for one in consumers}
    return [_lag(mirror, found.get(mirror.name), lags.get(mirror.name)) for mirror in config.mirrors]


def _lag(mirror: Mirror, row: Sequence[Any] | None, lag: ConsumerLag | None) -> MirrorLag:
    target = database_place(mirror.target.dsn.get_secret_value())
    if row is None or lag is None:
        return MirrorLag(mirror.name, target, "new", _NEW)
    stopped, hint, stopped_at, error, error_age, note, note_at = row[:7]
    transactions, changes, conflicts, held, applied_at, runs, copying, seq = row[7:]
    state: State = "copying" if copying else "running"
    reason = None
    if stopped is not None:
        state, reason = "stopped", stopped
    elif lag.paused:
        state = "paused"
    elif error is not None and (runs or error_age < _FRESH):
        state, reason = "waiting", error
    elif not runs:
        state, reason = "not running", _IDLE
    return MirrorLag(
        mirror.name,
        target,
        state,
        reason,
        lag.pending + lag.in_flight,
        lag.oldest_due_age_seconds,
        transactions,
        changes,
        conflicts,
        held,
        hint,
        stopped_at,
        note,
        note_at,
        applied_at,
        seq,
    )


def mirror_alarms(mirrors: Iterable[MirrorLag]) -> list[Alarm]:
    """Return the alarms: a mirror has stopped, does not apply although messages wait, or has conflicts on hold."""
    found = []
    for one in mirrors:
        if one.state == "stopped":
            text = f"the mirror {one.name} has stopped: {one.reason}. {_next_step(one)}"
            found.append(Alarm("mirror_stopped", "", text, one.name))
        elif one.state in ("waiting", "not running") and one.lag_seconds is not None and one.lag_seconds > AWAY:
            code = f"mirror_{one.state.replace(' ', '_')}"
            age = human_duration(one.lag_seconds)
            text = (
                f"the mirror {one.name} applies nothing: {one.reason}; {one.behind} messages wait, the oldest for {age}"
            )
            found.append(Alarm(code, "", text, one.name))
        if one.held:
            found.append(Alarm("mirror_held", "", held_text(one), one.name))
    return found


def _next_step(one: MirrorLag) -> str:
    resume = f"cdcbridge mirror resume {one.name}"
    if one.hint is not None and resume in one.hint:
        return one.hint
    return f"{one.hint or 'Remove the cause.'} Then: `{resume}`"


def held_text(one: MirrorLag) -> str:
    """Return the sentence about the conflicts of a mirror that wait for a person."""
    number = f"{one.held} conflict{'' if one.held == 1 else 's'}"
    return (
        f"the mirror {one.name} has {number} on hold: `cdcbridge mirror conflicts list --mirror {one.name} --held`"
        " lists them"
    )
