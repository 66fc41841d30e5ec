"""How conditions begin, last and end over time: a table of cases, and a state machine against a simple model."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cdcbridge.alerts.notices import write
from cdcbridge.alerts.rules import Condition, Judgement, Key
from cdcbridge.alerts.tracking import REPEAT, Open, Step, step
from cdcbridge.config.alerts import AlertDestination, Severity

EVERY = dt.timedelta(seconds=30)
START = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
DEAD, LOST = Key("dead_letters", "billing"), Key("slot_lost", "s")
ACTIVE = frozenset({"dead_letters", "slot_lost"})


def condition(key: Key) -> Condition:
    critical = key.rule == "slot_lost"
    return Condition(key, "critical" if critical else "warning", f"text of {key.subject}", critical)


def told(found: Step) -> list[tuple[str, Key]]:
    return [(kind, one.key) for kind, some in found.notices.items() for one in some]


def play(moments: str, key: Key = DEAD, silences: dict[str, dt.datetime] | None = None) -> str:
    """Play one judgement each EVERY: `x` found, `.` not found, `?` unknown, `-` the rule is off.

    Returns what each judgement told: `b`egins, `l`asts, `e`nds, or a dot.
    """
    before: list[Open] = []
    heard = ""
    for number, moment in enumerate(moments):
        judgement = Judgement(
            (condition(key),) if moment == "x" else (),
            frozenset({key.rule}) if moment == "?" else frozenset(),
            frozenset() if moment == "-" else ACTIVE,
        )
        found = step(before, judgement, silences or {}, START + number * EVERY, EVERY)
        before = found.open
        heard += "".join(kind[0] for kind, _ in told(found)) or "."
    return heard


@pytest.mark.parametrize(
    ("moments", "heard"),
    [
        ("xx..", ".b.e"),
        ("x.x.x", "....."),  # it never lasts
        ("xxxxxx", ".b...."),  # told once
        ("xx.xx.x", ".b....."),  # it never ends
        ("xx??..", ".b...e"),  # unknown is neither
        ("x?x", "..b"),
        ("xx.?.", ".b..e"),
        ("xx-xx", ".b..b"),  # turned off: no end is told
        ("xx..xx..", ".b.e.b.e"),
    ],
)
def test_a_warning_has_to_last_for_two_judgements(moments: str, heard: str) -> None:
    assert play(moments) == heard


def test_what_cannot_pass_by_itself_is_told_at_once() -> None:
    assert play("x..", LOST) == "b.e"


def test_a_silence() -> None:
    until = {"dead_letters": START + 4.5 * EVERY}
    assert play("xxxxxx..", silences=until) == ".....b.e"
    assert play("xx......", silences=until) == "........", "nobody knows of the beginning"
    assert play("xxx.....", LOST, silences=until) == "b...e...", "another rule"
    late = {"dead_letters": START + dt.timedelta(days=9)}
    before = step(
        [Open(DEAD, "warning", "", START, START, START, told="warning")],
        Judgement((), frozenset(), ACTIVE),
        late,
        START,
        EVERY,
    )
    found = step(before.open, Judgement((), frozenset(), ACTIVE), late, START + EVERY, EVERY)
    assert told(found) == [("ends", DEAD)], "people know of the beginning"


class Life(RuleBasedStateMachine):
    """Two conditions over time, and what people believe of them after the notifications that they got."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.open: list[Open] = []
        self.silences: dict[str, dt.datetime] = {}
        self.history: dict[Key, list[bool | None]] = {DEAD: [], LOST: []}
        self.believed: dict[Key, dt.datetime] = {}  # what people believe to hold, with the last notification

    @rule(
        holds=st.dictionaries(st.sampled_from([DEAD, LOST]), st.sampled_from([True, True, None])),
        wait=st.sampled_from([EVERY, EVERY, 3 * EVERY, REPEAT]),
    )
    def judge(self, holds: dict[Key, bool | None], wait: dt.timedelta) -> None:
        self.now += wait
        unknown = frozenset(key.rule for key, value in holds.items() if value is None)
        found = step(
            self.open,
            Judgement(tuple(condition(key) for key, value in holds.items() if value), unknown, ACTIVE),
            self.silences,
            self.now,
            EVERY,
        )
        self.open = found.open
        for key in self.history:
            self.history[key].append(holds.get(key, False))
        heard = told(found)
        assert len({key for _, key in heard}) == len(heard), "at most one notification of a condition"
        for kind, key in heard:
            silent = self.silences.get(key.rule, self.now) > self.now
            if kind == "begins":
                assert key not in self.believed and not silent and holds.get(key)
                self.believed[key] = self.now
            elif kind == "lasts":
                assert self.now - self.believed[key] >= REPEAT and not silent and holds.get(key)
                self.believed[key] = self.now
            else:
                assert not holds.get(key, False), "it does not hold any more"
                del self.believed[key]

    @rule(name=st.sampled_from(sorted(ACTIVE)), length=st.sampled_from([EVERY / 2, 2.5 * EVERY, REPEAT]))
    def silence(self, name: str, length: dt.timedelta) -> None:
        self.silences[name] = self.now + length

    @invariant()
    def people_know_what_has_been_so_for_long(self) -> None:
        for key, moments in self.history.items():
            if moments[-2:] == [True, True] and self.silences.get(key.rule, self.now) <= self.now:
                assert key in self.believed
            if moments[-2:] == [False, False]:
                assert key not in self.believed
            if moments[-1:] == [True] and key == LOST and self.silences.get(key.rule, self.now) <= self.now:
                assert key in self.believed
        for key, since in self.believed.items():
            silent = self.silences.get(key.rule, self.now) > self.now
            assert silent or self.history[key][-1] is not True or self.now - since < REPEAT


TestLife = Life.TestCase


def test_each_destination_gets_one_message_of_its_severity() -> None:
    some: list[Open] = [
        Open(LOST, "critical", "The slot is lost.", START),
        Open(DEAD, "warning", "Two dead letters.", START),
    ]
    team = AlertDestination.model_validate({"name": "team", "urls": ["json://x"]})
    oncall = AlertDestination.model_validate({"name": "oncall", "urls": ["json://x"], "severity": "critical"})
    made = write(
        {"begins": some, "ends": [replace(some[1], told="warning")]},
        [team, oncall],
        "shop",
        START + dt.timedelta(minutes=5),
    )
    assert [(one.destination, one.kind, one.severity, one.headline) for one in made] == [
        ("team", "begins", "critical", "shop: 2 alerts: slot lost, dead letters"),
        ("team", "ends", "warning", "Over: shop: dead letters: billing"),
        ("oncall", "begins", "critical", "shop: slot lost: s"),
    ]
    assert made[2].body == "critical: slot lost: s\nThe slot is lost.\nSince 2026-05-01 00:00:00 UTC (5m 0s)."
    assert made[1].body == "dead letters: billing: over. It lasted from 2026-05-01 00:00:00 UTC for 5m 0s."


@pytest.mark.parametrize(("severity", "least", "gets"), [
    ("critical", "critical", True), ("critical", "warning", True),
    ("warning", "warning", True), ("warning", "critical", False),
])  # fmt: skip
def test_severities(severity: Severity, least: Severity, gets: bool) -> None:
    destination = AlertDestination.model_validate({"name": "a", "urls": ["json://x"], "severity": least})
    assert destination.gets(severity) is gets


def test_a_severity_that_changes_reaches_each_destination_once() -> None:
    """As after a restart with another severity in the configuration."""
    team = AlertDestination.model_validate({"name": "team", "urls": ["json://x"]})
    oncall = AlertDestination.model_validate({"name": "oncall", "urls": ["json://x"], "severity": "critical"})
    before: list[Open] = []
    heard: list[str] = []
    for number, severity in enumerate(["warning", "warning", "critical", "critical", "warning", "", "", ""]):
        condition = Condition(DEAD, severity, "text", at_once=True)  # type: ignore[arg-type]
        found = step(
            before, Judgement((condition,) if severity else (), frozenset(), ACTIVE), {}, START + number * EVERY, EVERY
        )
        before = found.open
        heard += [
            f"{number} {one.destination} {one.kind}" for one in write(found.notices, [team, oncall], "shop", START)
        ]
    assert heard == ["0 team begins", "2 oncall begins", "6 team ends", "6 oncall ends"]


def test_a_critical_destination_gets_no_end_without_a_beginning() -> None:
    oncall = AlertDestination.model_validate({"name": "oncall", "urls": ["json://x"], "severity": "critical"})
    one = Open(DEAD, "critical", "text", START, START, START, told="warning")
    assert write({"ends": [one]}, [oncall], "shop", START) == []


def test_a_condition_lasts_for_as_long_as_its_rule_says() -> None:
    paused = Condition(Key("paused", "billing"), "warning", "text", at_once=False, after=100.0)
    before: list[Open] = []
    heard = []
    for number in range(6):  # every 30 s
        found = step(
            before, Judgement((paused,), frozenset(), frozenset({"paused"})), {}, START + number * EVERY, EVERY
        )
        before = found.open
        heard.append(bool(found.notices))
    assert heard == [False, False, False, False, True, False]
