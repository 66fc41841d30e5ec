"""Remember types that are not built in, including types that were dropped since.

The WAL names a type by its OID, and the type may be dropped before the bridge reads the row. A value of a domain over
bool would then be delivered as "f" and not as false. The types of all columns are therefore looked up when a session
starts and again every ten seconds, and are stored together with the position.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import structlog

from cdcbridge.changes.pgtypes import PgType
from cdcbridge.database import Connection, source_errors

# One type, or without an OID the types of all columns and the types from which they are made.
_TYPES: Final = """
    with recursive used as (
        select a.atttypid as oid from pg_attribute a join pg_class c on c.oid = a.attrelid
        where a.attnum > 0 and a.atttypid >= 10000 and c.relkind in ('r', 'p') and %(oid)s::oid is null
          and c.relnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
        union
        select part from used join pg_type t on t.oid = used.oid
        cross join lateral (values (t.typbasetype), (t.typelem)) as of_it (part) where part >= 10000
    )
    select t.oid::int8, t.typbasetype::int8,
           case when t.typsubscript = 'array_subscript_handler'::regproc then t.typelem else 0 end::int8,
           coalesce(e.typdelim, ',')::text, t.typname::text
    from pg_type t left join pg_type e on e.oid = t.typelem
    where t.oid = %(oid)s or t.oid in (select oid from used)
    order by t.oid
"""
_MOST: Final = 10_000  # types in dump() at most, those with the highest OIDs
_LOOK_EVERY: Final = 10.0  # seconds between looks for types of new columns
_Entry = list[Any]  # base, element, delimiter, name
log = structlog.get_logger()


class TypeMemory:
    """The lookup function for `Types`, with the types that were known before a restart."""

    def __init__(self, connection: Connection, saved: Mapping[str, _Entry]) -> None:
        self._connection = connection
        self._known: dict[int, PgType] = {}
        self._dumped: dict[str, _Entry] | None = None
        self._next_look = 0.0
        self.load(saved)
        self._look(None)

    def load(self, saved: Mapping[str, _Entry]) -> None:
        """Add the types that dump() returned before a restart."""
        for oid, (base, element, delimiter, name) in saved.items():
            self._remember(int(oid), PgType(base, element, delimiter, name))

    def dump(self) -> dict[str, _Entry]:
        """Return all known types as JSON values, which the caller must not change.

        For example, `{"16385": [16, 0, ",", "flag"]}` is a domain over bool.
        """
        if time.monotonic() >= self._next_look:
            self._look(None)
        if self._dumped is None:
            known = dict(sorted(self._known.items())[-_MOST:])
            self._dumped = {str(o): [t.base, t.element, t.delimiter, t.name] for o, t in known.items()}
        return self._dumped

    def lookup(self, oid: int) -> PgType | None:
        """Return a type that is not built in, or None if it is unknown.

        A type is unknown if it was dropped before the bridge saw it. Its values are then delivered as text.
        """
        if oid not in self._known:
            self._look(oid)
        found = self._known.get(oid)
        if found is None:
            log.warning(
                "type.unknown",
                oid=oid,
                reason="it was dropped before the bridge saw it. Its values are delivered as text",
            )
        return found

    def _look(self, oid: int | None) -> None:
        if oid is None:
            self._next_look = time.monotonic() + _LOOK_EVERY
        with source_errors():
            rows = self._connection.execute(_TYPES, {"oid": oid}).fetchall()
        for found, *definition in rows:
            self._remember(found, PgType(*definition))

    def _remember(self, oid: int, found: PgType) -> None:
        if self._known.get(oid) != found:
            self._known[oid] = found
            self._dumped = None
