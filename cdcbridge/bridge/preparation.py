"""Prepare a streaming session: look at both sides, decide, and carry the decision out.

The decision is made in checks/decision.py. To carry it out, this module first runs the same checks as
`cdcbridge check`. Then it brings consumers, publications and the slot into step, and writes the gap messages. It reads
and writes both databases, and never decides anything by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from cdcbridge.backfill.initial_copy import copy_tables
from cdcbridge.bridge.accepting import accept, apply_consumers, ensure_trigger, note_feeds
from cdcbridge.bridge.choosing import Choice
from cdcbridge.bridge.publishing import Publishing, bring_into_step
from cdcbridge.checks.decision import Branch, Plan, beyond_store, decide, other_source, wants_failover
from cdcbridge.checks.facts import Facts, look
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source
from cdcbridge.errors import IdentityLost, OperatorNeeded, SentTooEarly, SourceUnavailable, Unpublished
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.dropped_changes import Missing, closing
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.source import event_trigger, plugins
from cdcbridge.source import slots as source
from cdcbridge.source.capture import Capture, Watched
from cdcbridge.source.facts import look_at_source
from cdcbridge.source.replication import ReplicationStream, UnknownOption
from cdcbridge.source.slots import current_lsn, identify
from cdcbridge.store import consumers
from cdcbridge.store.facts import History, Tail
from cdcbridge.store.gap import leave_gap
from cdcbridge.store.log import BridgeStore, log_end

log = structlog.get_logger()


@dataclass(slots=True)
class Ready:
    """The facts and settings that a streaming session depends on.

    Attributes:
        finishing: Whether it only completes the transaction that an earlier streaming session appended in part.
        wal_sender_timeout: The timeout of the replication session in seconds, or 0 if it has none.
    """

    plugin: str
    tail: Tail
    options: dict[str, str]
    subscriptions: list[Subscription]
    own_schema: str
    finishing: bool
    wal_sender_timeout: float
    partitions: int
    choice: Choice  # the consumers that it continues with
    timeline_on_standby: int | None = None  # None: the source is not a standby
    capture: Capture | None = None  # None: wal2json matches names, or this only finishes a transaction
    watched: Watched | None = None
    left_out: frozenset[str] = frozenset()  # topics that cannot be captured as their consumers want
    missing: Missing = field(default_factory=Missing)  # gaps of changes that wal2json dropped
    router: Router = field(init=False)

    def __post_init__(self) -> None:
        self.router = Router(self.subscriptions, self.own_schema)

    @property
    def resume_options(self) -> dict[str, Any]:
        """The settings with which an open transaction must be finished, if this streaming session ends inside it."""
        return {"options": self.options, "subscriptions": [s.dump() for s in self.subscriptions]}

    def start(self, stream: ReplicationStream, connection: Connection, slot: str) -> None:
        """Begin to stream, without numeric-data-types-as-string if wal2json is too old for it.

        Then look at the slot again, because from now on no other database session can move it. If it was moved beyond
        the store's end, the server begins at the slot's confirmed LSN. The changes that the store lacks would then be
        skipped without an error.

        Args:
            stream: The replication stream to start.
            connection: A session on the source.
            slot: The name of the slot.

        Raises:
            OperatorNeeded: The slot was moved since the facts were found, or the plugin does not know an option.
        """
        try:
            stream.start(slot, self.tail.end_lsn, self.options)
        except UnknownOption as error:
            if self.options.pop(plugins.NUMBERS_AS_TEXT, None) is None:
                raise OperatorNeeded(f"source: {error}") from error
            stream.start(slot, self.tail.end_lsn, self.options)
        held = look_at_source(connection, slot)
        if held.slot_lsn > self.tail.end_lsn:
            raise beyond_store(slot, self.tail.end_lsn, held.slot_lsn)


@dataclass(slots=True)
class Learned:
    """The facts that the earlier streaming sessions of this process learned for the next one.

    Attributes:
        again: Whether one of them streamed, or this bridge was a standby. If so, a new or changed consumer that cannot
            work is logged, and does not stop the others.
        whole: Whether the server must send no transaction before its commit.
        stuck: Whether the last one ended before anything was appended.
        unpublished: Whether the WAL at the store's end cannot be decoded, because a publication did not exist when that
            WAL was written.
        lost: The error of the last table that lost its replica identity, with the position of the loss.
    """

    again: bool = False
    whole: bool = False
    stuck: bool = False
    unpublished: bool = False
    lost: str = ""

    def streams(self) -> None:
        """Note that a streaming session begins."""
        self.again, self.stuck, self.unpublished = True, False, False

    def failed(self, error: SourceUnavailable, *, appended: bool) -> None:
        """Note the error that ended a streaming session, and whether anything had been appended.

        Raises:
            OperatorNeeded: To continue without a table did not help, because the same error occurred again.
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


class Sides(NamedTuple):
    """The database sessions that a start works with, and the facts that they found."""

    source: Connection
    store: BridgeStore
    stream: ReplicationStream
    facts: Facts


class _Made(NamedTuple):
    """The results of the work on the source.

    Attributes:
        published: The publications.
        slot_lsn: The LSN up to which the slot is confirmed.
        exported: The name of the new slot's snapshot, if the plan wants one.
        wal_end: The end of the WAL, read when everything on the source existed.
    """

    published: Publishing
    slot_lsn: int
    exported: str | None
    wal_end: int


def prepare(
    config: Config,
    store: BridgeStore,
    stream: ReplicationStream,
    learned: Learned,
    *,
    consistent: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Ready:
    """Look at both sides, decide how to continue, and do it.

    Args:
        config: The configuration as the file has it.
        store: The store, of which this bridge has the lead.
        stream: The replication session, which does not stream yet.
        learned: The facts from the earlier streaming sessions of this process.
        consistent: Whether to fill consumers with `start: snapshot` from the slot's own snapshot, before anything is
            streamed. This matters only if the slot is created here.
        stopped: Returns whether the bridge has to stop. Filling the consumers then ends early.

    Returns:
        Everything that the streaming session depends on.

    Raises:
        OperatorNeeded: Source, slot and store do not fit together.
        CheckFailed: There are errors, which `cdcbridge check` also reports.
        SourceUnavailable: The source is out of reach, or not ready yet.
    """
    with connect_source(config.source_dsn, "cdcbridge setup") as connection:
        facts = look(config, connection, store.connection, stream)
        plan = decide(config, facts, consistent=consistent, unpublished=learned.unpublished)
        return _carry_out(plan, config, Sides(connection, store, stream, facts), learned, stopped)


def _carry_out(plan: Plan, config: Config, sides: Sides, learned: Learned, stopped: Callable[[], bool]) -> Ready:
    """Check and create everything that the plan needs, on both sides, in an order that loses no change."""
    store, facts = sides.store, sides.facts
    if not plan.first:
        store.set_database(facts.source.identity.database, facts.source.identity.database_oid)
    choice = accept(config, sides.source, store, facts, again=learned.again)
    # While a transaction is being finished, a new consumer would get its second half without the first.
    if not plan.finishing:
        apply_consumers(choice.config, sides.source, store)
    made = _make(plan, choice, sides)
    if plan.first:
        _begin(plan, choice.config, store, made, stopped)
    if plan.branch is not None:
        _follow_timeline(plan, plan.branch, sides)
    _tell_losses(store, made, finishing=plan.finishing, unpublished=learned.unpublished)
    missing = Missing(facts.store.capture if plan.plugin == "wal2json" else None)
    if not plan.finishing:
        _close_gaps(store, choice, missing, made.wal_end)
    ready = _ready(choice, store, plan.plugin, made.published.names, sides.stream.sender_timeout)
    ready.capture = None if plan.finishing else made.published.capture
    ready.left_out, ready.missing = choice.left_out, missing
    note_feeds(choice, store, finishing=plan.finishing)
    if learned.whole:
        ready.options = plugins.without_streaming(ready.options)
    ready.timeline_on_standby = plan.timeline if facts.source.on_standby else None
    return ready


def refuse_other_source(config: Config, store: BridgeStore) -> None:
    """Refuse a store that holds the changes of another source.

    This needs no lead, so a standby reports the mistake before it has to take over.

    Raises:
        OperatorNeeded: The store holds the changes of another source.
        SourceUnavailable: The source is out of reach.
    """
    with connect_source(config.source_dsn, "cdcbridge setup") as connection:
        history = store.facts().history
        if history is not None and (error := other_source(history, identify(connection), config.source.slot)):
            raise error


def _make(plan: Plan, choice: Choice, sides: Sides) -> _Made:
    """Create the parts that are missing on the source: event trigger, publications and slot."""
    config, connection = choice.config, sides.source
    installed = ensure_trigger(choice, connection, sides.store)  # before a publication can make an UPDATE fail
    published = Publishing([])
    if plan.plugin == "pgoutput":
        published = bring_into_step(config, sides.facts, connection, choice.left_out)
    slot_lsn, exported = sides.facts.source.slot_lsn, None
    if plan.make_slot:
        slot_lsn, exported = _make_slot(plan, config, sides)
    if installed:
        event_trigger.mend(connection)  # after the creation of the slot, which waits for older transactions
    if plan.failover is not None:
        sides.stream.set_failover(config.source.slot, plan.failover)
        log.info("slot.failover", slot=config.source.slot, failover=plan.failover)
    return _Made(published, slot_lsn, exported, current_lsn(connection))


def _make_slot(plan: Plan, config: Config, sides: Sides) -> tuple[int, str | None]:
    """Create the slot. Return its first position, and the name of its snapshot if the plan wants one."""
    name, stream = config.source.slot, sides.stream
    failover = wants_failover(config, sides.facts.source)
    log.info("slot.creating", slot=name, plugin=plan.plugin, snapshot="exported" if plan.snapshot else None)

    def tell(pids: str) -> None:
        log.info("slot.waiting", slot=name, waits_for=pids)

    exported = None
    if plan.snapshot:
        with source.watch_creation(config.source_dsn, stream.pid, tell):
            lsn, exported = stream.create_slot(name, plan.plugin, failover=failover)
    else:
        lsn = source.create_slot(config.source_dsn, name, plan.plugin, failover=failover, waiting=tell)
    log.info("slot.created", slot=name, plugin=plan.plugin, lsn=format_lsn(lsn), snapshot=exported)
    return lsn, exported


def _begin(plan: Plan, config: Config, store: BridgeStore, made: _Made, stopped: Callable[[], bool]) -> None:
    """Begin the store's history, and fill consumers from the slot's snapshot if there is one."""
    identity = plan.identity
    store.begin_history(
        History(
            identity.system_identifier,
            plan.timeline,
            identity.database,
            config.source.slot,
            plan.plugin,
            identity.database_oid,
        ),
        made.slot_lsn,
    )
    if made.exported is not None:
        # The snapshot is valid until the replication session gets its next command.
        router = Router(consumers.subscriptions(store.connection, config.consumers), config.store.schema_)
        copy_tables(config, store, router, made.exported, made.slot_lsn, stopped)


def _follow_timeline(plan: Plan, branch: Branch, sides: Sides) -> None:
    """Follow a source that was promoted, or that follows a promoted server.

    The log may contain changes of a timeline that the source has left. A gap message then names them, and the log
    continues from the branch.
    """
    store = sides.store
    if branch.gap is not None:
        leave_gap(store, branch.gap.first, branch.gap.last, go_on=branch.gap.first, timeline=plan.timeline)
    store.set_timeline(plan.timeline, branch.lsn)
    where = {"branch": format_lsn(branch.lsn), "store_end": format_lsn(sides.facts.store.tail.end_lsn)}
    log.warning("source.timeline", old=branch.left, new=plan.timeline, **where)


def _tell_losses(store: BridgeStore, made: _Made, *, finishing: bool, unpublished: bool) -> None:
    """Leave a gap message for changes that may be missing, and store the capture of this streaming session.

    Everything up to the slot's confirmed LSN was vouched for, so the gap begins there. With `unpublished`, the WAL up
    to its present end cannot be decoded, so the log continues at that end. Otherwise the stream continues at the log's
    end, and only the changes that the losses describe are missing. A streaming session that finishes a transaction
    stores the losses with the capture, and the next one leaves the message.
    """
    published, end = made.published, log_end(store.connection)
    capture = None if published.capture is None else published.capture.dump()
    if finishing and capture is not None:
        store.set_capture({**capture, "untold": published.losses})
    elif published.losses or unpublished:
        reason = "; ".join(published.losses) or "a publication did not exist when these changes were made"
        first, go_on = min(made.slot_lsn, end), made.wal_end if unpublished else end
        leave_gap(store, first, made.wal_end, go_on=go_on, reason=reason, capture=capture)
    elif capture is not None:
        store.set_capture(capture)


def _close_gaps(store: BridgeStore, choice: Choice, missing: Missing, wal_end: int) -> None:
    """Report the end of each gap whose table has a replica identity again, or no longer exists."""
    end = log_end(store.connection)
    for table in missing.ended(choice.unidentified):
        first = missing.close(table, wal_end).first
        kept, reason = missing.dump(), closing(table)
        leave_gap(store, first, wal_end, go_on=end, reason=reason, capture=kept, table=table)


def _ready(
    choice: Choice, store: BridgeStore, plugin: str, publications: list[str], wal_sender_timeout: float
) -> Ready:
    config, tail = choice.config, store.facts().tail
    own_schema, partitions = config.store.schema_, store.partitions()
    if tail.unfinished is not None:
        # Ordinals count everything that the plugin sent. So the rest of the transaction must be sent and routed with
        # the options of its beginning.
        begun = [Subscription.load(entry) for entry in tail.unfinished["subscriptions"]]
        existing = {s.consumer_id for s in consumers.all_subscriptions(store.connection)}
        kept = [s for s in begun if s.consumer_id in existing]
        log.info("bridge.finishing", position=str(tail.position))
        options = tail.unfinished["options"]
        return Ready(plugin, tail, options, kept, own_schema, True, wal_sender_timeout, partitions, choice)
    wanted = consumers.subscriptions(store.connection, config.consumers)
    options = plugins.plugin_options(plugin, publications, own_schema)
    return Ready(plugin, tail, options, wanted, own_schema, False, wal_sender_timeout, partitions, choice)
