"""Find the other readers of a bridge's publications, so that `uninstall` keeps the publications in use.

A publication for a whole schema can make statements fail after its bridge was removed. For example, PostgreSQL refuses
an UPDATE of a new table without a key. Therefore a publication stays only for a known reader, or for a slot whose
reader is unknown. This module only reads the source, and never drops anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from cdcbridge.checks.other_stores import OtherStore
from cdcbridge.config import Config
from cdcbridge.database import Connection, source_errors
from cdcbridge.source import slots as source
from cdcbridge.source.publications import publication

_WRITES = frozenset({"update", "delete"})


@dataclass(slots=True, frozen=True)
class Use:
    """A publication of this bridge, and the reason why it must stay.

    Attributes:
        statement: The SQL that drops it.
        reason: Why it must stay, with the statement to drop it later. An empty text means that it can be dropped now.
    """

    name: str
    statement: sql.Composed
    reason: str


def publication_uses(config: Config, origin: Connection, others: Sequence[OtherStore], *, keep_slot: bool) -> list[Use]:
    """Look at each publication of this bridge that exists.

    Args:
        config: The configuration of this bridge.
        origin: A session on the source.
        others: The stores of other bridges.
        keep_slot: Whether the configured slot belongs to another store, so that it is a reader like any other.
    """
    names = [config.source.publication, f"{config.source.publication}_inserts"]
    with source_errors():
        found = origin.execute(
            "select pubname::text, quote_ident(pg_get_userbyid(pubowner)), pg_has_role(pubowner, 'usage')"
            " from pg_publication where pubname = any (%s) order by 1",
            (names,),
        ).fetchall()
        senders = origin.execute(
            "select pid, query from pg_stat_activity where backend_type = 'walsender' and datname = current_database()"
        ).fetchall()
    slots = [
        slot.name
        for slot in source.slots(origin)
        if slot.plugin == "pgoutput"
        and slot.database == origin.info.dbname
        and (keep_slot or slot.name != config.source.slot)
    ]
    known = {other.slot: other for other in others if other.slot in slots and other.publications is not None}
    unknown = [name for name in slots if name not in known]
    uses = []
    for name, owner, may in found:
        statement = sql.SQL("drop publication if exists {}").format(sql.Identifier(name))
        text = statement.as_string(origin)
        reading = [pid for pid, query in senders if query and f'"{name}"' in query]
        capturing = [other for other in known.values() if name in (other.publications or ())]
        if capturing:
            reason = f"{capturing[0]} captures its changes through it"
        elif reading:
            reason = f"pid {reading[0]} reads it. If that is over: {text};"
        elif unknown:
            reason = f"the slot {', '.join(unknown)} may read it. {_harm(origin, name)}If it does not: {text};"
        elif not may:
            reason = f"the role {owner} owns it. {_harm(origin, name)}As that role, or as a superuser: {text};"
        else:
            reason = ""
        uses.append(Use(name, statement, reason))
    return uses


def _harm(origin: Connection, name: str) -> str:
    """Return a warning about statements that the publication makes fail on tables without a key, or ''."""
    found = publication(origin, name)
    if found is None or not found.operations & _WRITES:
        return ""
    if found.everything:
        where = " of this database"
    elif found.schemas:
        where = f" of the schema {', '.join(sorted(found.schemas))}"
    else:
        return ""
    return f"WARNING: while it exists, UPDATE and DELETE fail on each new table{where} without a primary key. "
