"""Before a session streams: everything compared, checked and made, in the right order. Part of the rim.

Histories first, then the same checks as `cdcbridge check`, the consumers, the publication, the slot. Makes no choice
that could lose a change: where store and slot do not fit together it says from where to where, and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from cdcbridge.backfill.initial_copy import copy_tables
from cdcbridge.bridge.accepting import accept, ensure_trigger, note_feeds
from cdcbridge.bridge.choosing import Choice
from cdcbridge.bridge.publishing import Publishing, bring_into_step
from cdcbridge.checks.history import compare_ends, compare_history, refuse_lost
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, store_errors
from cdcbridge.errors import IdentityLost, OperatorNeeded, SentTooEarly, SourceUnavailable, Unpublished
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.dropped_changes import Missing, closing
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.source import event_trigger, plugins
from cdcbridge.source import slots as source
from cdcbridge.source.capture import Capture, Watched
from cdcbridge.source.replication import ReplicationStream, UnknownOption
from cdcbridge.source.tables import tables_of
from cdcbridge.store import consumers
from cdcbridge.store.gap import leave_gap
from cdcbridge.store.log import History, Store, Tail

_PATIENCE: Final = 5.0  # seconds for a lock in the store, after which the bridge starts again
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
    choice: Choice  # the consumers that it goes on with
    timeline_on_standby: int | None = None  # None: the source is no standby
    capture: Capture | None = None  # None: the plugin goes by names, or this session finishes a transaction
    watched: Watched | None = None
    left_out: frozenset[str] = frozenset()  # topics that cannot be captured as their consumers want
    missing: Missing = field(default_factory=Missing)  # what wal2json has dropped
    router: Router = field(init=False)

    def __post_init__(self) -> None:
        self.router = Router(self.subscriptions, self.own_schema)

    @property
    def resume_options(self) -> dict[str, Any]:
        """What an open transaction must be finished with, if this session ends in its middle."""
        return {"options": self.options, "subscriptions": [s.dump() for s in self.subscriptions]}

    def start(self, stream: ReplicationStream, slot: str) -> None:
        """START_REPLICATION; without numeric-data-types-as-string where wal2json is too old for it."""
        try:
            stream.start(slot, self.tail.end_lsn, self.options)
        except UnknownOption as error:
            if self.options.pop(plugins.NUMBERS_AS_TEXT, None) is None:
                raise OperatorNeeded(f"source: {error}") from error
            stream.start(slot, self.tail.end_lsn, self.options)


@dataclass(slots=True)
class Learned:
    """What the earlier sessions of this process learned, for the next one.

    again: one of them streamed, or this bridge stood by. A new or changed consumer that cannot work is logged, and does
        not stop the others.
    whole: let the server send no transaction before it has committed.
    stuck: the last one ended before anything was appended.
    unpublished: the WAL at the store's end cannot be decoded, because a publication did not exist when it was written.
    lost: where a table had lost its identity.
    """

    again: bool = False
    whole: bool = False
    stuck: bool = False
    unpublished: bool = False
    lost: str = ""

    def streams(self) -> None:
        """A session begins to stream."""
        self.again, self.stuck, self.unpublished = True, False, False

    def failed(self, error: SourceUnavailable, *, appended: bool) -> None:
        """It ended by this error, with or without having appended something.

        Raises OperatorNeeded where going on without a table did not help.
        """
        if isinstance(error, IdentityLost):
            if self.lost == str(error):
                raise OperatorNeeded(str(error), hint=error.hint) from error
            self.lost = str(error)
        self.unpublished = isinstance(error, Unpublished)
        if isinstance(error, SentTooEarly):
            self.whole = True
            log.warning("stream.whole_transactions", reason=str(error))
        else:
            self.stuck = not appended


def prepare(
    config: Config,
    store: Store,
    stream: ReplicationStream,
    learned: Learned,
    *,
    consistent: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Ready:
    """Compare, check and make. Raises OperatorNeeded, CheckFailed, or what a lost connection raises.

    `consistent`: where this makes the slot, consumers with `start: snapshot` are filled from the slot's own snapshot
    before anything is streamed.
    """
    with connect_source(config.source_dsn, "cdcbridge setup") as connection:
        # First: one that is promoted after this is taken for a standby still, and looked at before each append.
        on_standby = source.in_recovery(connection)
        _, timeline, _, _ = stream.identify()
        identity = source.identify(connection)
        history = _fitting_history(config, connection, store, identity, timeline, on_standby=on_standby)
        plugin = _plugin(config, connection, history)
        choice = accept(config, connection, store, plugin, begun=history is not None, again=learned.again)
        config = choice.config
        # A new consumer would get the second half of a transaction that is to be finished, and not the first.
        finishing = store.tail().unfinished is not None and not learned.unpublished
        if not finishing:
            _apply_consumers(config, connection, store)
        installed = ensure_trigger(choice, connection, store)  # before a publication makes the first UPDATE fail
        published = Publishing([])
        if plugin == "pgoutput":
            published = bring_into_step(config, connection, store.capture() if history else None, choice.left_out)
        slot_lsn, exported = _slot(config, connection, stream if consistent else None, plugin)
        if installed:
            event_trigger.mend(connection)  # the slot has waited for the transactions that were older
        _keep_in_step(config, connection, stream)
        wal_end = source.current_lsn(connection)
    if history is None:
        made = History(
            identity.system_identifier, timeline, identity.database, config.source.slot, plugin, identity.database_oid
        )
        store.begin_history(made, slot_lsn)
        if exported is not None:
            # The snapshot is good until the stream's session gets its next command.
            router = Router(consumers.subscriptions(store.connection, config.consumers), config.store.schema_)
            copy_tables(config, store, router, exported, slot_lsn, stopped)
    elif history.timeline != timeline:
        _follow_timeline(store, stream, history, timeline, slot_lsn)
        finishing = finishing and store.tail().unfinished is not None  # the source may have left the transaction, too
    compare_ends(config.source.slot, store.tail().end_lsn, slot_lsn, wal_end, on_standby=on_standby)
    _tell_losses(store, published, slot_lsn, wal_end, finishing=finishing, unpublished=learned.unpublished)
    missing = _missing(store, choice, plugin, wal_end, finishing=finishing)
    ready = _ready(choice, store, store.tail(), plugin, published.names, stream.sender_timeout)
    ready.capture, ready.left_out, ready.missing = None if finishing else published.capture, choice.left_out, missing
    note_feeds(choice, store, finishing=finishing)
    if learned.whole:
        ready.options = plugins.without_streaming(ready.options)
    ready.timeline_on_standby = timeline if on_standby else None
    return ready


def _fitting_history(
    config: Config, connection: Connection, store: Store, identity: source.Identity, timeline: int, *, on_standby: bool
) -> History | None:
    """The store's history, None before the first start. Raises OperatorNeeded where it does not fit source and slot."""
    name = config.source.slot
    history = store.history()
    if history is not None:
        compare_history(history, identity, name)
        store.set_database(identity.database, identity.database_oid)
    found = source.slots(connection, name)
    refuse_lost(name, found, begun=history is not None)
    if found and history is not None and history.timeline == timeline:
        # Before the checks, which find it too: it is for an operator. On a new timeline the store's end may move.
        stored = store.tail().end_lsn  # before the WAL's end, which moves
        wal_end = source.current_lsn(connection)
        compare_ends(name, stored, found[0].confirmed_flush_lsn or 0, wal_end, on_standby=on_standby)
    return history


def _tell_losses(
    store: Store, published: Publishing, slot_lsn: int, wal_end: int, *, finishing: bool, unpublished: bool
) -> None:
    """Tell every consumer by a gap message what may be missing, and remember what this session begins with.

    Everything up to the slot's confirmed LSN was vouched for. With `unpublished` the WAL up to its present end cannot
    be decoded; otherwise the stream goes on where the log ends, and only changes of what was lost are missing. A
    session that finishes a transaction leaves the message to the next one.
    """
    capture = None if published.capture is None else published.capture.dump()
    if finishing and capture is not None:
        store.set_capture({**capture, "untold": published.losses})
    elif published.losses or unpublished:
        end = store.tail().end_lsn
        reason = "; ".join(published.losses) or "a publication did not exist when these changes were made"
        first = min(slot_lsn, end)
        leave_gap(store, first, wal_end, go_on=wal_end if unpublished else end, reason=reason, capture=capture)
    elif capture is not None:
        store.set_capture(capture)


def _missing(store: Store, choice: Choice, plugin: str, wal_end: int, *, finishing: bool) -> Missing:
    """The gaps of tables without a replica identity. Tell the end of each one whose table has one again, or is gone."""
    missing, end = Missing(store.capture() if plugin == "wal2json" else None), store.tail().end_lsn
    for table in () if finishing else missing.ended(choice.unidentified):
        first = missing.close(table, wal_end).first
        kept, reason = missing.dump(), closing(table)
        leave_gap(store, first, wal_end, go_on=end, reason=reason, capture=kept, table=table)
    return missing


def _apply_consumers(config: Config, connection: Connection, store: Store) -> None:
    """Bring the file's consumers into the store, with the backfills that new ones ask for."""
    store.set_partitions(config.store.partitions)
    store.set_max_retention(config.store.max_retention)
    applied = consumers.apply(store.connection, config.consumers, patience=_PATIENCE)
    _begin_snapshots(config, connection, store.connection)
    _forget_beginnings(store.connection, config, applied.changed)
    if applied.added or applied.changed or applied.left:
        log.info("consumers.applied", added=applied.added, changed=applied.changed, not_in_file=applied.left)


def _begin_snapshots(config: Config, connection: Connection, store: Connection) -> None:
    """A backfill of each table of consumers with start: snapshot, the first time that a bridge meets them."""
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
    """Backfills leave rows out that came as changes; not where the consumer was not there for them, or took others."""
    kept = [consumer.name for consumer in config.consumers if consumer.name not in changed]
    with store_errors():
        store.execute("select forget_beginnings(array(select id from consumers where name = any (%s)))", (kept,))


def refuse_other_source(config: Config, store: Store) -> None:
    """What can be told without the lead: raises OperatorNeeded where the store goes by another source, so that a
    stand-by says so before it is needed. Raises SourceUnavailable where the source is out of reach.
    """
    with connect_source(config.source_dsn, "cdcbridge setup") as connection:
        history = store.history()
        if history is not None:
            compare_history(history, source.identify(connection), config.source.slot)


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
            hint=f"Set source.plugin back to {history.plugin}. The way to {chosen} is a second slot and a second store:"
            ' docs/OPERATIONS.md, "Changing source.plugin".',
        )
    return chosen


def _slot(
    config: Config, connection: Connection, snapshot_from: ReplicationStream | None, plugin: str
) -> tuple[int, str | None]:
    """The slot's confirmed position, created where this is the first start; and the name of its snapshot.

    `snapshot_from`: a stream that makes the slot and exports the snapshot; None: there is no need of one.
    """
    name = config.source.slot
    found = source.slots(connection, name)
    if found:
        return found[0].confirmed_flush_lsn or 0, None
    if snapshot_from is not None:
        return _slot_with_snapshot(config, connection, snapshot_from, plugin)
    log.info("slot.creating", slot=name, plugin=plugin)
    lsn = source.create_slot(
        config.source_dsn,
        name,
        plugin,
        failover=config.source.failover is not False,
        waiting=lambda pids: log.info("slot.waiting", slot=name, waits_for=pids),
    )
    log.info("slot.created", slot=name, plugin=plugin, lsn=format_lsn(lsn))
    return lsn, None


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
    choice: Choice, store: Store, tail: Tail, plugin: str, publications: list[str], wal_sender_timeout: float
) -> Ready:
    config = choice.config
    own_schema, partitions = config.store.schema_, store.partitions()
    if tail.unfinished is not None:
        # Ordinals count what the plugin sent, so the rest must be sent, and routed, as the beginning was.
        begun = [Subscription.load(entry) for entry in tail.unfinished["subscriptions"]]
        existing = {s.consumer_id for s in consumers.all_subscriptions(store.connection)}
        kept = [s for s in begun if s.consumer_id in existing]
        log.info("bridge.finishing", position=str(tail.position))
        options = tail.unfinished["options"]
        return Ready(plugin, tail, options, kept, own_schema, True, wal_sender_timeout, partitions, choice)
    wanted = consumers.subscriptions(store.connection, config.consumers)
    options = plugins.plugin_options(plugin, publications, own_schema)
    return Ready(plugin, tail, options, wanted, own_schema, False, wal_sender_timeout, partitions, choice)
