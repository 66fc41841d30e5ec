"""Describe alerts: their destinations, and the rules by which a condition becomes one.

This module never opens a socket, and never shows the URL of a destination, which is a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import Discriminator, Field, SecretStr, Tag, field_validator

from cdcbridge.config.sink_base import Model
from cdcbridge.units import Duration, Size

Severity = Literal["warning", "critical"]
_Rule = TypeVar("_Rule")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")


def _switch(value: Any) -> str:
    return "off" if value is False or value == "off" else "on"


# `off` is a boolean in YAML 1.1, and a text in YAML 1.2, which editors use.
_OrOff = Annotated[Annotated[_Rule, Tag("on")] | Annotated[Literal[False, "off"], Tag("off")], Discriminator(_switch)]
_SeverityKey = Annotated[
    Severity,
    Field(description="Destinations get an alert if this is at least their own severity.", examples=["critical"]),
]
_ConsumersKey = Annotated[
    tuple[str, ...],
    Field(description="Only these consumers. Without it, all consumers.", examples=["[billing]"]),
]
_MirrorsKey = Annotated[
    tuple[str, ...],
    Field(description="Only these mirrors. Without it, all mirrors.", examples=["[to_b]"]),
]


class SlotRetained(Model):
    """A slot retains much WAL."""

    severity: _SeverityKey = "critical"
    above: Annotated[
        Size | None,
        Field(description="More WAL than this. Without it, `source.max_retained_wal`.", examples=["50GB"]),
    ] = None


class SlotLost(Model):
    """The slot is lost, so changes are lost."""

    severity: _SeverityKey = "critical"


class SlotInactive(Model):
    """No bridge reads the slot."""

    severity: _SeverityKey = "critical"
    above: Annotated[
        Duration | None,
        Field(description="Longer than this. Without it, `source.max_slot_inactive`.", examples=["10m"]),
    ] = None


class SlotLimit(Model):
    """The limit of the slot, or the end of the disk, is near."""

    severity: _SeverityKey = "critical"
    within: Annotated[
        Duration,
        Field(gt=0),
        Field(description="It is reached sooner than this, at the present rate.", examples=["2h"]),
    ] = 3600.0


class NoLeader(Model):
    """No bridge leads."""

    severity: _SeverityKey = "critical"
    above: Annotated[Duration, Field(description="For longer than this.", examples=["2m"])] = 60.0


class BridgeStalled(Model):
    """The bridge that leads makes no progress."""

    severity: _SeverityKey = "critical"
    above: Annotated[
        Duration, Field(description="The oldest commit that is not stored yet is older than this.", examples=["10m"])
    ] = 300.0


class DeadLetters(Model):
    """A consumer has dead letters."""

    severity: _SeverityKey = "warning"
    above: Annotated[int, Field(ge=0), Field(description="More dead letters than this.", examples=["10"])] = 0
    consumers: _ConsumersKey = ()


class OldestAge(Model):
    """A message waits for long."""

    severity: _SeverityKey = "warning"
    above: Annotated[
        Duration, Field(description="The oldest message that is due has waited longer than this.", examples=["10m"])
    ] = 900.0
    consumers: _ConsumersKey = ()


class Paused(Model):
    """A consumer is paused, perhaps forgotten."""

    severity: _SeverityKey = "warning"
    above: Annotated[
        Duration, Field(description="For longer than this, since the bridge found it first.", examples=["4h"])
    ] = 3600.0
    consumers: _ConsumersKey = ()


class SinkFailing(Model):
    """A sink does not deliver, although messages wait for it."""

    severity: _SeverityKey = "critical"
    consumers: _ConsumersKey = ()


class MirrorStopped(Model):
    """A mirror has stopped, or does not apply although messages wait for it."""

    severity: _SeverityKey = "critical"
    consumers: _MirrorsKey = ()


class MirrorHeld(Model):
    """A mirror has conflicts that wait for a decision."""

    severity: _SeverityKey = "warning"
    above: Annotated[int, Field(ge=0), Field(description="More conflicts than this.", examples=["10"])] = 0
    consumers: _MirrorsKey = ()


class ConsumerFaulty(Model):
    """A consumer cannot work with its settings in the leader's file."""

    severity: _SeverityKey = "critical"
    consumers: _ConsumersKey = ()


class BackfillFailed(Model):
    """A backfill has failed."""

    severity: _SeverityKey = "warning"
    consumers: _ConsumersKey = ()


class ConsumerHeld(Model):
    """An open transaction of a receiver or group member keeps messages from a consumer."""

    severity: _SeverityKey = "warning"
    above: Annotated[
        Duration, Field(description="The transaction has been open for longer than this.", examples=["5m"])
    ] = 60.0
    consumers: _ConsumersKey = ()


class SafeSeqHeld(Model):
    """An open transaction that has published holds `max_safe_seq()` back."""

    severity: _SeverityKey = "warning"
    above: Annotated[
        Duration, Field(description="The transaction has been open for longer than this.", examples=["5m"])
    ] = 60.0


class XminHeld(Model):
    """An open transaction holds the xmin horizon, so vacuum cannot work and slots may keep WAL."""

    severity: _SeverityKey = "warning"
    above: Annotated[
        Duration, Field(description="The transaction has been open for longer than this.", examples=["4h"])
    ] = 3600.0


class StoreAway(Model):
    """The rules cannot be evaluated, usually because the store is out of reach."""

    severity: _SeverityKey = "critical"
    above: Annotated[Duration, Field(description="For longer than this.", examples=["5m"])] = 60.0


AnyRule = (
    SlotRetained | SlotLost | SlotInactive | SlotLimit | NoLeader | BridgeStalled | DeadLetters | OldestAge
    | Paused | SinkFailing | MirrorStopped | MirrorHeld | ConsumerFaulty | BackfillFailed | ConsumerHeld
    | SafeSeqHeld | XminHeld | StoreAway
)  # fmt: skip


class Rules(Model):
    """The rules. Each one is on, unless it is `off`."""

    slot_retained: Annotated[
        _OrOff[SlotRetained], Field(description="A slot retains too much WAL.", examples=["{above: 50GB}"])
    ] = SlotRetained()
    slot_lost: Annotated[
        _OrOff[SlotLost], Field(description="The slot is lost, so changes are lost.", examples=["{severity: warning}"])
    ] = SlotLost()
    slot_inactive: Annotated[
        _OrOff[SlotInactive], Field(description="No bridge has read the slot for a while.", examples=["{above: 10m}"])
    ] = SlotInactive()
    slot_limit: Annotated[
        _OrOff[SlotLimit],
        Field(
            description="The slot is about to reach max_slot_wal_keep_size, or to fill the disk.",
            examples=["{within: 2h}"],
        ),
    ] = SlotLimit()
    no_leader: Annotated[_OrOff[NoLeader], Field(description="No bridge leads.", examples=["{above: 2m}"])] = NoLeader()
    bridge_stalled: Annotated[
        _OrOff[BridgeStalled],
        Field(description="The leading bridge hangs, or lags far behind.", examples=["{above: 10m}"]),
    ] = BridgeStalled()
    dead_letters: Annotated[
        _OrOff[DeadLetters], Field(description="A consumer has dead letters.", examples=["{above: 10}"])
    ] = DeadLetters()
    oldest_age: Annotated[
        _OrOff[OldestAge],
        Field(
            description="The oldest due message of a consumer waits too long. A paused consumer is left out.",
            examples=["{above: 10m, consumers: [billing]}"],
        ),
    ] = OldestAge()
    paused: Annotated[
        _OrOff[Paused],
        Field(
            description="A consumer is paused. Its messages become dead letters after `store.max_retention`.",
            examples=["{above: 4h, consumers: [billing]}"],
        ),
    ] = Paused()
    sink_failing: Annotated[
        _OrOff[SinkFailing],
        Field(
            description="A sink does not deliver, although messages wait for it.", examples=["{consumers: [events]}"]
        ),
    ] = SinkFailing()
    mirror_stopped: Annotated[
        _OrOff[MirrorStopped],
        Field(
            description="A mirror has stopped until `mirror resume`, or does not reach its target for a minute.",
            examples=["{consumers: [to_b]}"],
        ),
    ] = MirrorStopped()
    mirror_held: Annotated[
        _OrOff[MirrorHeld],
        Field(description="A mirror has conflicts on hold, which wait for a decision.", examples=["{above: 10}"]),
    ] = MirrorHeld()
    consumer_faulty: Annotated[
        _OrOff[ConsumerFaulty],
        Field(
            description="A consumer cannot work as the leader's file describes it.", examples=["{consumers: [billing]}"]
        ),
    ] = ConsumerFaulty()
    backfill_failed: Annotated[
        _OrOff[BackfillFailed], Field(description="A backfill has failed.", examples=["{severity: critical}"])
    ] = BackfillFailed()
    consumer_held: Annotated[
        _OrOff[ConsumerHeld],
        Field(description="An open transaction keeps messages from a consumer.", examples=["{above: 5m}"]),
    ] = ConsumerHeld()
    safe_seq_held: Annotated[
        _OrOff[SafeSeqHeld],
        Field(
            description="A transaction that has published stays open, so readers of published messages wait.",
            examples=["{above: 5m}"],
        ),
    ] = SafeSeqHeld()
    xmin_held: Annotated[
        _OrOff[XminHeld],
        Field(description="A transaction is open for so long that vacuum cannot work.", examples=["{above: 4h}"]),
    ] = XminHeld()
    store_away: Annotated[
        _OrOff[StoreAway],
        Field(
            description="The rules cannot be evaluated, usually because the store is away.", examples=["{above: 5m}"]
        ),
    ] = StoreAway()

    def active(self) -> Iterator[tuple[str, AnyRule]]:
        """Yield each rule that is on, with its name."""
        for name in type(self).model_fields:
            rule = getattr(self, name)
            if isinstance(rule, Model):
                yield name, rule  # type: ignore[misc]


RULES: Final = tuple(Rules.model_fields)


class AlertDestination(Model):
    """One or more URLs that get the same notifications."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$"),
        Field(description="The name of the destination in `alerts list` and in the log.", examples=["oncall"]),
    ]
    urls: Annotated[
        tuple[SecretStr, ...],
        Field(
            description="URLs of Apprise, for example for mail, Slack, PagerDuty or WhatsApp. Each is a secret: put it"
            " into a variable.",
            examples=['["${PAGERDUTY_URL}", "${WHATSAPP_URL}"]'],
        ),
    ]
    severity: Annotated[
        Severity,
        Field(
            description="The least severity that is sent here: `critical` gets only critical alerts, `warning` gets"
            " all.",
            examples=["critical"],
        ),
    ] = "warning"

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not value:
            raise ValueError("the list is empty")
        for number, url in enumerate(value):
            if not _URL.fullmatch(url.get_secret_value()):
                raise ValueError(f"entry {number + 1} is not a URL, as in slack://… or mailto://…")
        if len(set(value)) < len(value):
            raise ValueError("a URL is given twice")
        return value

    def gets(self, severity: Severity) -> bool:
        """Return whether alerts of this severity are sent here."""
        return severity == "critical" or self.severity == "warning"


class Alerts(Model):
    """Alerts: messages to people when something is wrong."""

    every: Annotated[
        Duration,
        Field(ge=1, le=3600),
        Field(description="How often the bridge evaluates the rules.", examples=["30s"]),
    ] = 30.0
    to: Annotated[
        tuple[AlertDestination, ...],
        Field(
            description="The destinations. Each gets every alert of its severity.",
            examples=['[{name: team, urls: ["${SLACK_URL}"]}]'],
        ),
    ]
    rules: Annotated[
        Rules,
        Field(
            description="Changes of the rules. A rule that is not listed has its defaults, and `off` turns one off.",
            examples=["{dead_letters: {above: 10}, xmin_held: off}"],
        ),
    ] = Rules()

    @field_validator("to")
    @classmethod
    def _unique_names(cls, value: tuple[AlertDestination, ...]) -> tuple[AlertDestination, ...]:
        names = [one.name for one in value]
        if not names:
            raise ValueError("the list is empty: without destinations, leave `alerts` out")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two destinations are named {name!r}")
        return value
