"""What cdcbridge made in the source and in the store: found, and removed one by one. Part of the rim.

Removes the slot, publications, the event trigger, the replica identities that it set, and the store's schema. Never
removes things that others use, and never waits long for a lock. Each part may be gone already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import psycopg
from psycopg import sql

from cdcbridge import source
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, source_errors, store_errors
from cdcbridge.errors import CdcbridgeError, NotLeader
from cdcbridge.event_trigger import given
from cdcbridge.patience import patiently
from cdcbridge.presence import running
from cdcbridge.schema_contents import strangers

_AGAIN: Final = "cdcbridge uninstall"
_IDENTITY: Final = {"d": "default", "i": "default", "n": "nothing"}
_NEEDED: Final = "without it, UPDATE and DELETE would fail, because the publication {} has the table"
_REMEMBERED: Final = """
    select from cdcbridge_identity.changed x join pg_class c on c.oid = x.relation where c.relreplident = 'f' limit 1
"""
_OTHER_BRIDGES: Final = "select slot from cdcbridge_identity.bridges where slot <> %s order by 1"
# The tables that still have the identity from here. taken: another bridge's trigger looks after it.
# published: another publication has its updates or deletes, which need an identity. keyed: the default is enough.
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
    select count(*) filter (where relkind in ('r', 'p')), pg_size_pretty(coalesce(sum(pg_total_relation_size(oid))
               filter (where relkind in ('r', 'm')), 0))
    from pg_class where relnamespace = to_regnamespace(quote_ident(%s))
"""
_READERS: Final = """
    select distinct n.nspname || '.' || c.relname from pg_rewrite r
    join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid and d.refclassid = 'pg_class'::regclass
    join pg_class t on t.oid = d.refobjid join pg_class c on c.oid = r.ev_class
    join pg_namespace n on n.oid = c.relnamespace
    where t.relnamespace = to_regnamespace(quote_ident(%s)) and c.relnamespace <> t.relnamespace order by 1
"""


@dataclass(slots=True, frozen=True)
class Item:
    """One thing to remove. `what` names it for people, `undo` removes it.

    identity: it is a table's replica identity.
    remembers: it holds the list of these tables, so it stays while one of them could not be taken back.
    """

    what: str
    undo: Callable[[], object]
    identity: bool = False
    remembers: bool = False


@dataclass(slots=True)
class Plan:
    """Everything that would be removed, in order. `kept`: the rest, each with the reason."""

    items: list[Item] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


@contextlib.contextmanager
def planned(config: Config) -> Iterator[Plan]:
    """Find all that is there. While the `with` block runs, no bridge of this store can take the lead.

    Raises NotLeader while a bridge runs, and SourceUnavailable or StoreUnavailable where a server is out of reach.
    """
    plan = Plan()
    with contextlib.ExitStack() as sessions:
        origin = _unless_gone(sessions, lambda: connect_source(config.source_dsn, "cdcbridge uninstall"))
        schema = config.store.schema_
        store = _unless_gone(sessions, lambda: connect_store(config.store_dsn, schema, "cdcbridge uninstall"))
        if store is None:
            plan.kept.append("store: its database does not exist any more")
        else:
            _refuse_running(store)
        if origin is None:
            plan.kept.append("source: its database does not exist any more")
        else:
            _slot(config, origin, plan)
            dropped = _publications(config, origin, plan)
            _identities(config, origin, store, plan, dropped)
        if store is not None:
            _schema(config, store, plan)
        yield plan


def remove(plan: Plan, tell: Callable[[str], None]) -> list[tuple[str, CdcbridgeError]]:
    """Remove the items in order; those that failed, each with its reason. The others are removed all the same."""
    failed: list[tuple[str, CdcbridgeError]] = []
    unfinished = False
    for item in plan.items:
        try:
            if item.remembers and unfinished:
                raise CdcbridgeError("it remembers the tables above", hint=f"Run {_AGAIN} again.")
            item.undo()
        except CdcbridgeError as error:
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
        raise NotLeader(f"{one} running: {names}", hint="Stop it first, and what restarts it, such as systemd.")
    with store_errors():
        if store.execute("select to_regclass('leaders')").fetchone() != (None,):
            # Held by this session: a bridge that starts now stands by until everything is gone.
            store.execute(
                "select pg_try_advisory_lock('leaders'::regclass::oid::int, 0),"
                " pg_try_advisory_lock('leaders'::regclass::oid::int, 2)"
            )


def _slot(config: Config, origin: Connection, plan: Plan) -> None:
    name = config.source.slot
    for slot in source.slots(origin, name):
        if slot.database != origin.info.dbname:
            plan.kept.append(f"slot {name}: it belongs to the database {slot.database}")
            continue
        source.refuse_in_use(origin, name)

        def drop() -> None:
            with source_errors():
                origin.execute("select pg_drop_replication_slot(%s)", (name,))

        plan.items.append(Item(f"slot {name} ({slot.plugin})", drop))


def _publications(config: Config, origin: Connection, plan: Plan) -> list[str]:
    """The publications of this bridge; those that will be dropped. One that another reader may need stays."""
    names = [config.source.publication, f"{config.source.publication}_inserts"]
    others = [
        slot.name
        for slot in source.slots(origin)
        if slot.plugin == "pgoutput" and slot.database == origin.info.dbname and slot.name != config.source.slot
    ]
    with source_errors():
        found = origin.execute("select pubname from pg_publication where pubname = any (%s) order by 1", (names,))
        existing = [name for (name,) in found.fetchall()]
        readers = origin.execute(
            "select pid, query from pg_stat_activity where backend_type = 'walsender' and datname = current_database()"
        ).fetchall()
    dropped = []
    for name in existing:
        statement = sql.SQL("drop publication if exists {}").format(sql.Identifier(name))
        reading = [pid for pid, query in readers if query and f'"{name}"' in query]
        if reading or others:
            reader = f"pid {reading[0]} reads it" if reading else f"the slot {', '.join(others)} may read it"
            by_hand = statement.as_string(origin)
            plan.kept.append(f"publication {name}: {reader}. If not: {by_hand};")
            continue
        dropped.append(name)
        plan.items.append(Item(f"publication {name}", _statement(origin, statement, f"publication {name}")))
    return dropped


def _statement(origin: Connection, statement: sql.Composed, what: str) -> Callable[[], None]:
    def run() -> None:
        with source_errors():
            patiently(origin, lambda: origin.execute(statement), what=what, again=_AGAIN)

    return run


def _identities(config: Config, origin: Connection, store: Connection | None, plan: Plan, dropped: list[str]) -> None:
    """The event trigger, and the tables that have their replica identity from it."""
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
        # First, so that the trigger does not give a table its identity back.
        mine = sql.SQL("delete from cdcbridge_identity.bridges where slot = {}").format(sql.Literal(slot))
        if others:
            mine_what = f"the event trigger's entry for the slot {slot}: the trigger stays for {', '.join(others)}"
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
            plan.items.append(Item(what, undo, identity=True))
    if installed and not others:
        plan.items.append(Item("event trigger and the schema cdcbridge_identity", _trigger(origin), remembers=True))


def _trigger(origin: Connection) -> Callable[[], None]:
    """Drop the event trigger. Its schema stays while it remembers a table that keeps its identity."""

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
    """Take a replica identity back, unless a publication that could not be dropped needs it."""

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


def _schema(config: Config, store: Connection, plan: Plan) -> None:
    schema = config.store.schema_
    with store_errors():
        if store.execute("select to_regnamespace(quote_ident(%s))", (schema,)).fetchone() == (None,):
            return
        foreign = strangers(store, schema)
        if foreign:
            plan.kept.append(f"schema {schema}: it also has {', '.join(foreign)}, not made by cdcbridge")
            return
        tables, size = store.execute(_SIZE, (schema,)).fetchone() or (0, "")
        readers = [name for (name,) in store.execute(_READERS, (schema,)).fetchall()]
        consumers: list[str] = []
        if store.execute("select to_regclass('consumers')").fetchone() != (None,):
            consumers = [name for (name,) in store.execute("select name from consumers order by name").fetchall()]
    what = f"schema {schema}: {tables} tables, {size}"
    what += f", with all messages of the consumers: {', '.join(consumers)}" if consumers else ""
    what += f"; and the views that read it: {', '.join(readers)}" if readers else ""
    statement = sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(schema))

    def drop() -> None:
        with store_errors():
            patiently(store, lambda: store.execute(statement), what=f"drop schema {schema}", again=_AGAIN)

    plan.items.append(Item(what, drop, remembers=bool(_remembered(store))))
