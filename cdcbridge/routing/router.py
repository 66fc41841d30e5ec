"""Find the consumers that want a change.

The costs depend on the consumers that match a table, not on all that are declared. The module is pure and never reads
the change itself: `verdict` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cdcbridge.changes.events import Relation
from cdcbridge.routing.patterns import is_name, take, taken, whole
from cdcbridge.routing.subscription import Subscription
from cdcbridge.schemas import both

OPERATIONS: Final = ("insert", "update", "delete", "truncate")
IDENTITY_SCHEMA: Final = "cdcbridge_identity"  # of the event trigger (source.event_trigger); it is never captured


@dataclass(slots=True, frozen=True)
class Route:
    """The consumers that get one operation of one table.

    Attributes:
        plain: The ids of the queue and fifo consumers that take every message as it is.
        special: The queue and fifo consumers that need a verdict on each message, because of a filter or a key of their
            own.
        streams: The ids of the stream consumers, which read the log itself.
        limits: For each plain consumer its id, and the most bytes of `data` that it takes.
        smallest_limit: The least of these limits, in bytes.
    """

    plain: tuple[int, ...]
    special: tuple[Subscription, ...]
    streams: tuple[int, ...]
    limits: tuple[tuple[int, int], ...]
    smallest_limit: int


class Router:
    """The plans of all tables, by relation and operation.

    Tables of the schema `own_schema` and of its internal schema are never taken.
    """

    def __init__(self, subscriptions: Iterable[Subscription], own_schema: str = "cdcbridge") -> None:
        self._own = (*both(own_schema), IDENTITY_SCHEMA)
        self._named: dict[str, list[Subscription]] = {}
        self._wild: list[Subscription] = []
        self._found: dict[str, list[Subscription]] = {}
        subscriptions = tuple(subscriptions)
        self.in_order = frozenset(s.consumer_id for s in subscriptions if s.in_order)
        for subscription in subscriptions:
            if all(map(is_name, taken(subscription.tables))):
                for name in dict.fromkeys(taken(subscription.tables)):
                    self._named.setdefault(name, []).append(subscription)
            else:
                self._wild.append(subscription)
        self.two_way = any(s.two_way for s in subscriptions)
        self.patterns = list(dict.fromkeys(pattern for s in subscriptions for pattern in whole(s.tables)))
        self._by_topic: dict[str, list[Subscription]] = {}
        for subscription in subscriptions:
            for topic in dict.fromkeys(subscription.topics):
                self._by_topic.setdefault(topic, []).append(subscription)
        self._plans: dict[tuple[Relation, str], Route | None] = {}

    def subscriptions(self, schema: str, table: str) -> list[Subscription]:
        """Return all consumers of a table, each once, whichever operations they take.

        A table of a schema with a dot in its name has none: the topic of "a.b"."c" would be that of "a"."b.c".
        """
        if schema in self._own or "." in schema:
            return []
        topic = f"{schema}.{table}"
        found = self._found.get(topic)
        if found is None:
            takers = [s for s in (*self._named.get(topic, ()), *self._wild) if take(s.tables, topic)]
            found = self._found[topic] = sorted(takers, key=lambda s: s.consumer_id)
        return found

    def readers(self, topic: str) -> list[Subscription]:
        """Return all consumers of a published topic."""
        return self._by_topic.get(topic, [])

    def plan(self, relation: Relation, operation: str) -> Route | None:
        """Return the plan, or None if no consumer wants this operation of this relation."""
        try:
            return self._plans[relation, operation]
        except KeyError:
            schema, _, table = relation.topic.partition(".")
            plan = _plan([s for s in self.subscriptions(schema, table) if operation in s.operations])
            self._plans[relation, operation] = plan
            return plan


def _plan(subscriptions: list[Subscription]) -> Route | None:
    if not subscriptions:
        return None
    queues = [s for s in subscriptions if not s.reads_log]
    plain = tuple(s.consumer_id for s in queues if s.plain)
    special = tuple(s for s in queues if not s.plain)
    limits = tuple((s.consumer_id, s.max_bytes) for s in queues if s.plain)
    streams = tuple(s.consumer_id for s in subscriptions if s.reads_log)
    return Route(plain, special, streams, limits, min((limit for _, limit in limits), default=sys.maxsize))
