"""The stores beside the configured one, and which of them owns a slot. Part of the rim; reads only.

A store is a schema with the bridge's tables. Its history names the source and the slot. For example, a copy of a
configuration file with another `store.schema` names the slot of the first store, whose changes it would take away.
Looks in the store's database and in the source's. A store in a third database is not found.
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
from cdcbridge.source import slots as source
from cdcbridge.source.facts import SourceFacts

OWNER_UNKNOWN: Final = "slot_owner_unknown"  # the code of the problem: a store that may own the slot is not readable
_LOCK_TIMEOUT: Final = "2s"  # a migration or an uninstallation of the other store holds its tables
_STORES: Final = """
    select c.system_identifier::text || '/' || d.oid || '/' || n.oid, n.nspname::text, d.datname::text,
           quote_ident(n.nspname), quote_ident(current_user),
           has_schema_privilege(n.oid, 'usage') and has_table_privilege(s.oid, 'select')
               and has_table_privilege(p.oid, 'select')
    from pg_control_system() c cross join pg_namespace n join pg_database d on d.datname = current_database()
    join pg_class s on s.relnamespace = n.oid and s.relname = 'source' and s.relkind = 'r'
    join pg_class p on p.relnamespace = n.oid and p.relname = 'positions' and p.relkind = 'r'
    join pg_class l on l.relnamespace = n.oid and l.relname = 'leaders' and l.relkind = 'r'
    order by n.nspname
"""
# Columns such as database_oid are missing in a store that an older version made.
_HISTORY: Final = """
    select to_jsonb(s), (select p.end_lsn::text from {positions} p order by p.id desc limit 1) from {source} s
"""


@dataclass(slots=True, frozen=True)
class OtherStore:
    """A store that is not the configured one.

    schema: as it is written in store.schema.
    place: its database in words where that is not the configured store's, else ''.
    grant: the SQL that lets this role read it.
    slot: the slot in its history. None where this role may not read it.
    end: the LSN up to which it has the source's changes.
    publications: those that it captures through. None where that is unknown.
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
        """Whether it can go on with this slot. A slot that begins after its end was made again for another store."""
        return self.slot == slot.name and (slot.confirmed_flush_lsn or 0) <= self.end


def other_stores(
    config: Config, identity: source.Identity, connection: Connection, store: Connection | None
) -> list[OtherStore]:
    """Find the other stores that have changes of this source, and those that this role may not read.

    store: None where its database does not exist, so that every store that is found is another one.
    """
    found: dict[str, OtherStore] = {}
    own: str | None = None
    with server_errors():
        for session in (connection,) if store is None else (store, connection):
            for key, schema, database, quoted, role, readable in session.execute(_STORES).fetchall():
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
                    with suppress(psycopg.errors.UndefinedTable):  # dropped meanwhile
                        found.update((key, one) for one in _read(session, other, identity))
                else:
                    found[key] = other
    return list(found.values())


def _read(session: Connection, other: OtherStore, identity: source.Identity) -> Iterator[OtherStore]:
    """The store with its history, if that is of this source."""
    tables = {name: sql.Identifier(other.schema, name) for name in ("positions", "source")}
    with session.transaction():
        session.execute(f"set local lock_timeout = '{_LOCK_TIMEOUT}'".encode())
        row = session.execute(sql.SQL(_HISTORY).format(**tables)).fetchone()
    if row is None or not _is_of(row[0], identity):
        return
    end = parse_lsn(row[1]) if row[1] else 0
    yield replace(other, slot=row[0]["slot"], end=end, publications=_publications(row[0]))


def _is_of(history: dict[str, Any], identity: source.Identity) -> bool:
    """Whether the history is of this database. A renamed database keeps its OID, which older stores do not have."""
    if history.get("system_identifier") != identity.system_identifier:
        return False
    oid = history.get("database_oid")
    return bool(history.get("database") == identity.database if oid is None else oid == identity.database_oid)


def _publications(history: dict[str, Any]) -> tuple[str, ...] | None:
    if history.get("plugin") != "pgoutput":
        return ()
    capture = history.get("capture")
    return tuple(capture["publications"]) if capture else None


def owners(slot: source.Slot, others: list[OtherStore], *, begun: bool) -> list[OtherStore]:
    """The stores that the slot belongs to, beside the configured one.

    begun: the configured store has a history with this slot. Else a store that may not be read may be the owner, too.
    """
    if begun:
        return [other for other in others if other.continues_from(slot)]
    named = [other for other in others if other.continues_from(slot)]
    return named or [other for other in others if other.slot is None]


def slot_problems(
    config: Config, facts: SourceFacts, connection: Connection, store: Connection, *, begun: bool
) -> Iterator[Problem]:
    """Find a slot whose changes would be taken away from another store."""
    name, slot, identity = config.source.slot, facts.slot, facts.identity
    if slot is not None and slot.database == identity.database:
        for other in owners(slot, other_stores(config, identity, connection, store), begun=begun):
            back = "set source.slot and store back to those of one bridge" if other.place else ""
            back = back or f"set store.schema back to {other.schema}"
            if begun:
                message = (
                    f"{other} goes by the slot {name}, too: the changes that one bridge reads are lost to the other"
                )
                fix = (
                    f"Remove the store that nobody needs; else set source.slot to another name in one file, or {back}."
                )
                yield Problem("slot_of_two_stores", "warning", name, message, fix)
            elif other.slot is None:
                message = f"the slot {name} may belong to {other}: this role may not read it"
                fix = f"{other.grant} -- as its owner; or set source.slot to another name for a new store"
                yield Problem(OWNER_UNKNOWN, "error", name, message, fix)
            else:
                message = f"the slot {name} belongs to {other}: what this store would read is lost to that one"
                fix = f"Set source.slot to another name for this store, or {back}."
                yield Problem("slot_of_other_store", "error", name, message, fix)
