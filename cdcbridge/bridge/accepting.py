"""Accept the consumers that a streaming session continues with: log their faults, and bring them into the store.

The first start of a process refuses a file in which a new or changed consumer cannot work, as `check` does. Later
streaming sessions, and a standby that takes over, continue without that consumer. A consumer that was applied before
never stops the others, for example when its table was dropped overnight. This module reads and writes both databases.
It never chooses the consumers (see choosing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from cdcbridge.bridge.choosing import Choice, choose
from cdcbridge.checks.decision import wanted_plugin
from cdcbridge.checks.facts import Facts
from cdcbridge.checks.server import LOCKED, problems
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, store_errors
from cdcbridge.problem import refuse
from cdcbridge.source import event_trigger
from cdcbridge.source.tables import tables_of
from cdcbridge.store import consumers
from cdcbridge.store.feed_watch import stored_feeds
from cdcbridge.store.log import BridgeStore
from cdcbridge.store.unfed import tell_missed

_PATIENCE: Final = 5.0  # seconds to wait for a lock in the store, after which the streaming session starts again
log = structlog.get_logger()


def accept(config: Config, connection: Connection, store: BridgeStore, facts: Facts, *, again: bool) -> Choice:
    """Choose the consumers to continue with, and log each fault as an error with its fix.

    If the store has a history, a consumer that worked before and cannot work now does not stop the others.

    Args:
        config: The configuration as the file has it.
        connection: A session on the source.
        store: The store.
        facts: The facts of both sides.
        again: Whether this process has streamed or was a standby before. If so, new and changed consumers that cannot
            work do not stop the others, either.

    Returns:
        The consumers to continue with, and the faults.

    Raises:
        CheckFailed: There is any other error.
    """
    found = problems(config, facts, connection, store.connection)
    choice = Choice(config)
    begun = facts.store.history is not None
    if begun and any(problem.severity == "error" or problem.code == LOCKED for problem in found):
        choice = choose(config, connection, store.connection, wanted_plugin(config, facts))
        if choice.refused and not again:
            refuse(found)
        found = problems(choice.config, facts, connection, store.connection)
        # The faults of the tables that a publication lacks already report the problem of the publication.
        found = [p for p in found if p not in choice.problems and p.code != "publication"]
    refuse(found)
    _tell_faults(choice)
    return choice


def _tell_faults(choice: Choice) -> None:
    for fault in choice.faults:
        log.error(
            "consumer.faulty" if fault.fed else "consumer.refused",
            consumer=fault.consumer,
            table=fault.object,
            reason=fault.message,
            fix=fault.fix,
            meanwhile=fault.meanwhile,
            then="the bridge checks again at intervals",
        )


def tell_stand_by(config: Config, store: BridgeStore) -> None:
    """Log why this standby would not feed the consumers as the leader does.

    An operator can then correct the difference before the standby leads.

    Raises:
        SourceUnavailable: The source is out of reach.
    """
    history, feeds = store.facts().history, stored_feeds(store.connection)
    if history is None:
        return
    names = {consumer.name for consumer in config.consumers}
    for name, feed in feeds.consumers.items() if feeds else ():
        if feed.state in ("fed", "as_before") and name not in names:
            log.warning(
                "standby.other_file",
                consumer=name,
                reason=f"the leader feeds {name}, and {config.path} does not contain it: this bridge would not feed"
                " it if it led",
            )
    with connect_source(config.source_dsn, "cdcbridge setup") as connection:
        _tell_faults(choose(config, connection, store.connection, history.plugin))


def apply_consumers(config: Config, connection: Connection, store: BridgeStore) -> None:
    """Bring the consumers of the file into the store, and start the backfills that new ones ask for.

    The settings `partitions` and `max_retention` are stored as well.
    """
    store.set_partitions(config.store.partitions)
    store.set_max_retention(config.store.max_retention)
    applied = consumers.apply(store.connection, config.consumers, patience=_PATIENCE)
    _begin_snapshots(config, connection, store.connection)
    _forget_beginnings(store.connection, config, applied.changed)
    if applied.added or applied.changed or applied.left:
        log.info("consumers.applied", added=applied.added, changed=applied.changed, not_in_file=applied.left)


def _begin_snapshots(config: Config, connection: Connection, store: Connection) -> None:
    """Start a backfill of each table for consumers with `start: snapshot` that no bridge has met before."""
    with store_errors():
        new = [n for (n,) in store.execute("select name from consumers where snapshot_at is null").fetchall()]
    for consumer in config.consumers:
        if consumer.start != "snapshot" or consumer.name not in new:
            continue
        found = tables_of(connection, consumer.tables, config.store.schema_)
        with store_errors(), store.transaction():
            for topic in sorted({table.topic for table in found}):
                store.execute(
                    "select start_backfill(%s, %s, after_seq => coalesce(pg_sequence_last_value('messages_seq'), 0))",
                    (consumer.name, topic),
                )
            store.execute("update consumers set snapshot_at = moment() where name = %s", (consumer.name,))


def _forget_beginnings(store: Connection, config: Config, changed: Sequence[str]) -> None:
    """Let backfills skip no rows for consumers that may have missed changes.

    A backfill skips rows that its consumer already received as changes. That is turned off for consumers that were
    absent from the file, or whose subscription changed: they may have missed some.
    """
    kept = [consumer.name for consumer in config.consumers if consumer.name not in changed]
    with store_errors():
        store.execute("select forget_beginnings(array(select id from consumers where name = any (%s)))", (kept,))


def ensure_trigger(choice: Choice, connection: Connection, store: BridgeStore) -> bool:
    """Install or remove the event trigger that gives tables created later a replica identity.

    Do nothing if the choice already has a fault about the trigger, because this role may not install it. Return whether
    the trigger was installed anew.
    """
    if any(problem.code == "event_trigger" for problem in choice.problems):
        return False
    return event_trigger.ensure(choice.config, connection, store.keep_identities)


def note_feeds(choice: Choice, store: BridgeStore, *, finishing: bool) -> None:
    """Record in the store which consumers are fed, and log each consumer of the store that is not in the file.

    Such a consumer gets nothing. A consumer that is fed again first gets a gap message. A streaming session that only
    finishes a transaction does nothing here. The next one does the work, when it brings the consumers into the store.
    """
    if finishing:
        return
    unfed = tell_missed(store, {consumer.name for consumer in choice.config.consumers})
    feeds = store.set_feeds(choice.config, choice.faults, unfed)
    for name, feed in feeds.consumers.items():
        if feed.state == "not_in_file":
            log.warning("consumers.not_fed", consumer=name, reason=feeds.silence(name))
