"""Follow conditions over time: when each one begins, lasts and ends, and which notifications that makes.

A condition begins when it has been found in two successive evaluations, and ends when it has been missing in two. So a
value that swings around its limit sends no storm of messages. Critical conditions that cannot pass by themselves begin
at once. This module is pure.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from cdcbridge.alerts.rules import Condition, Judgement, Key
from cdcbridge.config.alerts import Severity

Kind = Literal["begins", "lasts", "ends"]
REPEAT: Final = dt.timedelta(days=1)


@dataclass(slots=True, frozen=True)
class Open:
    """A condition that was found and is not over.

    Attributes:
        since: When it was found first.
        began_at: When it had lasted for long enough to be announced. None: not yet.
        notified_at: When a notification was queued last. None: never, for example in a silence.
        missing_at: When it was not found any more. None: it was found last time.
        query: The query of the session that is the cause, or ''.
        told: The highest severity with which the beginning was notified. Destinations that get only a higher one know
            nothing of the condition. None: nobody does.
    """

    key: Key
    severity: Severity
    text: str
    since: dt.datetime
    began_at: dt.datetime | None = None
    notified_at: dt.datetime | None = None
    missing_at: dt.datetime | None = None
    query: str = ""
    told: Severity | None = None


@dataclass(slots=True)
class Step:
    """The changes of one evaluation.

    Attributes:
        open: The conditions that are open now.
        notices: The conditions to notify of, by kind.
        began: The conditions that have begun, also those in a silence.
        ended: The conditions that began once and are over now.
    """

    open: list[Open] = field(default_factory=list)
    notices: dict[Kind, list[Open]] = field(default_factory=dict)
    began: list[Open] = field(default_factory=list)
    ended: list[Open] = field(default_factory=list)

    def note(self, kind: Kind, one: Open) -> None:
        self.notices.setdefault(kind, []).append(one)


def step(
    before: Iterable[Open],
    judgement: Judgement,
    silences: Mapping[str, dt.datetime],
    now: dt.datetime,
    every: dt.timedelta,
) -> Step:
    """Compare the open conditions with those that hold now.

    Args:
        before: The conditions that were open.
        judgement: The conditions that hold now.
        silences: For each silenced rule, the time until which it makes no notification.
        now: The time of the evaluation.
        every: The time between two evaluations.
    """
    known = {one.key: one for one in before}
    made = Step()
    for condition in judgement.conditions:
        silent = silences.get(condition.key.rule, now) > now
        _holds(made, known.pop(condition.key, None), condition, silent=silent, now=now, every=every)
    for one in known.values():
        _missing(made, one, judgement, now, every)
    return made


def _holds(
    made: Step, had: Open | None, condition: Condition, *, silent: bool, now: dt.datetime, every: dt.timedelta
) -> None:
    one = Open(condition.key, condition.severity, condition.text, now) if had is None else had
    one = replace(one, severity=condition.severity, text=condition.text, query=condition.query, missing_at=None)
    if one.began_at is None and (condition.at_once or now - one.since >= _least(condition, every)):
        one = replace(one, began_at=now)
        made.began.append(one)
    if one.began_at is not None and not silent:
        if one.told is None or (one.told == "warning" and one.severity == "critical"):
            made.note("begins", one)  # `told` still says to which destinations this is new
            one = replace(one, notified_at=now, told=one.severity)
        elif one.notified_at is None or now - one.notified_at >= REPEAT:
            one = replace(one, notified_at=now)
            made.note("lasts", one)
    made.open.append(one)


def _least(condition: Condition, every: dt.timedelta) -> dt.timedelta:
    """Return how long a condition has to last before it begins."""
    return max(every, dt.timedelta(seconds=condition.after))


def _missing(made: Step, one: Open, judgement: Judgement, now: dt.datetime, every: dt.timedelta) -> None:
    """Handle a condition that was not found.

    An end is told even in a silence, because people who know of the condition would believe that it lasts.
    """
    if one.key.rule not in judgement.active:
        return  # the rule was turned off, so nothing is known of an end
    if one.key.rule in judgement.unknown:
        made.open.append(one)
    elif one.began_at is None:
        return
    elif one.missing_at is None:
        made.open.append(replace(one, missing_at=now))
    elif now - one.missing_at < every:
        made.open.append(one)
    else:
        made.ended.append(one)
        if one.told is not None:
            made.note("ends", one)
