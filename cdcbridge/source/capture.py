"""What the bridge relies on in the source's catalogue, and what a change of it can have cost. Part of the rim.

pgoutput sends what the publications said at the moment of each change. A publication that is dropped, or a named table
that is replaced, therefore costs changes without an error. For example, after `drop table orders` and `create table
orders` the new table is in no publication. So the bridge notes its publications and tables when a session begins,
looks again before it confirms an LSN, and compares. wal2json goes by names and needs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from cdcbridge.database import Connection, source_errors

_LOOK: Final = """
    select (select coalesce(json_object_agg(p.pubname, json_build_object(
                'row', p.oid || '/' || p.xmin,
                'tables', (select coalesce(json_object_agg(r.prrelid, r.xmin::text), '{}')
                           from pg_publication_rel r where r.prpubid = p.oid),
                'schemas', (select coalesce(json_object_agg(s.pnnspid, s.xmin::text), '{}')
                            from pg_publication_namespace s where s.pnpubid = p.oid))), '{}')
            from pg_publication p where p.pubname = any (%(publications)s)),
           (select coalesce(json_object_agg(w.schema || '.' || w.name, c.oid::text), '{}')
            from unnest(%(table_schemas)s::text[], %(table_names)s::text[]) as w (schema, name)
            left join pg_namespace n on n.nspname = w.schema
            left join pg_class c on c.relnamespace = n.oid and c.relname = w.name and c.relkind in ('r', 'p')),
           (select coalesce(json_object_agg(w.name, n.oid::text), '{}')
            from unnest(%(schemas)s::text[]) as w (name) left join pg_namespace n on n.nspname = w.name)
"""
LEFT_OUT: Final = "left out"  # in the place of the OID of a table or schema that exists and could not be captured

_LEFT_OUT: Final = "could not be captured for a while"
_REPLACED: Final = "is another one than before: it was created again, or renamed"


@dataclass(slots=True, frozen=True)
class Capture:
    """The publications and the tables that the consumers name, at one moment.

    publications: name -> {"row": version, "tables": {OID: version}, "schemas": {OID: version}}. A version changes
        with each ALTER, and when the object is dropped and created again.
    tables: `schema.table` -> OID as text, or None where there is no such table.
    schemas: the schema of each `schema.*` -> OID as text, or None.
    untold: what was found before this one was noted, and no gap message says yet.
    """

    publications: dict[str, dict[str, Any]]
    tables: dict[str, str | None]
    schemas: dict[str, str | None]
    untold: tuple[str, ...] = ()

    def dump(self) -> dict[str, Any]:
        """For the store, as JSON."""
        return asdict(self)


def look(connection: Connection, publications: Sequence[str], patterns: Sequence[str]) -> Capture:
    """The catalogue as it is now. `patterns`: of all consumers, for example `public.orders`, `sales.*`."""
    pairs = [pattern.split(".", 1) for pattern in dict.fromkeys(patterns)]
    named = [(schema, table) for schema, table in pairs if table != "*"]
    given = {
        "publications": list(publications),
        "table_schemas": [schema for schema, _ in named],
        "table_names": [table for _, table in named],
        "schemas": [schema for schema, table in pairs if table == "*" and schema != "*"],
    }
    with source_errors():
        row = connection.execute(_LOOK, given, prepare=True).fetchone()
    return Capture(*row) if row else Capture({}, {}, {})


def losses(before: Capture, now: Capture) -> list[str]:
    """What changed between two looks and can have cost changes, as sentences; empty where nothing can be missing.

    A table or schema that is gone costs nothing: there is nothing left to change. One that only `now` knows was not
    captured before.
    """
    found = []
    for name, had in before.publications.items():
        has = now.publications.get(name)
        if has is None:
            found.append(f"the publication {name} was dropped or renamed")
        elif has["row"] != had["row"]:
            found.append(f"the publication {name} was altered, or dropped and created again")
    for kind, what in (("tables", "table"), ("schemas", "schema")):
        for name, oid in getattr(now, kind).items():
            known = getattr(before, kind)
            if oid is None or name not in known:
                continue
            if oid != known[name]:
                found.append(f"the {what} {name} {_LEFT_OUT if known[name] == LEFT_OUT else _REPLACED}")
                continue
            for publication, had in before.publications.items():
                has = now.publications.get(publication)
                if has is not None and oid in had[kind] and has[kind].get(oid) != had[kind][oid]:
                    found.append(f"the {what} {name} was taken out of the publication {publication}, or altered in it")
    return found


class Watched:
    """The capture that a session began with, and the session on the source that looks at it again.

    Tables that were left out are not compared: the next session's start tells what they missed.
    """

    def __init__(self, connection: Connection, began: Capture) -> None:
        self._connection = connection
        tables = {name: oid for name, oid in began.tables.items() if oid != LEFT_OUT}
        schemas = {name: oid for name, oid in began.schemas.items() if oid != LEFT_OUT}
        self._began = Capture(began.publications, tables, schemas)
        self._patterns = [*tables, *(f"{schema}.*" for schema in schemas)]

    def losses(self) -> list[str]:
        """What changed since the session began, as sentences."""
        return losses(self._began, look(self._connection, list(self._began.publications), self._patterns))
