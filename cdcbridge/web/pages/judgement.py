"""Judge a consumer by its figures: does it need attention, why, and what a person does next.

This module is pure. Never reads a database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from cdcbridge.units import human_duration

Level = Literal["bad", "warn", "ok", "idle"]
LEVELS: Final[tuple[Level, ...]] = ("bad", "warn", "ok", "idle")  # the worst first
_UNREAD: Final = 60.0  # seconds that a message may be due while nobody receives
_BEHIND: Final = 300.0  # seconds that a message may be due at all
_OVER: Final = 10  # minutes over which a trend is taken


class Judgement(NamedTuple):
    """The state of a consumer in words.

    Attributes:
        level: How much attention it needs.
        word: The state in a word or two, for example "paused".
        sentence: The reason, for a person.
    """

    level: Level
    word: str
    sentence: str


class Trend(NamedTuple):
    """How the number of waiting messages changes.

    Attributes:
        per_minute: Messages per minute. A negative number means that the queue becomes shorter.
        empty_in: Seconds until nothing waits at this rate, or None.
    """

    per_minute: float
    empty_in: float | None


def judge(
    row: Mapping[str, Any], alarms: Iterable[Mapping[str, Any]], holders: Sequence[Mapping[str, Any]]
) -> Judgement:
    """Judge one consumer.

    Args:
        row: Its figures: pending, in_flight, dead, delayed, held, oldest_due_age_seconds, paused.
        alarms: The alarms of the measurement, of all consumers.
        holders: The open transactions that keep messages from consumers, of all consumers.
    """
    name = row["name"]
    for alarm in alarms:
        if alarm.get("consumer") == name:
            return Judgement("bad", _word(alarm["code"]), alarm["message"])
    if row.get("paused"):
        return Judgement("warn", "paused", f"{name} is paused: its receivers get nothing until somebody resumes it")
    due = row.get("oldest_due_age_seconds") or 0.0
    held = [one for one in holders if one["consumer"] == name]
    if held:
        return Judgement("warn", "held", _held(held[0]))
    ready = row["pending"] - row.get("delayed", 0)
    if ready > 0 and not row["in_flight"] and due > _UNREAD and row["mode"] != "stream":
        age = human_duration(due)
        return Judgement(
            "bad", "nobody receives", f"nobody receives: a message has been ready for {age}. Start a worker"
        )
    if row["mode"] == "stream" and due > _UNREAD:
        why = f"a message has waited for {human_duration(due)}. Start a member of the group, or find the slow one"
        return Judgement("warn", "behind", why)
    if due > _BEHIND:
        return Judgement(
            "warn", "behind", f"a message has waited for {human_duration(due)}. Add workers, or find the slow one"
        )
    if row["dead"]:
        return Judgement("warn", "dead letters", f"{_count(row['dead'], 'dead letter')} for a person to retry or purge")
    if row["pending"] or row["in_flight"]:
        return Judgement("ok", "working", "messages wait, and none for long")
    return Judgement("idle", "idle", "no message waits")


def trend(samples: Sequence[tuple[float, float]]) -> Trend | None:
    """Return how the number of waiting messages has changed in the last ten minutes, or None if that is unknown.

    Args:
        samples: The time of each sample in seconds, and the number of messages.
    """
    recent = [one for one in samples if one[0] >= samples[-1][0] - _OVER * 60] if samples else []
    if len(recent) < 2:
        return None
    (began, before), (ended, after) = recent[0], recent[-1]
    rate = (after - before) / (ended - began) * 60
    return Trend(rate, after / -rate * 60 if rate < 0 and after else None)


def _held(holder: Mapping[str, Any]) -> str:
    who = f"pid {holder['pid']}" if holder.get("pid") else f"the prepared transaction {holder['name']}"
    age = holder.get("age_seconds")
    since = f" for {human_duration(age)}" if age is not None else ""
    return f"an open transaction ({who}) has held messages{since}. Let it commit, or end it"


def _word(code: str) -> str:
    return code.removeprefix("consumer_").replace("_", " ")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
