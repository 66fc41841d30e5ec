"""The consumers of the file, brought into the store. Part of the rim.

Adds and changes; never removes by itself: a consumer that left the file keeps what waits for it and gets nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from psycopg.types.json import Jsonb

from cdcbridge import backlog
from cdcbridge.config import Consumer
from cdcbridge.database import Connection, store_errors
from cdcbridge.errors import UsageError
from cdcbridge.filters import Filter
from cdcbridge.route import Subscription


@dataclass(slots=True, frozen=True)
class Applied:
    """What apply() did, by consumer name."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    left: tuple[str, ...]


def stored_config(consumer: Consumer) -> dict[str, Any]:
    """The consumer as the store keeps it: durations in seconds, sizes in bytes."""
    dumped = consumer.model_dump(mode="python", exclude={"name", "mode"}, exclude_none=True)
    return orjson.loads(orjson.dumps(dumped))  # type: ignore[no-any-return]


def subscription(consumer_id: int, name: str, mode: str, config: dict[str, Any]) -> Subscription:
    """What routing needs of a consumer as the store keeps it."""
    source, chosen = config.get("filter"), config.get("columns") or {}
    return Subscription(
        consumer_id,
        name,
        tuple(config["tables"]),
        frozenset(config["operations"]),
        Filter(source) if source is not None else None,
        tuple(config["key"]) if config.get("key") else None,
        config["max_message_bytes"],
        mode == "fifo",
        tuple(config.get("topics", ())),
        mode == "stream",
        frozenset([*(config.get("key") or ()), *(name for names in chosen.values() for name in names or ())]),
    )


def dump(subscription: Subscription) -> dict[str, Any]:
    """The subscription as JSON, for a transaction that has to be finished with it."""
    return {
        "consumer_id": subscription.consumer_id,
        "name": subscription.name,
        "tables": list(subscription.tables),
        "operations": sorted(subscription.operations),
        "filter": subscription.filter.source if subscription.filter else None,
        "key": list(subscription.key) if subscription.key else None,
        "max_bytes": subscription.max_bytes,
        "in_order": subscription.in_order,
        "reads_log": subscription.reads_log,
        "topics": list(subscription.topics),
        "columns": sorted(subscription.columns),
    }


def load(entry: dict[str, Any]) -> Subscription:
    """The subscription that dump() wrote."""
    return Subscription(
        entry["consumer_id"],
        entry["name"],
        tuple(entry["tables"]),
        frozenset(entry["operations"]),
        Filter(entry["filter"]) if entry["filter"] else None,
        tuple(entry["key"]) if entry["key"] else None,
        entry["max_bytes"],
        entry.get("in_order", False),
        tuple(entry.get("topics", ())),
        entry.get("reads_log", False),
        frozenset(entry.get("columns", ())),
    )


def apply(connection: Connection, consumers: Sequence[Consumer], *, fence: bool = False) -> Applied:
    """Make the store's consumers those of the file, in one transaction.

    A new one with start: earliest gets what the log holds; with start: now what the bridge reads from here on. A
    changed one is routed anew from the next change; what it has queued already stays as it is. `fence`: a bridge that
    runs with the old ones can append nothing more, and starts again with these.
    """
    with store_errors(), connection.transaction():
        # A bridge's session ends after some seconds of this; filters may take longer over what the log holds.
        connection.execute("set local idle_in_transaction_session_timeout = 0")
        rows = connection.execute("select id, name, mode, config from consumers order by name for update").fetchall()
        known = {name: (consumer_id, mode, config) for consumer_id, name, mode, config in rows}
        added: list[Consumer] = []
        changed = []
        for consumer in consumers:
            config = stored_config(consumer)
            if consumer.role is not None:
                connection.execute("select use_role(%s)", (consumer.role,))
            if consumer.name not in known:
                added.append(consumer)
                continue
            consumer_id, mode, had = known[consumer.name]
            if mode != consumer.mode:
                raise UsageError(
                    f"consumer {consumer.name!r} has mode {mode}; it cannot become {consumer.mode}",
                    hint=f"Give it another name, or remove it first: cdcbridge consumers remove {consumer.name}",
                )
            if had != config:
                connection.execute(
                    "update consumers set config = %s, updated_at = now() where id = %s", (Jsonb(config), consumer_id)
                )
                changed.append(consumer.name)
        if added:
            _add(connection, added)
            connection.execute("select make_dispatch()")
        if fence and (added or changed):
            connection.execute("select take_lead('cdcbridge consumers apply', '1 min')")
    left = sorted(known.keys() - {consumer.name for consumer in consumers})
    return Applied(tuple(consumer.name for consumer in added), tuple(changed), tuple(left))


def subscriptions(connection: Connection, consumers: Sequence[Consumer]) -> list[Subscription]:
    """The applied consumers of the file, for routing."""
    with store_errors():
        rows = connection.execute(
            "select id, name, mode, config from consumers where name = any (%s) order by id",
            ([consumer.name for consumer in consumers],),
        ).fetchall()
    return [subscription(*row) for row in rows]


def all_subscriptions(connection: Connection) -> list[Subscription]:
    """Every consumer of the store, in the file or not."""
    with store_errors():
        rows = connection.execute("select id, name, mode, config from consumers order by id").fetchall()
    return [subscription(*row) for row in rows]


def _add(connection: Connection, added: Sequence[Consumer]) -> None:
    """Make them. What the log holds is given to those with start: earliest while the bridge goes on; then it waits, and
    so do publishers of their topics, until what came meanwhile is given, too, and this commits.
    """
    filled: list[tuple[Subscription, int]] = []
    for consumer in added:
        if consumer.mode != "stream":
            wanted = _make(connection, consumer)
            if consumer.start == "earliest":
                filled.append((wanted, backlog.fill(connection, wanted)))
    connection.execute("select pg_advisory_xact_lock(fence_key())")
    if any(wanted.topics for wanted, _ in filled):
        connection.execute("set local lock_timeout = '10s'")  # a publisher that hangs must not make the bridge wait
        connection.execute("lock table messages in share mode")
    for wanted, reached in filled:
        backlog.fill(connection, wanted, reached + 1)
    for consumer in added:
        if consumer.mode == "stream":  # behind the fence: it makes an index, for which the bridge would have to wait
            _make(connection, consumer)


def _make(connection: Connection, consumer: Consumer) -> Subscription:
    config = stored_config(consumer)
    row = connection.execute(
        "select add_consumer(%s, %s, %s)", (consumer.name, consumer.mode, Jsonb(config))
    ).fetchone()
    return subscription(row[0] if row else 0, consumer.name, consumer.mode, config)
