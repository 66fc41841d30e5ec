"""Judge a consumer by its figures: does it need attention, why, and what a person does next.

This module is pure. Never reads a database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from cdcbridge.units import human_duration
from cdcbridge.web.pages.wording import plural

Level = Literal["bad", "warn", "ok", "idle"]
LEVELS: Final[tuple[Level, ...]] = ("bad", "warn", "ok", "idle")  # the worst first
_UNREAD: Final = 60.0  # seconds that a message may be due while nobody receives
_BEHIND: Final = 300.0  # seconds that a message may be due at all
_OVER: Final = 10  # minutes over which a trend is taken


class Assessment(NamedTuple):
    """The state of a consumer in words.

    Attributes:
        level: How much attention it needs.
        word: The state in a word or two, for example "paused".
        sentence: The reason, for a person.
    """

    level: Level
    word: str
    sentence: str

    @property
    def moves(self) -> bool:
        """Whether messages are delivered, so that the end of the queue can be foreseen."""
        return self.level in ("ok", "idle") or self.word in ("behind", "dead letters")


class Trend(NamedTuple):
    """How the number of waiting messages changes.

    Attributes:
        per_minute: Messages per minute. A negative number means that the queue becomes shorter.
        empty_in: Seconds until nothing waits at this rate, or None.
    """

    per_minute: float
    empty_in: float | None


def judge(
    row: Mapping[str, Any], alarm: Mapping[str, Any] | None, held: Sequence[Mapping[str, Any]], *, sink: bool
) -> Assessment:
    """Judge one consumer.

    Args:
        row: Its figures: pending, in_flight, dead, delayed, held, oldest_due_age_seconds, paused.
        alarm: Its first alarm, or None.
        held: The open transactions that keep messages from it.
        sink: Whether it has a sink, so that no application receives from it.
    """
    name, due = row["name"], row.get("oldest_due_age_seconds") or 0.0
    if alarm is not None:
        return Assessment("bad", alarm["code"].removeprefix("consumer_").replace("_", " "), alarm["message"])
    if row.get("paused"):
        return Assessment("warn", "paused", f"{name} is paused: its receivers get nothing until somebody resumes it")
    if held:
        return Assessment("warn", "held", _held(held[0]))
    if due > _UNREAD and row["mode"] == "stream":
        what = "find out why the target is slow" if sink else "start a member of the group, or find the slow one"
        return Assessment("warn", "behind", f"a message has waited for {human_duration(due)}: {what}")
    if row["mode"] == "fifo" and row.get("delayed") and due > _UNREAD:
        why = "a message was given back, and later messages of its key wait until it is delivered again"
        return Assessment("warn", "keys wait", why)
    ready = row["pending"] - row.get("delayed", 0)
    if ready > 0 and not row["in_flight"] and due > _UNREAD and not sink:
        why = f"nobody receives: a message has been ready for {human_duration(due)}. Start a worker"
        return Assessment("bad", "nobody receives", why)
    if due > _BEHIND:
        why = f"a message has waited for {human_duration(due)}. Add workers, or find the slow one"
        return Assessment("warn", "behind", why)
    if row["dead"]:
        return Assessment(
            "warn", "dead letters", f"{plural(row['dead'], 'dead letter')} for a person to retry or purge"
        )
    if row["pending"] or row["in_flight"]:
        keys = f", and {plural(row['delayed'], 'message')} given back, for which later ones of their keys wait"
        fifo = row["mode"] == "fifo" and row.get("delayed")
        return Assessment("ok", "working", f"messages wait, and none for long{keys if fifo else ''}")
    return Assessment("idle", "idle", "no message waits")


def judge_all(
    lag: Mapping[str, Any], *, age: float | None, stale: bool, bridges: Sequence[Mapping[str, Any]], attention: int
) -> Assessment:
    """Judge the whole, for the first page. Alarms are judged by the page itself, which lists them.

    Args:
        lag: The measurement.
        age: Its age in seconds, or None if nothing was measured yet.
        stale: Whether it is older than it should be.
        bridges: The bridges that run, the leader first.
        attention: How many consumers deserve a look.
    """
    if age is None:
        return Assessment("idle", "Measuring…", "the first figures follow in a moment")
    for name in ("store_error", "source_error"):
        if lag.get(name):
            return Assessment("bad", "A database does not answer", lag[name])
    if stale:
        return Assessment("warn", "The figures are old", f"nothing was measured for {human_duration(age)}")
    if not bridges:
        why = "queues with published messages work without one. To read the changes of tables, start it: cdcbridge run"
        return Assessment("warn", "No bridge runs", why)
    if not bridges[0]["leads"]:
        return Assessment(
            "bad", "No bridge leads", "bridges run, and none of them reads the slot. Their log has the reason"
        )
    if attention:
        word = f"{plural(attention, 'consumer')} {'deserves' if attention == 1 else 'deserve'} a look"
        return Assessment("warn", word, "the bridge works. They are listed below")
    return Assessment("ok", "Everything works", "the bridge leads, and no consumer needs attention")


def trend(samples: Sequence[tuple[float, float]], *, moves: bool = True) -> Trend | None:
    """Return how the number of waiting messages has changed in the last ten minutes, or None if that is unknown.

    Args:
        samples: The time of each sample in seconds, and the number of messages.
        moves: Whether messages are delivered. Otherwise there is no forecast.
    """
    recent = [one for one in samples if one[0] >= samples[-1][0] - _OVER * 60] if samples else []
    if len(recent) < 2:
        return None
    (began, before), (ended, after) = recent[0], recent[-1]
    rate = (after - before) / (ended - began) * 60
    return Trend(rate, after / -rate * 60 if rate < 0 and after and moves else None)


def _held(holder: Mapping[str, Any]) -> str:
    who = f"pid {holder['pid']}" if holder.get("pid") else f"the prepared transaction {holder['name']}"
    age = holder.get("age_seconds")
    since = f" for {human_duration(age)}" if age is not None else ""
    return f"an open transaction ({who}) has held messages{since}. Let it commit, or end it"
