"""What an operator does to the slot: create, drop, recreate, skip. Part of the rim.

Whatever leaves changes behind writes a gap message into the log, for every consumer, in the same commit that moves
the position. Refuses while a bridge leads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import orjson
import structlog

from cdcbridge import consumers, plugins, source
from cdcbridge.batch import Batch
from cdcbridge.check import problems, refuse
from cdcbridge.config import Config
from cdcbridge.database import connect_source, source_errors, store_errors
from cdcbridge.encode import GAP_TOPIC, message_row, shared_part
from cdcbridge.errors import NotLeader, OperatorNeeded, UsageError
from cdcbridge.lag import stored_slot
from cdcbridge.lsn import format_lsn
from cdcbridge.position import Position
from cdcbridge.replication import ReplicationStream, postgres_now
from cdcbridge.setup import compare_history
from cdcbridge.store import History, Store

log = structlog.get_logger()


def create_slot(config: Config, say: Callable[[str], None]) -> tuple[int, str]:
    """Publications, then the slot; (its position, its plugin). Raises UsageError where it exists."""
    name = config.source.slot
    with connect_source(config.source_dsn, "cdcbridge cli") as connection:
        if source.slots(connection, name):
            raise UsageError(f"the slot {name!r} exists already", hint="`cdcbridge slot list` shows it.")
        if stored_slot(config) is not None:
            raise OperatorNeeded(
                "the store knows a slot already, and a new one would not have what was committed since",
                hint="`cdcbridge slot recreate` makes it anew and goes on behind a gap message.",
            )
        plugin = plugins.choose(
            connection,
            config.source.plugin,
            name,
            wal2json=lambda: bool(plugins.supports_numbers_as_text(config.source_dsn)),
        )
        refuse(problems(config, connection, None, plugin=plugin))
        if plugin == "pgoutput":
            source.create_spare_publication(connection, config.source.publication)
            wanted = source.wanted_publications(config.source.publication, config.consumers)
            source.ensure_publications(connection, wanted)
    return source.create_slot(config.source_dsn, name, plugin, waiting=lambda pids: say(f"waiting for {pids}")), plugin


def drop_slot(config: Config) -> None:
    """Drop the slot. Raises UsageError where there is none, SourceUnavailable while it is in use."""
    name = config.source.slot
    with connect_source(config.source_dsn, "cdcbridge cli") as connection:
        if not source.slots(connection, name):
            raise UsageError(f"there is no slot {name!r}")
        with source_errors():
            connection.execute("select pg_drop_replication_slot(%s)", (name,))


def recreate_slot(config: Config, say: Callable[[str], None]) -> tuple[int, int]:
    """A fresh slot of the store's plugin behind a gap message; the gap (from, to)."""
    with _alone(config) as store:
        history = store.history()
        if history is None:
            raise UsageError(
                "the store has no history yet: there is nothing to go on from", hint="`cdcbridge run` starts it."
            )
        timeline = _same_source(config, history)
        with connect_source(config.source_dsn, "cdcbridge cli") as connection:
            exists = bool(source.slots(connection, config.source.slot))
        if exists:
            drop_slot(config)
        lsn = source.create_slot(
            config.source_dsn, config.source.slot, history.plugin, waiting=lambda pids: say(f"waiting for {pids}")
        )
        gap = _leave_gap(store, lsn)
        store.set_timeline(timeline)  # what lies before the gap may be of an older one
        return gap


def skip(config: Config, target: int) -> tuple[int, int]:
    """Go on from `target`; the gap (from, to). Raises UsageError where that lies behind the store's end, or ahead of
    the server's WAL.
    """
    with _alone(config) as store:
        history = store.history()
        if history is not None:
            _same_source(config, history)
        end = store.tail().end_lsn
        if target <= end:
            raise UsageError(f"the store ends at {format_lsn(end)}: {format_lsn(target)} is not ahead of it")
        with connect_source(config.source_dsn, "cdcbridge cli") as connection:
            current = source.current_lsn(connection)
        if target > current:
            raise UsageError(f"the source's WAL ends at {format_lsn(current)}: {format_lsn(target)} is beyond it")
        return _leave_gap(store, target)


def _same_source(config: Config, history: History) -> int:
    """The source's timeline. Raises OperatorNeeded where it is not the one that the store holds the changes of."""
    stream = ReplicationStream(config.source_dsn, lambda _notice: None)
    try:
        identity = stream.identify()
    finally:
        stream.close()
    compare_history(history, identity, config.source.slot)
    return identity[1]


@contextmanager
def _alone(config: Config) -> Iterator[Store]:
    """The store, led by us. Raises NotLeader while a bridge leads."""
    store = Store(config.store_dsn, config.store.schema_)
    try:
        store.migrate()
        if not store.try_lead():
            raise NotLeader(f"a bridge is running: {store.leader()}", hint="Stop it first.")
        store.begin_epoch()
        yield store
    finally:
        store.close()


def _leave_gap(store: Store, target: int) -> tuple[int, int]:
    """One message to every consumer, and the position behind the gap, in one commit."""
    start = store.tail().end_lsn
    gap: dict[str, object] = {
        "op": "gap",
        "record": {"from": format_lsn(start), "to": format_lsn(target)},
        "old": None,
        "unchanged": [],
    }
    # It stands where the gap ends, before whatever commits there: ordinal -1 is nobody else's.
    row = message_row(-1, None, 0, orjson.dumps(gap), shared_part(GAP_TOPIC, target, 0, postgres_now()))
    subscriptions = consumers.all_subscriptions(store.connection)
    everyone = tuple(s.consumer_id for s in subscriptions if not s.reads_log)
    store.append(
        Batch(
            rows=[row],
            keys=[None],
            in_order=frozenset(s.consumer_id for s in subscriptions if s.in_order),
            groups={everyone: [0]} if everyone else {},
            streams={s.consumer_id for s in subscriptions if s.reads_log},
            position=Position(target, -1),
            end_lsn=target,
        ),
        None,
    )
    with store_errors():
        store.connection.execute("select forget_beginnings('{}')")  # what a gap swallowed did not come as a change
    log.warning("slot.gap", start=format_lsn(start), end=format_lsn(target))
    return start, target
