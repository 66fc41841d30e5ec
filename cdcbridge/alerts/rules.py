"""Evaluate the rules on facts: find the conditions of which people have to know.

Each text has the problem, its age and numbers, and the next step. This module never reads a database or a
clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeAlias

from cdcbridge.alerts.facts import Facts
from cdcbridge.config.alerts import Paused, Rules, Severity
from cdcbridge.observe.alarms import alarms
from cdcbridge.observe.lag import Lag, slot_state
from cdcbridge.observe.lag_store import OpenPublisher
from cdcbridge.observe.mirrors import held_text, mirror_alarms
from cdcbridge.observe.sinks import sink_alarms
from cdcbridge.observe.xmin_holders import HorizonHolder
from cdcbridge.source.wal_room import other_alarms
from cdcbridge.store.holders import ConsumerHolder, told
from cdcbridge.units import human_duration

# For each condition, its subject, its text and, if a session is the cause, the query of that session.
Found: TypeAlias = Iterable[tuple[str, str] | tuple[str, str, str]]
_LIMITS: Final = ("slot_unreserved", "slot_limit_near", "slot_limit_in_sight", "disk_full_in_sight")
# Critical conditions that can pass by themselves within seconds. Like warnings, they have to last.
_MUST_LAST: Final = frozenset(
    {
        "slot_retained",  # a bulk load that the bridge is about to catch up with
        "slot_inactive",
        "slot_limit",  # a forecast by the rate of the last seconds
        "no_leader",
        "bridge_stalled",
        "sink_failing",
        "mirror_stopped",
        "consumer_faulty",
    }
)


class Key(NamedTuple):
    """A condition: the name of its rule, and what it is about, for example ("dead_letters", "billing")."""

    rule: str
    subject: str


@dataclass(slots=True, frozen=True)
class Condition:
    """A condition that a rule has found.

    Attributes:
        text: What is wrong, and the next step.
        at_once: Whether to announce it at once. Otherwise it has to last until the next evaluation.
        query: The query of the session that is the cause, or ''. It may contain data, so it is not in the text.
        after: How long it has to last at least, in seconds, because the facts do not say since when it holds.
    """

    key: Key
    severity: Severity
    text: str
    at_once: bool
    query: str = ""
    after: float = 0.0


@dataclass(slots=True, frozen=True)
class Limits:
    """Settings of the source that some rules use as defaults: WAL in bytes, and time in seconds."""

    max_retained: int
    max_inactive: float


@dataclass(slots=True, frozen=True)
class Judgement:
    """The result of one evaluation.

    Attributes:
        conditions: The conditions that hold, critical ones first.
        unknown: The rules for which facts are missing. Their conditions neither begin nor end.
        active: The rules that are on.
    """

    conditions: tuple[Condition, ...]
    unknown: frozenset[str] = frozenset()
    active: frozenset[str] = frozenset()


def judge(facts: Facts, rules: Rules, limits: Limits) -> Judgement:
    """Apply each rule that is on to the facts."""
    active = dict(rules.active())
    found: list[Condition] = []
    unknown: set[str] = set()
    for name, rule in active.items():
        judged = _JUDGES[name](facts, rule, limits)
        if judged is None:
            unknown.add(name)
            continue
        texts: dict[str, list[str]] = {}
        queries: dict[str, str] = {}
        for subject, text, *query in judged:
            texts.setdefault(subject, []).append(text)
            queries.setdefault(subject, "".join(query))
        for subject, said in texts.items():
            at_once = rule.severity == "critical" and _is_sure(facts, name, subject)
            made = Condition(Key(name, subject), rule.severity, " ".join(said), at_once, queries[subject])
            found.append(replace(made, at_once=False, after=rule.above) if isinstance(rule, Paused) else made)
    found = _without_consequences(found)
    found.sort(key=lambda one: one.severity != "critical")
    return Judgement(tuple(found), frozenset(unknown), frozenset(active))


def _is_sure(facts: Facts, rule: str, subject: str) -> bool:
    """Return whether a condition cannot pass by itself within seconds.

    A slot may only seem to be gone: while it is created, the source is looked at before, and the store after that.
    """
    seems_gone = rule == "slot_lost" and facts.lag is not None and subject in facts.lag.gone
    return bool(facts.ended) or not (rule in _MUST_LAST or seems_gone)


def _without_consequences(found: list[Condition]) -> list[Condition]:
    """Leave out conditions that only repeat another one: a lost slot has no leader, and nobody reads it then."""
    rules = {one.key.rule for one in found}
    if "slot_lost" in rules:
        return [one for one in found if one.key.rule not in ("no_leader", "slot_inactive")]
    return [one for one in found if not (one.key.rule == "slot_inactive" and "no_leader" in rules)]


# The source


def _of_slots(facts: Facts, codes: tuple[str, ...], limits: Limits, **changed: Any) -> Iterator[tuple[str, str]] | None:
    """Return the alarms of the slots with one of these codes, with changed limits. None: the source is unknown."""
    lag = facts.lag
    if lag is None or lag.source_error is not None:
        return None
    given: dict[str, Any] = {"max_retained": limits.max_retained, "max_inactive": limits.max_inactive, **changed}
    found = [alarm for slot in lag.slots for alarm in alarms(slot_state(slot, lag.room), **given)]
    return ((alarm.slot, _sentence(alarm.message)) for alarm in found if alarm.code in codes)


def _slot_retained(facts: Facts, rule: Any, limits: Limits) -> Found | None:
    most = limits.max_retained if rule.above is None else rule.above
    own = _of_slots(facts, ("slot_retains_too_much",), limits, max_retained=most)
    if own is None or facts.lag is None:
        return None
    others = other_alarms(facts.lag.room.others, most)
    return (*own, *((alarm.slot, _sentence(alarm.message)) for alarm in others))


def _slot_lost(facts: Facts, _rule: Any, limits: Limits) -> Found | None:
    lost = _of_slots(facts, ("slot_lost",), limits)
    if lost is None or facts.lag is None or facts.lag.store_error is not None:
        return None
    gone = "The slot {} no longer exists: the changes that it had not sent yet are lost. `cdcbridge slot recreate` "
    return (*lost, *((name, gone.format(name) + "continues after a gap message.") for name in facts.lag.gone))


def _slot_inactive(facts: Facts, rule: Any, limits: Limits) -> Found | None:
    longest = limits.max_inactive if rule.above is None else rule.above
    return _of_slots(facts, ("slot_inactive",), limits, max_inactive=longest)


def _slot_limit(facts: Facts, rule: Any, limits: Limits) -> Found | None:
    return _of_slots(facts, _LIMITS, limits, within=rule.within)


def _xmin_held(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if facts.lag is None or facts.lag.source_error is not None or facts.lag.store_error is not None:
        return None
    old = [one for one in facts.lag.horizon if one.age_seconds is not None and one.age_seconds > rule.above]
    # `query` describes a prepared transaction, which has no session.
    return [(f"{one.server}: {_holder_name(one)}", _xmin_text(one), _line(one.query if one.pid else "")) for one in old]


def _holder_name(holder: HorizonHolder) -> str:
    return f"pid {holder.pid}" if holder.pid is not None else f"{holder.kind} {holder.name}"


def _xmin_text(holder: HorizonHolder) -> str:
    where = "the source, which is also the store" if holder.server == "both" else f"the {holder.server}"
    who = f"pid {holder.pid} ({holder.name}, user {holder.user})" if holder.pid is not None else str(holder.name)
    wal = ", and slots keep the WAL since then" if holder.writes else ""
    text = (
        f"On {where}, the {holder.kind} {who} has been open for {human_duration(holder.age_seconds or 0.0)}. Vacuum"
        f" cannot remove rows that were deleted since then{wal}."
    )
    if holder.pid is not None:
        return f"{text} If it is not needed, end it: `{_end(holder.pid)}`"
    name = (holder.name or "").replace("'", "''")
    return f"{text} ({holder.query}) Commit it, or end it: `rollback prepared '{name}'`"


# The bridges


def _no_leader(facts: Facts, rule: Any, _limits: Limits) -> Found:
    if facts.led:
        return ()
    if facts.ended:
        return [("bridge", f"The bridge has ended, and no other leads: WAL is held. {_sentence(facts.ended)}")]
    if facts.leaderless <= rule.above:
        return ()
    why = f" This one cannot: {facts.why}." if facts.why else ""
    text = f"No bridge has led for {human_duration(facts.leaderless)}: WAL is held, and no change is delivered.{why}"
    return [("bridge", f"{text} `cdcbridge status` says more.")]


def _bridge_stalled(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if facts.stalled:
        return [("bridge", f"The leading bridge does not do its work: {facts.stalled}. Restart it if that lasts.")]
    if facts.lag is None or facts.lag.source_error is not None:
        return None
    late = [s for s in facts.lag.slots if s.active and s.lag_seconds is not None and s.lag_seconds > rule.above]
    text = "The oldest commit that is not stored yet is {} old. `cdcbridge lag` shows what the bridge waits for."
    return [("bridge", text.format(human_duration(slot.lag_seconds or 0.0))) for slot in late[:1]]


# The store


def _store(facts: Facts) -> Lag | None:
    """Return the measurement if it covers the store."""
    return facts.lag if facts.lag is not None and facts.lag.store_error is None else None


def _wanted(rule: Any, consumer: str | None) -> bool:
    return not rule.consumers or consumer in rule.consumers


def _dead_letters(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    text = (
        "{0} has {1} dead letter{2}. `cdcbridge dead list {0}` shows each with its reason, and `cdcbridge dead redrive"
        " {0}` delivers them again."
    )
    found = (o for o in lag.consumers if o.dead > rule.above and _wanted(rule, o.name))
    return [(o.name, text.format(o.name, o.dead, "" if o.dead == 1 else "s")) for o in found]


def _oldest_age(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    found = []
    for one in lag.consumers:
        age = one.oldest_due_age_seconds
        if age is not None and age > rule.above and not one.paused and _wanted(rule, one.name):
            held = f" {_ended(holder)}" if (holder := _held_by(lag, one.name)) else ""
            look = "mirror show" if one.name in [mirror.name for mirror in lag.mirrors] else "peek"
            text = (
                f"The oldest due message of {one.name} has waited for {human_duration(age)}: {one.pending} wait,"
                f" {one.in_flight} are in flight.{held} Look whether they are read: `cdcbridge {look} {one.name}`"
            )
            found.append((one.name, text))
    return found


def _held_by(lag: Lag, consumer: str) -> str:
    return next(iter(told(one for one in lag.consumer_holders if one.consumer == consumer)), "")


def _paused(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    text = "{0} is paused, and {1} messages wait. If that is no longer wanted: `cdcbridge consumers resume {0}`"
    return [(o.name, text.format(o.name, o.pending)) for o in lag.consumers if o.paused and _wanted(rule, o.name)]


def _sink_failing(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    found = (alarm for alarm in sink_alarms(lag.sinks) if _wanted(rule, alarm.consumer))
    text = "{} `cdcbridge sinks check {}` reaches the destination."
    return [(name := alarm.consumer or "", text.format(_sentence(alarm.message), name)) for alarm in found]


def _mirror_stopped(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    found = [a for a in mirror_alarms(lag.mirrors) if a.code != "mirror_held" and _wanted(rule, a.consumer)]
    return [(a.consumer or "", _sentence(a.message)) for a in found]


def _mirror_held(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    return [(o.name, _sentence(held_text(o))) for o in lag.mirrors if o.held > rule.above and _wanted(rule, o.name)]


def _consumer_faulty(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    found = [a for a in (lag.feeds.alarms() if lag.feeds else ()) if _wanted(rule, a.consumer)]
    return [(a.consumer or "", _sentence(a.message)) for a in found]


def _backfill_failed(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    text = (
        "The backfill of {1} for {0} failed after {2} rows: {3} Fix that, then `cdcbridge backfill resume {0} {1}`, or"
        " give it up: `cdcbridge backfill cancel {0} {1}`"
    )
    found = (one for one in lag.backfills if one["state"] == "failed" and _wanted(rule, one["consumer"]))
    return [
        (
            f"{o['consumer']} {o['table_name']}",
            text.format(o["consumer"], o["table_name"], o["rows"], _sentence(o["note"] or "no reason is known")),
        )
        for o in found
    ]


def _consumer_held(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    by_consumer: dict[str, list[ConsumerHolder]] = {}
    for one in lag.consumer_holders:
        old = one.age_seconds is not None and one.age_seconds > rule.above and one.messages != 0
        if old and one.kind != "publisher" and _wanted(rule, one.consumer):
            by_consumer.setdefault(one.consumer, []).append(one)
    return [(name, _held_text(held, facts.users), _line(held[0].query)) for name, held in by_consumer.items()]


def _held_text(held: list[ConsumerHolder], users: Mapping[int, str]) -> str:
    """Describe the oldest holder of a consumer, and say how many more there are."""
    first = held[0]
    user = f" Its user is {users[first.pid]}." if first.pid is not None and first.pid in users else ""
    more = f" {len(held) - 1} more transactions hold messages: `cdcbridge lag` lists them." if len(held) > 1 else ""
    return f"{_ended(told([first])[0])}{user}{more}"


def _safe_seq_held(facts: Facts, rule: Any, _limits: Limits) -> Found | None:
    if (lag := _store(facts)) is None:
        return None
    old = [one for one in lag.holders if one.age_seconds > rule.above]
    return [(f"pid {one.pid}", _seq_text(one, facts.users), _line(one.query)) for one in old]


def _seq_text(holder: OpenPublisher, users: Mapping[int, str]) -> str:
    user = f" (user {users[holder.pid]})" if holder.pid in users else ""
    return (
        f"On the store, the transaction of pid {holder.pid}{user} has published and been open for"
        f" {human_duration(holder.age_seconds)}. No group and no fifo consumer reads seq {holder.seq} or a later one"
        f" before it ends. Commit it, or end it: `{_end(holder.pid)}`"
    )


def _store_away(_facts: Facts, _rule: Any, _limits: Limits) -> Found:
    """Find nothing: facts exist, so the store answers. The thread reports its own failure (alerts/judging.py)."""
    return ()


def _end(pid: int) -> str:
    return f"select pg_terminate_backend({pid})"


def _line(query: str | None) -> str:
    return " ".join((query or "").split())


def _sentence(text: str) -> str:
    """Return the text with a capital letter and a full stop."""
    ended = _ended(text)
    return ended[:1].upper() + ended[1:]


def _ended(text: str) -> str:
    """Return the text with a full stop. It may begin with a consumer's name, which has no capital letter."""
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!", "`")) else f"{text}."


_JUDGES: Final[Mapping[str, Callable[[Facts, Any, Limits], Found | None]]] = {
    "slot_retained": _slot_retained,
    "slot_lost": _slot_lost,
    "slot_inactive": _slot_inactive,
    "slot_limit": _slot_limit,
    "no_leader": _no_leader,
    "bridge_stalled": _bridge_stalled,
    "dead_letters": _dead_letters,
    "oldest_age": _oldest_age,
    "paused": _paused,
    "sink_failing": _sink_failing,
    "mirror_stopped": _mirror_stopped,
    "mirror_held": _mirror_held,
    "consumer_faulty": _consumer_faulty,
    "backfill_failed": _backfill_failed,
    "consumer_held": _consumer_held,
    "safe_seq_held": _safe_seq_held,
    "xmin_held": _xmin_held,
    "store_away": _store_away,
}
