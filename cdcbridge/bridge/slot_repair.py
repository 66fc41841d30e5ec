"""Create, drop or recreate the slot, or skip changes, as an operator commands.

An operation that leaves changes out writes a gap message for every consumer into the log, in the same commit that moves
the position. This module reads and writes both databases. It never recreates the slot or skips changes while a bridge
leads, and never drops a slot that is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cdcbridge.checks.decision import other_source, wanted_plugin, wants_failover
from cdcbridge.checks.facts import Facts, look
from cdcbridge.checks.other_stores import OWNER_UNKNOWN, slot_problems
from cdcbridge.checks.server import problems
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, source_errors
from cdcbridge.errors import NotLeader, OperatorNeeded, SourceUnavailable, StoreUnavailable, UsageError
from cdcbridge.lsn import format_lsn
from cdcbridge.observe.lag import stored_slot
from cdcbridge.problem import refuse
from cdcbridge.source import event_trigger, publications
from cdcbridge.source import slots as source
from cdcbridge.source.facts import SourceFacts, look_at_source
from cdcbridge.source.replication import ReplicationStream
from cdcbridge.store.gap import leave_gap
from cdcbridge.store.leadership import Lead
from cdcbridge.store.log import BridgeStore, log_end


def create_slot(config: Config, say: Callable[[str], None]) -> tuple[int, str]:
    """Create the publications, and then the slot.

    The callback `say` receives a line for the operator if the creation has to wait for transactions.

    Returns:
        The slot's first position, and its plugin.

    Raises:
        UsageError: The slot exists already.
        OperatorNeeded: The store has begun with a slot before, and a new one would lack the changes committed since.
        CheckFailed: There are errors, which `cdcbridge check` also reports.
    """
    name = config.source.slot
    with connect_source(config.source_dsn, "cdcbridge cli") as connection:
        facts = look(config, connection, None)
        if facts.source.slot is not None:
            raise UsageError(f"the slot {name!r} exists already", hint="`cdcbridge slot list` shows it.")
        if stored_slot(config) is not None:
            raise OperatorNeeded(
                "the store already has changes of a slot, and a new one would lack the changes committed since",
                hint="`cdcbridge slot recreate` creates it again and continues after a gap message.",
            )
        refuse(problems(config, facts, connection, None))
        event_trigger.ensure(config, connection)
        plugin = wanted_plugin(config, facts)
        if plugin == "pgoutput":
            publications.create_spare_publication(connection, config.source.publication)
            wanted = publications.needed(config, connection)
            publications.ensure_publications(connection, wanted)
    return _create(config, facts.source, plugin, say), plugin


def drop_slot(config: Config) -> None:
    """Drop the slot.

    Raises:
        UsageError: There is no such slot.
        NotLeader: The slot is in use.
        CheckFailed: The slot belongs to another store.
    """
    name = config.source.slot
    with connect_source(config.source_dsn, "cdcbridge cli") as connection:
        facts = look_at_source(connection, name)
        if facts.slot is None:
            raise UsageError(f"there is no slot {name!r}", hint="`cdcbridge slot list` lists all slots.")
        with (
            suppress(StoreUnavailable),
            connect_store(config.store_dsn, config.store.schema_, "cdcbridge cli") as store,
        ):
            _refuse_slot_of_others(config, facts, connection, store)
        source.refuse_in_use(connection, name)
        _drop(config, connection)


def recreate_slot(config: Config, say: Callable[[str], None]) -> tuple[int, int]:
    """Replace the slot by a new one with the store's plugin, and leave a gap message.

    The callback `say` receives a line for the operator if the creation has to wait for transactions.

    Returns:
        The LSNs at which the gap begins and ends.

    Raises:
        UsageError: The store has no history yet.
        NotLeader: A bridge leads, or the slot is in use.
        CheckFailed: The slot belongs to another store.
        OperatorNeeded: The store holds the changes of another source.
    """
    with _alone(config) as store, connect_source(config.source_dsn, "cdcbridge cli") as connection:
        facts = _same_source(config, connection, store)
        history, end = facts.store.history, facts.store.tail.end_lsn
        if history is None:
            raise UsageError(
                "the store has no history yet, so there is nothing to continue from", hint="`cdcbridge run` starts it."
            )
        _refuse_slot_of_others(config, facts.source, connection, store.connection)
        source.refuse_in_use(connection, config.source.slot)
        if facts.source.slot is not None:
            _drop(config, connection)
        lsn = _create(config, facts.source, history.plugin, say)
        # After the branch, the log may contain changes of a timeline that the source has left: the gap begins there.
        start = end if facts.branch is None else min(end, facts.branch)
        timeline = None if facts.branch is None else facts.timeline
        leave_gap(store, start, max(end, lsn), go_on=lsn, timeline=timeline)
        store.set_timeline(facts.timeline, facts.branch)
        return start, max(end, lsn)


def skip(config: Config, target: int) -> tuple[int, int]:
    """Continue from the LSN `target`, and leave a gap message.

    Returns:
        The LSNs at which the gap begins and ends.

    Raises:
        UsageError: The store has reached `target` already, or the server's WAL has not.
        NotLeader: A bridge leads.
        CheckFailed: The slot belongs to another store.
        OperatorNeeded: The store holds the changes of another source.
    """
    with _alone(config) as store, connect_source(config.source_dsn, "cdcbridge cli") as connection:
        facts = _same_source(config, connection, store)
        end = facts.store.tail.end_lsn
        if target <= end:
            raise UsageError(f"the store ends at {format_lsn(end)}: {format_lsn(target)} is not ahead of it")
        _refuse_slot_of_others(config, facts.source, connection, store.connection)
        if target > facts.wal_end:
            raise UsageError(f"the source's WAL ends at {format_lsn(facts.wal_end)}: {format_lsn(target)} is beyond it")
        leave_gap(store, end, target, go_on=target)
        return end, target


def _create(config: Config, facts: SourceFacts, plugin: str, say: Callable[[str], None]) -> int:
    return source.create_slot(
        config.source_dsn,
        config.source.slot,
        plugin,
        failover=wants_failover(config, facts),
        waiting=lambda pids: say(f"waiting for {pids}"),
    )


def _drop(config: Config, connection: Connection) -> None:
    name = config.source.slot
    try:
        with source_errors():
            connection.execute("select pg_drop_replication_slot(%s)", (name,))
    except SourceUnavailable:
        source.refuse_in_use(connection, name)  # another session may have begun to read it meanwhile
        raise


def _refuse_slot_of_others(config: Config, facts: SourceFacts, connection: Connection, store: Connection) -> None:
    """Raise CheckFailed if the slot belongs to another store, for example because that one created it anew.

    A lost slot is not refused: it has no changes left for any store.
    """
    if facts.slot is None or facts.slot.wal_status == "lost":
        return
    begun = stored_slot(config) == config.source.slot
    meets = begun and facts.slot_lsn <= log_end(store)
    found = slot_problems(config, facts, connection, store, begun=meets)
    refuse([problem for problem in found if not (begun and problem.code == OWNER_UNKNOWN)])


def _same_source(config: Config, connection: Connection, store: BridgeStore) -> Facts:
    """Return the facts of both sides, with the source's timeline and the LSN at which it left the store's timeline.

    Raises OperatorNeeded if the store holds the changes of another source.
    """
    stream = ReplicationStream(config.source_dsn)
    try:
        facts = look(config, connection, store.connection, stream)
    finally:
        stream.close()
    history = facts.store.history
    if history is not None and (error := other_source(history, facts.source.identity, config.source.slot)):
        raise error
    return facts


@contextmanager
def _alone(config: Config) -> Iterator[BridgeStore]:
    """Provide the store, of which this process has the lead. Raise NotLeader while a bridge leads."""
    store = BridgeStore(config.store_dsn, config.store.schema_)
    try:
        store.migrate()
        lead = Lead(config.store_dsn, config.store.schema_)
        try:
            if not lead.try_take():
                raise NotLeader(f"a bridge is running: {store.leader()}", hint="Stop it first.")
            store.begin_epoch()
            yield store
        finally:
            lead.close()
    finally:
        store.close()
