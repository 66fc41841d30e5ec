"""Before a session streams: everything compared, checked and made, in the right order. Part of the rim.

Histories first, then the same checks as `cdcbridge check`, the consumers, the publication, the slot. Makes no choice
that could lose a change: where store and slot do not fit together it says from where to where, and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from cdcbridge import consumers, event_trigger, plugins, publications, source
from cdcbridge.check import SLOT_GONE, problems
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, store_errors
from cdcbridge.errors import OperatorNeeded, SourceUnavailable
from cdcbridge.filters import Filter
from cdcbridge.gap import leave_gap
from cdcbridge.initial import copy_tables
from cdcbridge.lsn import format_lsn
from cdcbridge.problem import refuse
from cdcbridge.replication import ReplicationStream, UnknownOption
from cdcbridge.route import Router, Subscription
from cdcbridge.store import History, Store, Tail
from cdcbridge.tables import find_tables

_NUMBERS_AS_TEXT: Final = "numeric-data-types-as-string"
log = structlog.get_logger()


@dataclass(slots=True)
class Ready:
    """What a streaming session goes by. `finishing`: only until the transaction that was begun is complete."""

    plugin: str
    tail: Tail
    options: dict[str, str]
    subscriptions: list[Subscription]
    own_schema: str
    finishing: bool
    wal_sender_timeout: float
    partitions: int
    timeline_on_standby: int | None = None  # None: the source is no standby
    router: Router = field(init=False)

    def __post_init__(self) -> None:
        self.router = Router(self.subscriptions, self.own_schema)

    @property
    def resume_options(self) -> dict[str, Any]:
        """What an open transaction must be finished with, if this session ends in its middle."""
        return {"options": self.options, "subscriptions": [_dump(s) for s in self.subscriptions]}

    def start(self, stream: ReplicationStream, slot: str) -> None:
        """START_REPLICATION; without numeric-data-types-as-string where wal2json is too old for it."""
        try:
            stream.start(slot, self.tail.end_lsn, self.options)
        except UnknownOption as error:
            if self.options.pop(_NUMBERS_AS_TEXT, None) is None:
                raise OperatorNeeded(f"source: {error}") from error
            stream.start(slot, self.tail.end_lsn, self.options)


def prepare(
    config: Config,
    store: Store,
    stream: ReplicationStream,
    *,
    consistent: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    whole: bool = False,
) -> Ready:
    """Compare, check and make. Raises OperatorNeeded, CheckFailed, or what a lost connection raises.

    `consistent`: where this makes the slot, consumers with start: snapshot are filled from the slot's own snapshot
    before anything is streamed. `whole`: let the server send no transaction before it has committed.
    """
    with connect_source(config.source_dsn, "cdcbridge setup") as connection:
        # First: one that is promoted after this is taken for a standby still, and looked at before each append.
        on_standby = source.in_recovery(connection)
        identity = stream.identify()
        history = store.history()
        if history is not None:
            compare_history(history, identity[0], identity[3], config.source.slot)
        _refuse_lost(config.source.slot, source.slots(connection, config.source.slot), history)
        plugin = _plugin(config, connection, history)
        refuse(problems(config, connection, store.connection, plugin=plugin))
        if store.tail().unfinished is None:
            # Else a new consumer would get the first part of the open transaction, and not the rest of it.
            store.set_partitions(config.store.partitions)
            applied = consumers.apply(store.connection, config.consumers)
            _begin_snapshots(config, connection, store.connection)
            _forget_beginnings(store.connection, config, applied.changed)
            if applied.added or applied.changed or applied.left:
                log.info("consumers.applied", added=applied.added, changed=applied.changed, not_in_file=applied.left)
        installed = event_trigger.ensure(config, connection)  # before a publication makes the first UPDATE fail
        names = _publish(config, connection) if plugin == "pgoutput" else []
        exported: str | None = None
        if consistent and not source.slots(connection, config.source.slot):
            slot_lsn, exported = _slot_with_snapshot(config, connection, stream, plugin)
        else:
            slot_lsn = _slot(config, connection, plugin)
        if installed:
            event_trigger.mend(connection)  # the slot has waited for the transactions that were older
        _keep_in_step(config, connection, stream)
        wal_end = source.current_lsn(connection)
    if history is None:
        system_identifier, timeline, _, database = identity
        store.begin_history(History(system_identifier, timeline, database, config.source.slot, plugin), slot_lsn)
        if exported is not None:
            # The snapshot is good until the stream's session gets its next command.
            router = Router(consumers.subscriptions(store.connection, config.consumers), config.store.schema_)
            copy_tables(config, store, router, exported, slot_lsn, stopped)
    elif history.timeline != identity[1]:
        _follow_timeline(store, stream, history, identity[1], slot_lsn)
    tail = store.tail()
    _compare_ends(config.source.slot, tail.end_lsn, slot_lsn, wal_end, on_standby=on_standby)
    ready = _ready(config, store, tail, plugin, names, stream.sender_timeout)
    if whole:
        ready.options = without_streaming(ready.options)
    ready.timeline_on_standby = identity[1] if on_standby else None
    return ready


def _begin_snapshots(config: Config, connection: Connection, store: Connection) -> None:
    """A backfill of each table of consumers with start: snapshot, the first time that a bridge meets them."""
    with store_errors():
        new = [n for (n,) in store.execute("select name from consumers where snapshot_at is null").fetchall()]
    for consumer in config.consumers:
        if consumer.start != "snapshot" or consumer.name not in new:
            continue
        found = [t for p in consumer.tables for t in find_tables(connection, p, config.store.schema_)]
        with store_errors(), store.transaction():
            for topic in sorted({table.topic for table in found}):
                store.execute(
                    "select start_backfill(%s, %s, after_seq => coalesce(pg_sequence_last_value('messages_seq'), 0))",
                    (consumer.name, topic),
                )
            store.execute("update consumers set snapshot_at = moment() where name = %s", (consumer.name,))


def _forget_beginnings(store: Connection, config: Config, changed: Sequence[str]) -> None:
    """Backfills leave rows out that came as changes; not where the consumer was not there for them, or took others."""
    kept = [consumer.name for consumer in config.consumers if consumer.name not in changed]
    with store_errors():
        store.execute("select forget_beginnings(array(select id from consumers where name = any (%s)))", (kept,))


def _publish(config: Config, connection: Connection) -> list[str]:
    """Publications in step with the consumers; the names to stream."""
    wanted = publications.needed(config, connection)
    if not source.slots(connection, config.source.slot):
        publications.create_spare_publication(connection, config.source.publication)
    for statement in publications.ensure_publications(connection, wanted):
        log.info("publication.changed", sql=statement)
    names = [publication.name for publication in wanted]
    spare = f"{config.source.publication}_inserts"
    if spare not in names and publications.publication(connection, spare) is not None:
        names.append(spare)
    return names


def _compare_ends(slot: str, stored: int, slot_lsn: int, wal_end: int, *, on_standby: bool) -> None:
    """Raises OperatorNeeded where the slot begins behind the store's end, or the source's WAL ends before it."""
    if stored > wal_end and on_standby:
        raise SourceUnavailable(
            f"source: the standby has replayed up to {format_lsn(wal_end)}, and the store ends at {format_lsn(stored)}"
        )
    if stored > wal_end:
        raise OperatorNeeded(
            f"the store ends at {format_lsn(stored)}, but the source's WAL at {format_lsn(wal_end)}: the source"
            " was set back (restored), and new commits would be taken for ones that are known",
            hint="Use a new store.schema for the source's new history.",
        )
    if slot_lsn > stored:
        raise OperatorNeeded(
            f"the slot {slot!r} has confirmed {format_lsn(slot_lsn)}, but the store ends at"
            f" {format_lsn(stored)}: what lies between is gone (the slot was recreated or advanced, or the store"
            " was restored)",
            hint=f"`cdcbridge slot skip --to {format_lsn(slot_lsn)}` goes on behind a gap message.",
        )


def refuse_other_source(config: Config, store: Store) -> None:
    """What can be told without the lead: raises OperatorNeeded where the store goes by another source, so that a
    stand-by says so before it is needed. Raises SourceUnavailable where the source is out of reach.
    """
    with connect_source(config.source_dsn, "cdcbridge setup") as connection:
        history = store.history()
        if history is not None:
            compare_history(history, *source.identify(connection), config.source.slot)


def compare_history(history: History, system_identifier: str, database: str, slot: str) -> None:
    """Raises OperatorNeeded where the store holds another source's changes."""
    for what, stored, found in (
        ("system identifier", history.system_identifier, system_identifier),
        ("database", history.database, database),
        ("slot", history.slot, slot),
    ):
        if stored != found:
            raise OperatorNeeded(
                f"this store holds the changes of another source: its {what} is {stored!r}, the source's is {found!r}",
                hint=f"Set source.slot back to {stored}, or store.schema to another name."
                if what == "slot"
                else "One store schema serves one source: set store.schema to another name, or mend source.dsn.",
            )


def _plugin(config: Config, connection: Connection, history: History | None) -> str:
    if history is not None and config.source.plugin == "auto":
        return history.plugin
    chosen = plugins.choose(
        connection,
        config.source.plugin,
        config.source.slot,
        wal2json=lambda: bool(plugins.supports_numbers_as_text(config.source_dsn)),
    )
    if history is not None and chosen != history.plugin:
        raise OperatorNeeded(
            f"the store's changes were decoded by {history.plugin}, and source.plugin is {chosen}: positions of one are"
            " not those of the other",
            hint=f"Set source.plugin back to {history.plugin}.",
        )
    return chosen


def _refuse_lost(name: str, found: list[source.Slot], history: History | None) -> None:
    if history is not None and not found:
        raise OperatorNeeded(
            f"{name}: {SLOT_GONE}",
            hint="`cdcbridge slot recreate` makes it anew and goes on behind a gap message.",
        )
    for slot in found:
        if slot.wal_status == "lost":
            raise OperatorNeeded(
                f"the slot {slot.name!r} is lost ({slot.invalidation or 'its WAL was removed'}): changes after"
                f" {format_lsn(slot.confirmed_flush_lsn or 0)} are gone",
                hint="`cdcbridge slot recreate` makes it anew and goes on behind a gap message.",
            )


def _slot(config: Config, connection: Connection, plugin: str) -> int:
    """The slot's confirmed position; created where this is the first start."""
    name = config.source.slot
    found = source.slots(connection, name)
    if found:
        return found[0].confirmed_flush_lsn or 0
    log.info("slot.creating", slot=name, plugin=plugin)
    lsn = source.create_slot(
        config.source_dsn,
        name,
        plugin,
        failover=config.source.failover is not False,
        waiting=lambda pids: log.info("slot.waiting", slot=name, waits_for=pids),
    )
    log.info("slot.created", slot=name, plugin=plugin, lsn=format_lsn(lsn))
    return lsn


def _keep_in_step(config: Config, connection: Connection, stream: ReplicationStream) -> None:
    """An older slot becomes a failover slot, or the other way round, as source.failover has it (PostgreSQL 17+)."""
    wanted = source.may_fail_over(connection) and config.source.failover is not False
    for slot in source.slots(connection, config.source.slot):
        if slot.failover is not None and slot.failover != wanted and not source.in_recovery(connection):
            stream.set_failover(slot.name, wanted)
            log.info("slot.failover", slot=slot.name, failover=wanted)


def _slot_with_snapshot(
    config: Config, connection: Connection, stream: ReplicationStream, plugin: str
) -> tuple[int, str]:
    name = config.source.slot
    log.info("slot.creating", slot=name, plugin=plugin, snapshot="exported")
    telling = source.watch_creation(
        config.source_dsn, stream.pid, lambda pids: log.info("slot.waiting", slot=name, waits_for=pids)
    )
    with telling:
        failover = config.source.failover is not False and source.may_fail_over(connection)
        lsn, exported = stream.create_slot(name, plugin, failover=failover)
    log.info("slot.created", slot=name, plugin=plugin, lsn=format_lsn(lsn), snapshot=exported)
    return lsn, exported


def _follow_timeline(store: Store, stream: ReplicationStream, history: History, timeline: int, slot_lsn: int) -> None:
    """The source was promoted, or follows one that was. What the store has from behind the branch is of a history that
    the source has left: a gap message says so, and things go on from the branch, where nothing is known yet.

    Raises OperatorNeeded where there is no branch.
    """
    tail = store.tail()
    # Of a transaction that has been appended in part, the store knows changes behind its end.
    known = tail.end_lsn if tail.unfinished is None else max(tail.end_lsn, tail.position.commit_lsn + 1)
    branch = stream.branch(history.timeline, timeline)
    if branch is None:
        raise OperatorNeeded(
            f"the source is on timeline {timeline}, which does not come from timeline {history.timeline}; the store"
            f" holds changes up to {format_lsn(known)} of that one",
            hint="It is another history: use a new store.schema for it.",
        )
    # A slot that was kept in step is never confirmed behind the branch: one that is has been read on the new timeline.
    if branch < known and slot_lsn <= branch:
        start = min(branch, tail.end_lsn)
        leave_gap(store, start, known, go_on=start, timeline=timeline)
    store.set_timeline(timeline)
    where = {"branch": format_lsn(branch), "store_end": format_lsn(tail.end_lsn)}
    log.warning("source.timeline", old=history.timeline, new=timeline, **where)


def _ready(
    config: Config, store: Store, tail: Tail, plugin: str, publications: list[str], wal_sender_timeout: float
) -> Ready:
    own_schema, partitions = config.store.schema_, store.partitions()
    if tail.unfinished is not None:
        # Ordinals count what the plugin sent, so the rest must be sent, and routed, as the beginning was.
        begun = [_load(entry) for entry in tail.unfinished["subscriptions"]]
        existing = {s.consumer_id for s in consumers.all_subscriptions(store.connection)}
        kept = [s for s in begun if s.consumer_id in existing]
        log.info("bridge.finishing", position=str(tail.position))
        return Ready(plugin, tail, tail.unfinished["options"], kept, own_schema, True, wal_sender_timeout, partitions)
    wanted = consumers.subscriptions(store.connection, config.consumers)
    options = plugin_options(plugin, publications, own_schema)
    return Ready(plugin, tail, options, wanted, own_schema, False, wal_sender_timeout, partitions)


def without_streaming(options: dict[str, str]) -> dict[str, str]:
    """The same, but that transactions are sent when they have committed. The ordinals are the same either way."""
    kept = {name: value for name, value in options.items() if name != "streaming"}
    return {**kept, "proto_version": "1"} if "proto_version" in kept else kept


def plugin_options(plugin: str, publications: list[str], own_schema: str) -> dict[str, str]:
    """The options that the bridge gives the plugin at START_REPLICATION."""
    if plugin == "pgoutput":
        names = ",".join(f'"{name}"' for name in publications)
        return {"proto_version": "2", "streaming": "on", "publication_names": names, "messages": "true"}
    return {
        "format-version": "2",
        "include-xids": "1",
        "include-timestamp": "1",
        "include-lsn": "1",
        "include-types": "0",
        "include-type-oids": "1",
        "filter-tables": f"{own_schema}.*",
        _NUMBERS_AS_TEXT: "1",
    }


def _dump(subscription: Subscription) -> dict[str, Any]:
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
    }


def _load(entry: dict[str, Any]) -> Subscription:
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
    )
