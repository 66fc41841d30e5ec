"""Describe which consumers the bridge feeds, and why it does not feed the others.

The leader writes these notes into the store when it begins to stream. `consumers apply`, `consumers list`, `lag` and
the metrics read them. For example, a consumer that was applied from another file is in the store, and the bridge sends
it nothing. This module does no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cdcbridge.problem import Alarm

State = Literal["fed", "as_before", "not_in_file", "refused"]


@dataclass(slots=True, frozen=True)
class Fault:
    """The reason why a consumer cannot work as the file describes it.

    Attributes:
        fed: The consumer gets messages nevertheless, with its previous settings or without one of its tables.
        asked: The settings that the file asks for, for example `mode: fifo`, if the consumer continues with its
            previous ones.
        code: The code of the problem, as `check` reports it.
    """

    consumer: str
    object: str
    message: str
    fix: str
    fed: bool
    asked: str = ""
    code: str = ""

    @property
    def state(self) -> State:
        return "as_before" if self.asked else "fed" if self.fed else "refused"

    @property
    def reason(self) -> str:
        """The message, together with the settings that the file asks for."""
        if not self.asked:
            return self.message
        return f"the file asks for {self.asked}, which cannot be done: {_unnamed(self.message, self.consumer)}"

    @property
    def meanwhile(self) -> str:
        if self.asked:
            return "it continues with its earlier settings"
        return "it continues, except for this" if self.fed else "it gets nothing"


@dataclass(slots=True, frozen=True)
class Feed:
    """The state of one consumer, with its problem and the fix.

    Attributes:
        reason: The problem, or an empty string.
    """

    state: State
    reason: str = ""
    fix: str = ""


@dataclass(slots=True, frozen=True)
class Feeds:
    """The notes of an epoch's leader on each consumer.

    Attributes:
        holder: The leader, for example `db1 pid 4711`.
        file: The path of the leader's configuration file.
        unfed: By the id of each consumer that gets nothing, the LSN since which that is so. None in notes of a version
            that did not keep this.
    """

    epoch: int
    holder: str
    file: str
    consumers: Mapping[str, Feed] = field(default_factory=dict)
    unfed: Mapping[str, str] | None = None

    def dump(self) -> dict[str, Any]:
        """Return the notes as JSON, for the store."""
        return asdict(self)

    def of(self, name: str) -> Feed | None:
        """Return the notes on one consumer, or None for one that was applied after this epoch began."""
        return self.consumers.get(name)

    def silence(self, name: str) -> str:
        """Return a sentence on why a consumer of the store gets nothing, or an empty string if it is fed."""
        feed = self.of(name)
        if feed is None:
            return (
                f"{name} gets nothing yet: it was applied after the bridge ({self.holder}) began. A running bridge"
                " feeds it within seconds, another one when it starts"
            )
        if feed.state == "not_in_file":
            return (
                f"{name} gets nothing: the bridge ({self.holder}) does not have it in its file {self.file}. Add it"
                f" there and run `cdcbridge consumers apply` there, or run `cdcbridge consumers remove {name}`"
            )
        return self.faulty(name) if feed.state == "refused" else ""

    def mark(self, name: str) -> str:
        """Return a few words to print next to a consumer's name, or an empty string if it works."""
        if self.silence(name):
            return "gets nothing"
        if (feed := self.of(name)) is not None and feed.state == "as_before":
            return "as before"
        return "faulty" if self.faulty(name) else ""

    def faulty(self, name: str) -> str:
        """Return a sentence on why a consumer does not work as the leader's file describes it, or an empty string."""
        feed = self.of(name)
        if feed is None or not feed.reason:
            return ""
        what = {"refused": "gets nothing:", "as_before": "continues with its earlier settings:"}.get(
            feed.state, "is faulty:"
        )
        reason = _unnamed(feed.reason, name)
        return f"the consumer {name} {what} {reason}{'' if reason.endswith('?') else '.'} Fix: {feed.fix}"

    def warnings(self, names: Iterable[str]) -> list[str]:
        """Return a line for each of these consumers that gets nothing and has no alarm."""
        return [line for name in names if not self.faulty(name) and (line := self.silence(name))]

    def alarms(self) -> list[Alarm]:
        """Return an alarm for each consumer that cannot work as the leader's file describes it."""
        return [Alarm("consumer_refused", "", text, name) for name in self.consumers if (text := self.faulty(name))]


def feed_of(feeds: Feeds | None, name: str) -> dict[str, Any]:
    """Return the JSON members `fed` and `problem` of a consumer of the store.

    Both are null before a bridge has begun for the first time.
    """
    if feeds is None:
        return {"fed": None, "problem": None}
    silence = feeds.silence(name)
    return {"fed": not silence, "problem": silence or feeds.faulty(name) or None}


def load(stored: dict[str, Any] | None) -> Feeds | None:
    """Return the notes that dump() wrote, or None before a bridge has begun for the first time."""
    if stored is None:
        return None
    consumers = {name: Feed(**feed) for name, feed in stored["consumers"].items()}
    return Feeds(stored["epoch"], stored["holder"], stored["file"], consumers, stored.get("unfed"))


def describe(
    epoch: int,
    holder: str,
    file: str,
    stored: Iterable[str],
    in_file: Iterable[str],
    faults: Iterable[Fault],
    unfed: Mapping[str, str] | None = None,
) -> Feeds:
    """Make the notes on each consumer of the store, and on each one that could not be applied.

    The notes on a consumer with several faults have the first one, and the number of the others.
    """
    known = set(in_file)
    consumers = {name: Feed("fed" if name in known else "not_in_file") for name in stored}
    more: Counter[str] = Counter()
    for fault in faults:
        had = consumers.get(fault.consumer)
        if had is None or not had.reason:
            consumers[fault.consumer] = Feed(fault.state, fault.reason, fault.fix)
        else:
            more[fault.consumer] += 1
    for name, count in more.items():
        feed = consumers[name]
        consumers[name] = replace(feed, fix=f"{feed.fix} (`cdcbridge check` shows {count} more)")
    return Feeds(epoch, holder, file, consumers, unfed)


def _unnamed(message: str, name: str) -> str:
    """Return a message without the consumer's name at its beginning."""
    return message.removeprefix(f"consumer {name}: ")
