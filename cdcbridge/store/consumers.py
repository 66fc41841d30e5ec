"""Apply the consumers of the configuration file to the store, and remove consumers from it.

Consumers are added and changed while the bridge and publishers continue. apply() never removes a consumer. One that is
no longer in the file keeps its waiting messages and gets no new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from psycopg.types.json import Jsonb

from cdcbridge.config import Consumer
from cdcbridge.database import Connection, store_errors
from cdcbridge.database.patience import LOCK_TIMEOUT, patiently
from cdcbridge.errors import UsageError
from cdcbridge.routing.subscription import Subscription
from cdcbridge.store.feeds import load as load_feeds
from cdcbridge.store.replay import Filling

_ROUNDS: Final = 4  # rounds of filling, before the bridge has to wait for the rest, however much that is
_MOST_BEHIND: Final = 10_000  # seqs; if more are left, another round follows instead
# A consumer that once had on_leave: delete keeps this setting, so that receive() looks for the deletes that are left.
_ONCE: Final = ("on_leave", "none")


@dataclass(slots=True, frozen=True)
class Applied:
    """The names of the consumers that apply() added, that it changed, and that are not in the file any more."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    left: tuple[str, ...]


def stored_config(consumer: Consumer) -> dict[str, Any]:
    """Return the consumer's settings in the form that the store keeps: durations in seconds, sizes in bytes."""
    dumped = consumer.model_dump(mode="python", exclude={"name", "mode"}, exclude_none=True)
    if consumer.on_leave == "none":
        del dumped["on_leave"]  # not in a store that an older version filled, which is no change
    return orjson.loads(orjson.dumps(dumped, default=str))  # type: ignore[no-any-return]  # secrets as asterisks


def is_applied(consumer: Consumer, stored: dict[str, Any]) -> bool:
    """Return whether the consumer's settings in the store equal those in the file."""
    return {key: value for key, value in stored.items() if (key, value) != _ONCE} == stored_config(consumer)


def mode_conflict(consumer: Consumer, mode: str) -> tuple[str, str]:
    """Return the message and the hint for a consumer that has another mode in the store than in the file."""
    return (
        f"consumer {consumer.name!r} has mode {mode}, which cannot become {consumer.mode}",
        f"Give it another name, or remove it first: cdcbridge consumers remove {consumer.name}",
    )


def apply(
    connection: Connection, consumers: Sequence[Consumer], *, fence: bool = False, patience: float | None = None
) -> Applied:
    """Add and change the store's consumers so that they equal those of the file, in one transaction.

    A new consumer with `start: earliest` first gets the messages that the log holds. One with `start: now` gets only
    the changes that the bridge reads from now on. A changed consumer is routed by its new settings from the next change
    on, and its queued messages stay as they are.

    Args:
        connection: A session on the store.
        consumers: The consumers of the file.
        fence: Begin a new epoch. Then a bridge that runs with the old consumers can append nothing more, and starts
            again with the new ones.
        patience: Seconds to wait for a lock that another session holds.

    Raises:
        UsageError: A consumer has another mode in the store.
        LockedOut: Another session held a lock for longer than `patience`.
    """
    with store_errors():
        _index_segments(connection, consumers, patience)
        return patiently(
            connection,
            lambda: _apply(connection, consumers, fence=fence, patience=patience),
            what="consumers apply",
            again="cdcbridge consumers apply",
            patience=patience,
        )


def _apply(connection: Connection, consumers: Sequence[Consumer], *, fence: bool, patience: float | None) -> Applied:
    # The server ends a bridge's session that idles in a transaction for some seconds. Filtering may take longer.
    connection.execute("set local idle_in_transaction_session_timeout = 0")
    connection.execute("select lock_consumers()")
    rows = connection.execute("select id, name, mode, config from consumers order by name").fetchall()
    known = {name: (consumer_id, mode, config) for consumer_id, name, mode, config in rows}
    added: list[Consumer] = []
    changed: dict[int, Consumer] = {}
    for consumer in consumers:
        if consumer.role is not None:
            connection.execute("select use_role(%s)", (consumer.role,))
        if consumer.name not in known:
            added.append(consumer)
            continue
        consumer_id, mode, had = known[consumer.name]
        if mode != consumer.mode:
            message, hint = mode_conflict(consumer, mode)
            raise UsageError(message, hint=hint)
        if not is_applied(consumer, had):
            changed[consumer_id] = consumer
    left = sorted(known.keys() - {consumer.name for consumer in consumers})
    if added or changed:
        _change(connection, added, changed, fence=fence, patience=patience)
    else:
        connection.execute("select mend_consumer_change()")
        if fence and _fed_otherwise(connection, consumers, left):
            connection.execute("select take_lead('cdcbridge consumers apply', '1 min')")
    return Applied(tuple(c.name for c in added), tuple(c.name for c in changed.values()), tuple(left))


def _fed_otherwise(connection: Connection, consumers: Sequence[Consumer], left: Sequence[str]) -> bool:
    """Return whether the leader, by its notes, does not feed the file's consumers properly, or feeds one of `left`."""
    row = connection.execute("select feeds from source").fetchone()
    feeds = load_feeds(row[0]) if row else None
    if feeds is None:
        return False
    return any(feeds.mark(consumer.name) for consumer in consumers) or any(not feeds.silence(name) for name in left)


def subscriptions(connection: Connection, consumers: Sequence[Consumer]) -> list[Subscription]:
    """Return the subscriptions of the file's consumers that are in the store, for routing."""
    with store_errors():
        rows = connection.execute(
            "select id, name, mode, config from consumers where name = any (%s) order by id",
            ([consumer.name for consumer in consumers],),
        ).fetchall()
    return [Subscription.from_config(*row) for row in rows]


def all_subscriptions(connection: Connection) -> list[Subscription]:
    """Return the subscriptions of all consumers of the store, whether they are in the file or not."""
    with store_errors():
        rows = connection.execute("select id, name, mode, config from consumers order by id").fetchall()
    return [Subscription.from_config(*row) for row in rows]


class _FarBehind(Exception):
    """The bridge has appended so much meanwhile that it would have to wait too long for the rest."""


def _change(
    connection: Connection,
    added: Sequence[Consumer],
    changed: dict[int, Consumer],
    *,
    fence: bool,
    patience: float | None,
) -> None:
    """Fill new consumers from the log while the bridge appends, then finish while bridge and publishers wait."""
    queues = [(_make(connection, consumer), consumer.start) for consumer in added if consumer.mode != "stream"]
    filled = [Filling(wanted) for wanted, start in queues if start == "earliest"]
    for last in [False] * _ROUNDS + [True]:
        for one in filled:
            one.fill(connection)
        try:
            patiently(
                connection,
                lambda last=last: _finish(connection, added, changed, filled, fence=fence, last=last),  # type: ignore[misc]
                what="consumers apply",
                again="cdcbridge consumers apply",
                patience=patience,
            )
        except _FarBehind:
            continue
        return


def _finish(
    connection: Connection,
    added: Sequence[Consumer],
    changed: dict[int, Consumer],
    filled: Sequence[Filling],
    *,
    fence: bool,
    last: bool,
) -> None:
    """Give the rest of the log to the consumers that are filled, and make all changes visible at once."""
    if added:
        # The bridge frees this lock when its present append ends. That append waits for nothing that we hold here.
        connection.execute("set local lock_timeout = '60s'")
        connection.execute("select pg_advisory_xact_lock(fence_key())")
        connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'".encode())
    if any(one.wanted.topics for one in filled):
        connection.execute("lock table only messages in share mode")
    if not last and any(one.behind(connection) > _MOST_BEHIND for one in filled):
        raise _FarBehind
    for one in filled:
        one.finish(connection)
    for consumer in added:
        if consumer.mode == "stream":  # after the fence: it makes an index, for which the bridge would wait
            _make(connection, consumer)
    if fence:
        connection.execute("select take_lead('cdcbridge consumers apply', '1 min')")
    for consumer_id, consumer in changed.items():
        _change_settings(connection, consumer_id, consumer)
    if added:
        connection.execute("select make_dispatch()")
    connection.execute("select note_consumer_change()")


def _change_settings(connection: Connection, consumer_id: int, consumer: Consumer) -> None:
    connection.execute(
        "update consumers set config = case when config ? 'on_leave' then %s else '{}' end || %s,"
        " updated_at = now() where id = %s",
        (Jsonb(dict([_ONCE])), Jsonb(stored_config(consumer)), consumer_id),
    )
    if consumer.mode == "stream" and consumer.sink is not None:
        connection.execute("select make_dead_letters(%s)", (consumer_id,))


def _make(connection: Connection, consumer: Consumer) -> Subscription:
    config = stored_config(consumer)
    row = connection.execute(
        "select add_consumer(%s, %s, %s)", (consumer.name, consumer.mode, Jsonb(config))
    ).fetchone()
    return Subscription.from_config(row[0] if row else 0, consumer.name, consumer.mode, config)


def _index_segments(connection: Connection, consumers: Sequence[Consumer], patience: float | None) -> None:
    """Index the log before the first stream consumer is added.

    Each segment is indexed in a transaction of its own, so that publishers wait for one segment at a time.
    """
    known = {name for (name,) in connection.execute("select name from consumers").fetchall()}
    if all(consumer.mode != "stream" or consumer.name in known for consumer in consumers):
        return
    made: tuple[Any, ...] | None = (True,)
    while made == (True,):
        made = patiently(
            connection,
            lambda: connection.execute("select create_partition_indexes(true)").fetchone(),
            what="consumers apply",
            again="cdcbridge consumers apply",
            patience=patience,
        )


def remove(connection: Connection, name: str, patience: float | None = None) -> None:
    """Remove the consumer with its queue, deliveries and dead letters.

    A running bridge appends nothing more for it, and starts again.

    Args:
        connection: A session on the store.
        name: The consumer's name.
        patience: Seconds to wait for a lock that another session holds.

    Raises:
        LockedOut: A transaction that uses the consumer stays open. Nothing was removed.
    """

    def work() -> None:
        connection.execute("select lock_consumers()")
        connection.execute("select take_lead('cdcbridge consumers remove', '1 min')")
        connection.execute("select remove_consumer(%s)", (name,))

    with store_errors():
        patiently(
            connection,
            work,
            what=f"consumers remove {name}",
            again=f"cdcbridge consumers remove {name}",
            patience=patience,
        )
