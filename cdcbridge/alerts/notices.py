"""Write the notifications: one for all conditions that begin, last or end in the same evaluation, for each destination.

A hundred stuck consumers make one message and not a hundred. This module is pure.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cdcbridge.alerts.tracking import Kind, Open
from cdcbridge.config.alerts import AlertDestination, Severity
from cdcbridge.units import human_duration

_MOST: Final = 10  # conditions whose text is in a message; the others are counted
_LONGEST: Final = 600  # characters of one condition; some services take only 1,024 in all
KINDS: Final[Mapping[Kind, str]] = {"begins": "", "lasts": "Still: ", "ends": "Over: "}


@dataclass(slots=True, frozen=True)
class Notice:
    """A message for one destination.

    Attributes:
        title: The title, which is the same when the condition begins and when it ends.
        body: The text, with a paragraph for each condition.
    """

    destination: str
    kind: Kind
    severity: Severity
    title: str
    body: str

    @property
    def headline(self) -> str:
        """The title with a word for the kind, for example `Over: shop: dead letters: billing`."""
        return KINDS[self.kind] + self.title


def write(
    conditions: Mapping[Kind, Sequence[Open]], destinations: Iterable[AlertDestination], source: str, now: dt.datetime
) -> list[Notice]:
    """Return the messages for the conditions of one evaluation.

    Args:
        conditions: The conditions to notify of, by kind.
        destinations: The destinations of the configuration.
        source: The name of the source, for people.
        now: The time of the evaluation.
    """
    made = []
    for destination in destinations:
        for kind, found in conditions.items():
            chosen = [one for one in found if _is_for(destination, kind, one)]
            if chosen:
                made.append(_notice(destination.name, kind, chosen, source, now))
    return made


def _is_for(destination: AlertDestination, kind: Kind, one: Open) -> bool:
    """Return whether a destination gets this: a beginning that is new to it, or the end of one that it got."""
    knows = one.told is not None and destination.gets(one.told)
    if kind == "ends":
        return knows
    return destination.gets(one.severity) and not (kind == "begins" and knows)


def _notice(destination: str, kind: Kind, found: Sequence[Open], source: str, now: dt.datetime) -> Notice:
    severity: Severity = "critical" if any(one.severity == "critical" for one in found) else "warning"
    if len(found) == 1:
        title = f"{source}: {label(found[0])}"
    else:
        rules = dict.fromkeys(one.key.rule.replace("_", " ") for one in found)
        title = f"{source}: {len(found)} alerts: {', '.join(rules)}"
    parts = [_paragraph(kind, one, now) for one in found[:_MOST]]
    if len(found) > _MOST:
        parts.append(f"And {len(found) - _MOST} more: `cdcbridge alerts list`")
    return Notice(destination, kind, severity, title, "\n\n".join(parts))


def label(one: Open) -> str:
    """Name a condition for people, for example `dead letters: billing`."""
    return f"{one.key.rule.replace('_', ' ')}: {one.key.subject}"


def _paragraph(kind: Kind, one: Open, now: dt.datetime) -> str:
    lasted = human_duration(max(0.0, (now - one.since).total_seconds()))
    since = f"{one.since.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"
    if kind == "ends":
        return f"{label(one)}: over. It lasted from {since} for {lasted}."
    text = f"{one.text} Its query is `{one.query}`." if one.query else one.text
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return f"{one.severity}: {label(one)}\n{text}\nSince {since} ({lasted})."
