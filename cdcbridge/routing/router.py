"""Which consumers want which change. Pure; costs by the consumers that match a table, not by those declared."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cdcbridge.changes.events import Relation
from cdcbridge.routing.patterns import is_name, take, taken, whole
from cdcbridge.routing.subscription import Subscription

OPERATIONS: Final = ("insert", "update", "delete", "truncate")
IDENTITY_SCHEMA: Final = "cdcbridge_identity"  # of the event trigger (source.event_trigger); never captured, either


@dataclass(slots=True, frozen=True)
class Route:
    """Who gets one operation of one table: `plain` consumers all alike, `special` ones after a closer look; `streams`
    read the log itself. `limits`: what the `plain` ones take at most, in bytes of `data`.
    """

    plain: tuple[int, ...]
    special: tuple[Subscription, ...]
    streams: tuple[int, ...]
    limits: tuple[tuple[int, int], ...]
    smallest_limit: int


class Router:
    """Plans by relation and operation. `own_schema` is never taken."""

    def __init__(self, subscriptions: Iterable[Subscription], own_schema: str = "cdcbridge") -> None:
        self._own_schema = own_schema
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
        self.patterns = list(dict.fromkeys(pattern for s in subscriptions for pattern in whole(s.tables)))
        self._by_topic: dict[str, list[Subscription]] = {}
        for subscription in subscriptions:
            for topic in dict.fromkeys(subscription.topics):
                self._by_topic.setdefault(topic, []).append(subscription)
        self._plans: dict[tuple[Relation, str], Route | None] = {}

    def subscriptions(self, schema: str, table: str) -> list[Subscription]:
        """All consumers of a table, each once, whatever the operation.

        A schema whose name has a dot has none: the topic of "a.b"."c" would be that of "a"."b.c".
        """
        if schema in (self._own_schema, IDENTITY_SCHEMA) or "." in schema:
            return []
        topic = f"{schema}.{table}"
        found = self._found.get(topic)
        if found is None:
            takers = [s for s in (*self._named.get(topic, ()), *self._wild) if take(s.tables, topic)]
            found = self._found[topic] = sorted(takers, key=lambda s: s.consumer_id)
        return found

    def readers(self, topic: str) -> list[Subscription]:
        """All consumers of a published topic."""
        return self._by_topic.get(topic, [])

    def plan(self, relation: Relation, operation: str) -> Route | None:
        """The plan, or None where nobody wants this operation of this relation."""
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
