"""Find the stores other than the configured one, and decide which of them owns a slot.

A store is a schema with the bridge's tables. Its history names the source and the slot. For example, a copied
configuration file with another `store.schema` still has the slot of the first store, and would take its changes away.
The search covers the store's database and the source's. A store in a third database is not found. This module never
changes a database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg
from psycopg import sql

from cdcbridge.config import Config
from cdcbridge.database import Connection, server_errors
from cdcbridge.lsn import parse_lsn
from cdcbridge.problem import Problem
from cdcbridge.schemas import INTERNAL, internal
from cdcbridge.source import slots as source
from cdcbridge.source.facts import SourceFacts

OWNER_UNKNOWN: Final = "slot_owner_unknown"  # problem code: this role may not read a store that may own the slot
_LOCK_TIMEOUT: Final = "2s"  # a migration or an uninstallation of the other store locks its tables
_STORES: Final = """
    select c.system_identifier::text || '/' || d.oid || '/' || n.oid, left(n.nspname::text, -length(%(suffix)s)),
           d.datname::text, quote_ident(n.nspname), quote_ident(current_user),
           has_schema_privilege(n.oid, 'usage') and has_table_privilege(s.oid, 'select')
               and has_table_privilege(p.oid, 'select')
    from pg_control_system() c cross join pg_namespace n join pg_database d on d.datname = current_database()
    join pg_class s on s.relnamespace = n.oid and s.relname = 'source' and s.relkind = 'r'
    join pg_class p on p.relnamespace = n.oid and p.relname = 'positions' and p.relkind = 'r'
    join pg_class l on l.relnamespace = n.oid and l.relname = 'leaders' and l.relkind = 'r'
    where right(n.nspname, length(%(suffix)s)) = %(suffix)s order by n.nspname
"""
# As JSON, because a store that an older version made lacks columns such as database_oid.
_HISTORY: Final = """
    select to_jsonb(s), (select p.end_lsn::text from {positions} p order by p.id desc limit 1) from {source} s
"""


@dataclass(slots=True, frozen=True)
class OtherStore:
    """A store that is not the configured one.

    Attributes:
        schema: The schema, written as in store.schema.
        place: Words for its database if that is not the configured store's, otherwise ''.
        grant: The SQL that lets this role read the store.
        slot: The slot in its history, or None if this role may not read the store.
        end: The LSN up to which it has the source's changes.
        publications: The publications that it reads through, or None if they are unknown.
    """

    schema: str
    place: str
    grant: str
    slot: str | None = None
    end: int = 0
    publications: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"the store in the schema {self.schema}{self.place}"

    def continues_from(self, slot: source.Slot) -> bool:
        """Return whether the store can continue with this slot.

        A slot that begins after the store's end was created again, for another store.
        """
        return self.slot == slot.name and (slot.confirmed_flush_lsn or 0) <= self.end


def other_stores(
    config: Config, identity: source.Identity, connection: Connection, store: Connection | None
) -> list[OtherStore]:
    """Return the other stores that have changes of this source, and those that this role may not read.

    Args:
        config: The configuration.
        identity: The identity of the source.
        connection: A session on the source.
        store: A session on the store. None if its database does not exist: then every store found is another one.
    """
    found: dict[str, OtherStore] = {}
    own: str | None = None
    with server_errors():
        for session in (connection,) if store is None else (store, connection):
            for key, schema, database, quoted, role, readable in session.execute(
                _STORES, {"suffix": INTERNAL}
            ).fetchall():
                if schema == config.store.schema_ and session is store:
                    own = key
                if key == own or key in found:
                    continue
                place = "" if session is store else f" (database {database}, with the source)"
                grant = (
                    f"grant usage on schema {quoted} to {role};"
                    f" grant select on {quoted}.source, {quoted}.positions to {role};"
                )
                other = OtherStore(schema, place, grant)
                if readable:
                    with suppress(psycopg.errors.UndefinedTable):  # the store was dropped in the meantime
                        found.update((key, one) for one in _read(session, other, identity))
                else:
                    found[key] = other
    return list(found.values())


def _read(session: Connection, other: OtherStore, identity: source.Identity) -> Iterator[OtherStore]:
    """Yield the store with the facts of its history, if that history is of this source."""
    tables = {name: sql.Identifier(internal(other.schema), name) for name in ("positions", "source")}
    with session.transaction():
        session.execute(f"set local lock_timeout = '{_LOCK_TIMEOUT}'".encode())
        row = session.execute(sql.SQL(_HISTORY).format(**tables)).fetchone()
    if row is None or not _is_of(row[0], identity):
        return
    end = parse_lsn(row[1]) if row[1] else 0
    yield replace(other, slot=row[0]["slot"], end=end, publications=_publications(row[0]))


def _is_of(history: dict[str, Any], identity: source.Identity) -> bool:
    """Return whether the history is of this database.

    A renamed database keeps its OID. An older store has no OID in its history, so the names are compared instead.
    """
    if history.get("system_identifier") != identity.system_identifier:
        return False
    oid = history.get("database_oid")
    return bool(history.get("database") == identity.database if oid is None else oid == identity.database_oid)


def _publications(history: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the publications of the last session. None if they are unknown, and () for wal2json, which needs none."""
    if history.get("plugin") != "pgoutput":
        return ()
    capture = history.get("capture")
    return tuple(capture["publications"]) if capture else None


def owners(slot: source.Slot, others: list[OtherStore], *, begun: bool) -> list[OtherStore]:
    """Return the other stores that the slot belongs to, or may belong to.

    Args:
        slot: The slot.
        others: All other stores.
        begun: True if the configured store has a history with this slot. Otherwise a store that this role may not read
            may be the owner, and is returned if no readable store is.
    """
    if begun:
        return [other for other in others if other.continues_from(slot)]
    named = [other for other in others if other.continues_from(slot)]
    return named or [other for other in others if other.slot is None]


def slot_problems(
    config: Config, facts: SourceFacts, connection: Connection, store: Connection, *, begun: bool
) -> Iterator[Problem]:
    """Yield a problem for each other store of the slot, because one bridge would take the changes from the other.

    Args:
        config: The configuration.
        facts: The facts about the source.
        connection: A session on the source.
        store: A session on the store.
        begun: True if the configured store has a history with this slot.
    """
    name, slot, identity = config.source.slot, facts.slot, facts.identity
    if slot is not None and slot.database == identity.database:
        for other in owners(slot, other_stores(config, identity, connection, store), begun=begun):
            back = "set source.slot and store back to those of one bridge" if other.place else ""
            back = back or f"set store.schema back to {other.schema}"
            if begun:
                message = f"{other} uses the slot {name}, too: the changes that one bridge reads are lost for the other"
                fix = f"Remove the store that is not needed, or set source.slot to another name in one file, or {back}."
                yield Problem("slot_of_two_stores", "warning", name, message, fix)
            elif other.slot is None:
                message = f"the slot {name} may belong to {other}: this role may not read it"
                fix = f"{other.grant} -- as its owner. Or set source.slot to another name for a new store"
                yield Problem(OWNER_UNKNOWN, "error", name, message, fix)
            else:
                message = (
                    f"the slot {name} belongs to {other}: changes that this store reads would be lost for that one"
                )
                fix = f"Set source.slot to another name for this store, or {back}."
                yield Problem("slot_of_other_store", "error", name, message, fix)
