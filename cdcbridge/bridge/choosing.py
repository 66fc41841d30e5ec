"""Choose which consumers of the file a running bridge continues with.

One consumer that cannot work must not stop the others. A new one waits until it can work. A changed one stays as the
store has it. One that did not change continues without the tables that have become unusable. For example, a file names
a table that does not exist: the bridge feeds all other consumers, and reports the fault. This module reads both
databases, and never changes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from cdcbridge.checks.server import LOCKED, UNUSABLE, publication_problems
from cdcbridge.checks.store import filled_consumers, mode_problems, role_problems
from cdcbridge.checks.tables import consumer_problems
from cdcbridge.config import Config, Consumer
from cdcbridge.database import Connection, store_errors
from cdcbridge.problem import Problem
from cdcbridge.routing.patterns import taken, whole, without
from cdcbridge.source import event_trigger, publications
from cdcbridge.source.publications import Publication
from cdcbridge.source.sessions import snapshot_problems
from cdcbridge.store.consumer_changes import asked_for
from cdcbridge.store.consumers import is_applied
from cdcbridge.store.feed_watch import stored_feeds
from cdcbridge.store.feeds import Fault

_DURATIONS: Final = (("visibility_timeout",), ("retry_delay", "initial"), ("retry_delay", "max"))


@dataclass(slots=True, frozen=True)
class Choice:
    """The consumers to continue with, and their faults.

    Attributes:
        config: The configuration with only these consumers, some of them as the store has them.
        faults: Why consumers cannot work as the file has them.
        problems: The same, in the form that `check` reports.
        left_out: Tables and patterns that cannot be captured, for example `public.orders` without a key.
        refused: Names of consumers that are new or changed in the file, and cannot work as it has them.
    """

    config: Config
    faults: tuple[Fault, ...] = ()
    problems: frozenset[Problem] = frozenset()
    left_out: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()

    @property
    def trouble(self) -> str:
        """A phrase with the names of the consumers that have a fault, for people, or ''."""
        names = sorted({fault.consumer for fault in self.faults})
        return f"but not with the settings of its file for {', '.join(names)}" if names else ""

    @property
    def troubles(self) -> frozenset[tuple[str, str, str]]:
        """Consumer, object and code of each fault, for a comparison with a later look."""
        return frozenset((fault.consumer, fault.object, fault.code) for fault in self.faults)

    @property
    def unidentified(self) -> frozenset[str]:
        """The tables without a replica identity."""
        return frozenset(problem.object for problem in self.problems if problem.code == "replica_identity")


def choose(config: Config, connection: Connection, store: Connection, plugin: str) -> Choice:
    """Choose the consumers to continue with: check each one by itself, and compare it with the store."""
    choosing = _Choosing(config, connection, store, plugin)
    choosing.look()
    if plugin == "pgoutput":
        choosing.publish()
    return Choice(
        choosing.with_consumers(choosing.kept.values()),
        tuple(choosing.faults),
        frozenset(choosing.problems),
        frozenset(choosing.left_out),
        frozenset(choosing.refused),
    )


class _Choosing:
    """The state of the choice while it is made.

    Attributes:
        kept: The consumers to continue with, by name and in the order of the file.
        _fresh: The names of those that are new or changed.
    """

    def __init__(self, config: Config, connection: Connection, store: Connection, plugin: str) -> None:
        self._config = config
        self._connection = connection
        self._store = store
        self._plugin = plugin
        self._filled = filled_consumers(store)
        with store_errors():
            rows = store.execute("select name, mode, config from consumers").fetchall()
        self._stored = {name: (mode, stored) for name, mode, stored in rows}
        self.kept: dict[str, Consumer] = {}
        self._fresh: list[str] = []
        self.faults: list[Fault] = []
        self.problems: set[Problem] = set()
        self.left_out: set[str] = set()
        self.refused: set[str] = set()

    def with_consumers(self, consumers: Iterable[Consumer]) -> Config:
        return self._config.model_copy(update={"consumers": tuple(consumers)})

    def look(self) -> None:
        """Check each consumer by itself."""
        for consumer in self._config.consumers:
            errors = self._errors(consumer)
            mode, stored = self._stored.get(consumer.name, (None, {}))
            applied = mode == consumer.mode and is_applied(consumer, stored)
            if applied:
                self._go_on(consumer, errors)
            elif errors:
                self._refuse(consumer, errors)
            else:
                self.kept[consumer.name] = consumer
                self._fresh.append(consumer.name)

    def publish(self) -> None:
        """Check the publications, which all consumers share, because this role may be unable to alter them."""
        fresh = {name: self.kept[name] for name in self._fresh}
        settled = {name: consumer for name, consumer in self.kept.items() if name not in fresh}
        self._leave_locked(settled)
        self._leave_out(list(settled.values()))
        for name, consumer in fresh.items():
            if locked := self._locked([*settled.values(), consumer]):
                del self.kept[name]
                self._refuse(consumer, [locked[0]])
                self.refused.discard(name)  # it waits for a lock, which is no reason to refuse a start
            elif errors := self._unpublished([*settled.values(), consumer]):
                del self.kept[name]
                self._refuse(consumer, errors)
            else:
                settled[name] = consumer
        order = [consumer.name for consumer in self._config.consumers]
        self.kept = {name: self.kept[name] for name in order if name in self.kept}

    def _leave_locked(self, settled: dict[str, Consumer]) -> None:
        """Leave out tables that a locked publication lacks.

        They cannot be added while another session locks one of the publication's tables. A consumer that was not fed
        before waits as a whole, so that it misses nothing between its start and its first change. A consumer that was
        fed continues without these tables.
        """
        feeds = stored_feeds(self._store)
        for problem, lacking in self._locked_tables(list(settled.values())):
            for name, consumer in list(settled.items()):
                if not lacking & set(whole(consumer.tables)):
                    continue
                feed = feeds.of(name) if feeds else None
                fed = feed is not None and feed.state in ("fed", "as_before")
                self._note(consumer, [problem], fed=fed)
                if fed:
                    self.left_out |= lacking
                else:
                    del self.kept[name], settled[name]

    def _locked(self, consumers: Sequence[Consumer]) -> list[Problem]:
        return [problem for problem, _ in self._locked_tables(consumers)]

    def _locked_tables(self, consumers: Sequence[Consumer]) -> list[tuple[Problem, set[str]]]:
        """Return the problem of each locked publication, with the patterns that cannot be added to it now."""
        config = self._with_published(consumers)
        problems = publication_problems(config, self._connection) if config.consumers else ()
        locked = {problem.object: problem for problem in problems if problem.code == LOCKED}
        found = []
        for wanted in publications.needed(config, self._connection) if locked else ():
            if wanted.name in locked:
                existing = publications.publication(self._connection, wanted.name)
                found.append((locked[wanted.name], _lacking(wanted, existing)))
        return found

    def _leave_out(self, settled: Sequence[Consumer]) -> None:
        """Leave out tables that a publication has lost, and note a fault for their consumers."""
        for all_of_it in (False, True):  # first the tables that it lacks, then all if it lacks operations
            errors = {problem.object: problem for problem in self._unpublished(settled)}
            for wanted in publications.needed(self._with_published(settled), self._connection) if errors else ():
                error = errors.get(wanted.name)
                if error is None:
                    continue
                existing = None if all_of_it else publications.publication(self._connection, wanted.name)
                lacking = _lacking(wanted, existing)
                self.left_out |= lacking
                for consumer in settled:
                    if lacking & set(whole(consumer.tables)):
                        self._note(consumer, [error], fed=True)

    def _with_published(self, consumers: Sequence[Consumer]) -> Config:
        """Return a configuration with these consumers, less their tables that cannot be captured."""
        kept = [
            consumer.model_copy(update={"tables": without(consumer.tables, self.left_out)}) for consumer in consumers
        ]
        return self.with_consumers(consumer for consumer in kept if taken(consumer.tables))

    def _unpublished(self, consumers: Sequence[Consumer]) -> list[Problem]:
        config = self._with_published(consumers)
        found = publication_problems(config, self._connection) if config.consumers else ()
        return [problem for problem in found if problem.severity == "error"]

    def _errors(self, consumer: Consumer) -> list[Problem]:
        alone = self.with_consumers([consumer])
        found = [
            *consumer_problems(self._config, self._connection, consumer, self._plugin),
            *event_trigger.problems(alone, self._connection, self._plugin),
            *role_problems(alone, self._store),
            *mode_problems(alone, self._store),
            *snapshot_problems(alone, self._connection, self._filled),
        ]
        return [problem for problem in found if problem.severity == "error"]

    def _go_on(self, consumer: Consumer, errors: Sequence[Problem]) -> None:
        self.kept[consumer.name] = consumer
        self.left_out |= {problem.object for problem in errors if problem.code in UNUSABLE}
        self._note(consumer, errors, fed=True)

    def _refuse(self, consumer: Consumer, errors: Sequence[Problem]) -> None:
        """Refuse a consumer as the file has it.

        A new one waits. A changed one continues as the store has it, even if these older settings have faults, too.
        """
        self.refused.add(consumer.name)
        before = self._before(consumer.name)
        asked = "" if before is None else asked_for(before, consumer)
        self._note(consumer, errors, fed=before is not None, asked=asked)
        if before is not None:
            self._go_on(before, self._errors(before))

    def _before(self, name: str) -> Consumer | None:
        if name not in self._stored:
            return None
        mode, stored = self._stored[name]
        try:
            return Consumer.model_validate({"name": name, "mode": mode, **_as_in_a_file(stored)})
        except ValidationError:
            return None  # stored by another version of this program

    def _note(self, consumer: Consumer, errors: Iterable[Problem], *, fed: bool, asked: str = "") -> None:
        for problem in errors:
            self.problems.add(problem)
            message = problem.message
            if fed and not asked and problem.code == "replica_identity":
                message = f"{message}. {self._meanwhile(consumer, problem.object)}"
            self.faults.append(Fault(consumer.name, problem.object, message, problem.brief, fed, asked, problem.code))

    def _meanwhile(self, consumer: Consumer, table: str) -> str:
        """Describe how a missing replica identity affects the application and the consumers."""
        if self._plugin == "wal2json":
            return "Its updates and deletes are missing until that is fixed, and gap messages report the ranges"
        if table in whole(consumer.tables):
            return (
                "The bridge leaves it out of the publication until that is fixed, and a gap message reports that later"
            )
        return "PostgreSQL refuses the application's UPDATE and DELETE of it until that is fixed"


def _lacking(wanted: Publication, existing: Publication | None) -> set[str]:
    """Return the wanted patterns that the publication does not publish whole.

    Return all of them if there is no publication.
    """
    everything = {"*.*"} if wanted.everything else set()
    patterns = set(wanted.tables) | {f"{schema}.*" for schema in wanted.schemas} | everything
    if existing is None:
        return patterns
    cut = existing.filtered | existing.column_lists
    had = {table for table in wanted.tables if existing.takes(table) and table not in cut}
    had |= {f"{schema}.*" for schema in wanted.schemas if existing.everything or schema in existing.schemas}
    return patterns - had - (everything if existing.everything else set())


def _as_in_a_file(stored: dict[str, Any]) -> dict[str, Any]:
    """Convert durations from seconds, as the store keeps them, to the units of a file."""
    made = {key: dict(value) if isinstance(value, dict) else value for key, value in stored.items()}
    for *parents, last in _DURATIONS:
        place = made
        for parent in parents:
            place = place.get(parent, {})
        if last in place:
            place[last] = f"{place[last]:.6f}s"
    return made
