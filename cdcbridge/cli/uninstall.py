"""Find all that cdcbridge made in the source and in the store, and remove it piece by piece.

Removes the slot, the publications, the event trigger, the replica identities that the trigger set, and the store's
schema. Each of them may have been removed before. Never removes things that others use, and never waits long for a
lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import psycopg
from psycopg import sql

from cdcbridge.bridge.publication_use import publication_uses
from cdcbridge.checks.other_stores import OtherStore, other_stores, owners
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, source_errors, store_errors
from cdcbridge.database.patience import patiently
from cdcbridge.database.rights import as_owner
from cdcbridge.errors import CdcbridgeError, NotLeader, OperatorNeeded
from cdcbridge.schemas import both
from cdcbridge.source import slots as source
from cdcbridge.source.event_trigger import given
from cdcbridge.store.presence import running
from cdcbridge.store.schema_contents import strangers

_AGAIN: Final = "cdcbridge uninstall"
_IDENTITY: Final = {"d": "default", "i": "default", "n": "nothing"}
_NEEDED: Final = "without it, UPDATE and DELETE would fail, because the publication {} has the table"
_REMEMBERED: Final = """
    select from cdcbridge_identity.changed x join pg_class c on c.oid = x.relation where c.relreplident = 'f' limit 1
"""
_OTHER_BRIDGES: Final = "select slot from cdcbridge_identity.bridges where slot <> %s order by 1"
# _GIVEN: the tables that still have the replica identity FULL that cdcbridge set.
# keyed: the table has a primary key, so the default replica identity is enough.
# published: other publications that contain its updates or deletes, which need a replica identity.
# _TAKEN: those of these tables whose replica identity another bridge needs.
_GIVEN: Final = """
    select c.oid::int8, n.nspname, c.relname,
           exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary and i.indimmediate
                   and i.indisvalid) as keyed,
           (select string_agg(distinct p.pubname, ', ') from pg_publication p
            cross join lateral pg_get_publication_tables(p.pubname::text) g
            where (p.pubupdate or p.pubdelete) and p.pubname <> all (%s)
              and (g.relid = c.oid or g.relid in (select pg_partition_ancestors(c.oid)))) as published
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.oid = any (%s::oid[]) and c.relreplident = 'f' order by 2, 3
"""
_TAKEN: Final = """
    select c.oid::int8 from pg_class c where c.oid = any (%s::oid[]) and exists (
        select from (select c.oid union all select relid from pg_partition_ancestors(c.oid)) a (oid)
        join pg_class t on t.oid = a.oid join pg_namespace n on n.oid = t.relnamespace
        join cdcbridge_identity.bridges b
          on b.slot <> %s and (b.everything or n.nspname = any (b.schemas)
                               or n.nspname || '.' || t.relname = any (b.tables)))
"""
_SIZE: Final = """
    select count(*) filter (where relkind in ('r', 'p')), pg_size_pretty(coalesce(sum(pg_total_relation_size(c.oid))
               filter (where relkind in ('r', 'm')), 0))
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = any (%s)
"""
_READERS: Final = """
    select distinct n.nspname || '.' || c.relname from pg_rewrite r
    join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid and d.refclassid = 'pg_class'::regclass
    join pg_class t on t.oid = d.refobjid join pg_namespace o on o.oid = t.relnamespace
    join pg_class c on c.oid = r.ev_class join pg_namespace n on n.oid = c.relnamespace
    where o.nspname = any (%(schemas)s) and n.nspname <> all (%(schemas)s) order by 1
"""


@dataclass(slots=True, frozen=True)
class Item:
    """One thing to remove.

    Attributes:
        what: Its name for people.
        undo: The function that removes it.
        identity: True for the replica identity of a table.
        remembers: True if the thing contains the list of these tables. Then it is kept while one cannot be restored.
        by_hand: The statement that removes it, for a role that has the right to do so.
    """

    what: str
    undo: Callable[[], object]
    identity: bool = False
    remembers: bool = False
    by_hand: str = ""


@dataclass(slots=True)
class Removal:
    """The things that would be removed, in order. `kept` has those that are kept, each with the reason."""

    items: list[Item] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


@contextlib.contextmanager
def planned(config: Config) -> Iterator[Removal]:
    """Find all that can be removed. While the `with` block runs, no bridge of this store can take the lead.

    Raises:
        NotLeader: A bridge of this store runs, or a client reads the slot.
        SourceUnavailable: The source cannot be reached.
        StoreUnavailable: The store cannot be reached.
        OperatorNeeded: This role does not own the store, or the store's history names another slot that exists.
    """
    plan = Removal()
    with contextlib.ExitStack() as sessions:
        origin = _unless_gone(sessions, lambda: connect_source(config.source_dsn, "cdcbridge uninstall"))
        schema = config.store.schema_
        store = _unless_gone(sessions, lambda: connect_store(config.store_dsn, schema, "cdcbridge uninstall"))
        if store is None:
            plan.kept.append("store: its database no longer exists")
        else:
            sessions.enter_context(as_owner(store, "`cdcbridge uninstall`"))
            _refuse_running(store)
        begun = _begun(config, origin, store)
        if origin is None:
            plan.kept.append("source: its database no longer exists")
        else:
            others = other_stores(config, source.identify(origin), origin, store)
            using = _slot(config, origin, plan, others, begun=begun)
            dropped = _publications(config, origin, plan, others, keep_slot=bool(using))
            if using:
                _leave_trigger(origin, plan, using[0])
            else:
                _identities(config, origin, store, plan, dropped)
        if store is not None:
            _schema(config, store, plan)
        yield plan


def remove(plan: Removal, tell: Callable[[str], None]) -> list[tuple[str, CdcbridgeError]]:
    """Remove the items in order, and return the name of each item that failed, with the error.

    `tell` is called with the name of each removed item. After a failure the next items are still removed. The exception
    is an item that remembers tables, if one of those could not be restored.
    """
    failed: list[tuple[str, CdcbridgeError]] = []
    unfinished = False
    for item in plan.items:
        try:
            if item.remembers and unfinished:
                raise CdcbridgeError("it is still needed to restore the tables above", hint=f"Run {_AGAIN} again.")
            item.undo()
        except CdcbridgeError as error:
            if item.by_hand and isinstance(error.__cause__, psycopg.errors.InsufficientPrivilege):
                error.hint = f"As its owner, or as a superuser: {item.by_hand};"
            failed.append((item.what, error))
            unfinished |= item.identity
        else:
            tell(item.what)
    return failed


def _unless_gone(sessions: contextlib.ExitStack, connect: Callable[[], Connection]) -> Connection | None:
    try:
        return sessions.enter_context(connect())
    except CdcbridgeError as error:
        text = str(error.__cause__ or error)
        if isinstance(error.__cause__, psycopg.Error) and (
            error.__cause__.sqlstate == "3D000" or ("database " in text and "does not exist" in text)
        ):
            return None
        raise


def _refuse_running(store: Connection) -> None:
    found = running(store)
    if found:
        names = "; ".join(map(str, found))
        one = "a bridge is" if len(found) == 1 else f"{len(found)} bridges are"
        raise NotLeader(
            f"{one} running: {names}", hint="Stop it first, and also the service that restarts it, such as systemd."
        )
    with store_errors():
        if store.execute("select to_regclass('leaders')").fetchone() != (None,):
            # This session holds the locks: a bridge that starts now remains a standby until everything is removed.
            store.execute(
                "select pg_try_advisory_lock('leaders'::regclass::oid::int, 0),"
                " pg_try_advisory_lock('leaders'::regclass::oid::int, 2)"
            )


def _begun(config: Config, origin: Connection | None, store: Connection | None) -> bool:
    """Return whether this store's history names the configured slot.

    Raise OperatorNeeded if it names another slot that exists. Without its store, that slot would retain WAL for ever.
    """
    if store is None:
        return False
    with store_errors():
        if store.execute("select to_regclass('source')").fetchone() == (None,):
            return False
        row = store.execute("select slot from source").fetchone()
    if row and row[0] != config.source.slot and origin is not None and source.slots(origin, row[0]):
        raise OperatorNeeded(
            f"the store in the schema {config.store.schema_} uses the slot {row[0]}, and source.slot is"
            f" {config.source.slot}",
            hint=f"Set source.slot back to {row[0]}, or store.schema to that of the other store.",
        )
    return bool(row and row[0] == config.source.slot)


def _slot(
    config: Config, origin: Connection, plan: Removal, others: list[OtherStore], *, begun: bool
) -> list[OtherStore]:
    """Plan the removal of the slot, unless other stores use it. Return these stores."""
    name = config.source.slot
    using: list[OtherStore] = []
    for slot in source.slots(origin, name):
        if slot.database != origin.info.dbname:
            plan.kept.append(f"slot {name}: it belongs to the database {slot.database}")
            continue
        drop_it = sql.SQL("select pg_drop_replication_slot({})").format(sql.Literal(name))
        by_hand = drop_it.as_string(origin)
        using = owners(slot, others, begun=begun) or [one for one in others if one.slot == name and not begun]
        if using:
            plan.kept.append(f"slot {name}: {_use(using[0], slot, by_hand)}")
            continue
        source.refuse_in_use(origin, name)

        def drop(statement: sql.Composed = drop_it) -> None:
            with source_errors():
                origin.execute(statement)

        plan.items.append(Item(f"slot {name} ({slot.plugin})", drop, by_hand=by_hand))
    return using


def _use(other: OtherStore, slot: source.Slot, by_hand: str) -> str:
    if other.slot is None:
        return f"{other} may use it, and this role may not read that store. If it is unused: {by_hand};"
    if not other.continues_from(slot):
        return f"{other} names it, although it ends before it. If it is unused: {by_hand};"
    return f"{other} uses it"


def _publications(
    config: Config, origin: Connection, plan: Removal, others: list[OtherStore], *, keep_slot: bool
) -> list[str]:
    """Plan the removal of this bridge's publications, and return the names of those that will be dropped.

    A publication that another reader may need is kept.
    """
    dropped = []
    for use in publication_uses(config, origin, others, keep_slot=keep_slot):
        what = f"publication {use.name}"
        if use.reason:
            plan.kept.append(f"{what}: {use.reason}")
            continue
        dropped.append(use.name)
        by_hand = use.statement.as_string(origin)
        plan.items.append(Item(what, _statement(origin, use.statement, what), by_hand=by_hand))
    return dropped


def _statement(origin: Connection, statement: sql.Composed, what: str) -> Callable[[], None]:
    def run() -> None:
        with source_errors():
            patiently(origin, lambda: origin.execute(statement), what=what, again=_AGAIN)

    return run


def _leave_trigger(origin: Connection, plan: Removal, other: OtherStore) -> None:
    """Keep the event trigger and its replica identities: they belong to the slot's bridge, which has another store."""
    with source_errors():
        if origin.execute("select to_regnamespace('cdcbridge_identity')").fetchone() != (None,):
            plan.kept.append(
                f"event trigger and replica identities: {other} {'may use' if other.slot is None else 'uses'} them"
            )


def _identities(
    config: Config, origin: Connection, store: Connection | None, plan: Removal, dropped: list[str]
) -> None:
    """Plan the removal of the event trigger and of the replica identities that it set."""
    slot = config.source.slot
    try:
        before = {**dict(_remembered(store)), **dict(given(origin))}
    except CdcbridgeError as error:
        plan.kept.append(f"event trigger and replica identities: run this as a superuser: {error}")
        return
    with source_errors():
        installed = origin.execute("select to_regclass('cdcbridge_identity.bridges')").fetchone() != (None,)
        others = [name for (name,) in origin.execute(_OTHER_BRIDGES, (slot,)).fetchall()] if installed else []
        taken = {oid for (oid,) in origin.execute(_TAKEN, (list(before), slot)).fetchall()} if installed else set()
        tables = origin.execute(_GIVEN, (dropped, list(before))).fetchall()
    if installed:
        # The entry is removed first, so that the trigger does not set the replica identity of a table again.
        mine = sql.SQL("delete from cdcbridge_identity.bridges where slot = {}").format(sql.Literal(slot))
        if others:
            mine_what = f"the event trigger's entry for the slot {slot}: the trigger is kept for {', '.join(others)}"
            plan.items.append(Item(mine_what, _statement(origin, mine, mine_what)))
        else:
            plan.items.append(Item("the event trigger's entries", _statement(origin, mine, "the event trigger")))
    for oid, schema, name, keyed, published in tables:
        word = _IDENTITY.get(before[oid], "default")
        if oid in taken:
            plan.kept.append(f"replica identity of {schema}.{name}: another bridge needs it")
        elif published and not (keyed and word == "default"):
            by_hand = sql.SQL("alter table only {} replica identity " + word).format(sql.Identifier(schema, name))
            needed = f"{_NEEDED.format(published)}. Later: {by_hand.as_string(origin)};"
            plan.kept.append(f"replica identity of {schema}.{name}: {needed}")
        else:
            what = f"replica identity of {schema}.{name}: from FULL back to {word.upper()}"
            statement = sql.SQL("alter table only {} replica identity " + word).format(sql.Identifier(schema, name))
            undo = _identity(origin, oid, statement, what, installed=installed)
            plan.items.append(Item(what, undo, identity=True, by_hand=statement.as_string(origin)))
    if installed and not others:
        plan.items.append(Item("event trigger and the schema cdcbridge_identity", _trigger(origin), remembers=True))


def _trigger(origin: Connection) -> Callable[[], None]:
    """Return a function that drops the event trigger.

    The trigger's schema is kept while it lists a table whose replica identity has not been restored.
    """

    def work() -> None:
        origin.execute("drop event trigger if exists cdcbridge_identity_command")
        origin.execute("drop event trigger if exists cdcbridge_identity_drop")
        if origin.execute(_REMEMBERED).fetchone() is None:
            origin.execute("drop schema cdcbridge_identity cascade")

    def run() -> None:
        with source_errors():
            patiently(origin, work, what="the event trigger", again=_AGAIN)

    return run


def _identity(
    origin: Connection, oid: int, statement: sql.Composed, what: str, *, installed: bool
) -> Callable[[], None]:
    """Return a function that restores the replica identity that a table had before.

    The function raises CdcbridgeError if a publication that could not be dropped needs the present one.
    """

    def work() -> None:
        row = origin.execute(_GIVEN, ([], [oid])).fetchone()
        if row and row[4] and not (row[3] and "default" in statement.as_string(origin).rpartition(" ")[2]):
            raise CdcbridgeError(_NEEDED.format(row[4]))
        origin.execute(statement)
        if installed:
            origin.execute("delete from cdcbridge_identity.changed where relation = %s::oid", (oid,))

    def run() -> None:
        with source_errors():
            patiently(origin, work, what=what, again=_AGAIN)

    return run


def _remembered(store: Connection | None) -> list[tuple[int, str]]:
    if store is None:
        return []
    with store_errors():
        if store.execute("select to_regclass('given_identities')").fetchone() == (None,):
            return []
        return store.execute("select relation::int8, before from given_identities").fetchall()


def _schema(config: Config, store: Connection, plan: Removal) -> None:
    schema = config.store.schema_
    with store_errors():
        there = "select to_regnamespace(quote_ident(%s))"
        names = [name for name in both(schema) if store.execute(there, (name,)).fetchone() != (None,)]
        if not names:
            return
        foreign = strangers(store, schema)
        if foreign:
            plan.kept.append(f"schema {schema}: it also has {', '.join(foreign)}, not made by cdcbridge")
            return
        tables, size = store.execute(_SIZE, (names,)).fetchone() or (0, "")
        readers = [name for (name,) in store.execute(_READERS, {"schemas": names}).fetchall()]
        consumers: list[str] = []
        if store.execute("select to_regclass('consumers')").fetchone() != (None,):
            consumers = [name for (name,) in store.execute("select name from consumers order by name").fetchall()]
    what = f"schema {' with '.join(names)}: {tables} tables, {size}"
    what += f", with all messages of the consumers: {', '.join(consumers)}" if consumers else ""
    what += f", and the views that read it: {', '.join(readers)}" if readers else ""
    statement = sql.SQL("drop schema if exists {} cascade").format(sql.SQL(", ").join(map(sql.Identifier, names)))

    def drop() -> None:
        with store_errors():
            patiently(store, lambda: store.execute(statement), what=f"drop schema {schema}", again=_AGAIN)

    by_hand = statement.as_string(store)
    plan.items.append(Item(what, drop, remembers=bool(_remembered(store)), by_hand=by_hand))
