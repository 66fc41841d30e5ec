"""Detect that publications or tables of the source were altered, so that the bridge may have missed changes.

pgoutput decodes each change with the publications as they were at the moment of that change. If a publication is
dropped, or a table that a consumer names is replaced, changes are lost without an error. For example, after `drop table
orders` and `create table orders` no publication contains the new table. The bridge therefore records its publications
and tables when it begins to stream, looks again before it confirms an LSN, and compares the two. wal2json sends the
changes of all tables, and the bridge selects them by name, so it needs none of this.

This module never changes the source.
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
LEFT_OUT: Final = "left out"  # instead of the OID of a table or schema that exists but could not be captured

_LEFT_OUT: Final = "could not be captured for a while"
_REPLACED: Final = "is a different one than before: it was created again, or renamed"


@dataclass(slots=True, frozen=True)
class Capture:
    """The publications, and the tables and schemas that the consumers name, at one moment.

    Attributes:
        publications: By name, `{"row": version, "tables": {OID: version}, "schemas": {OID: version}}`. A version
            differs after each ALTER, and after the object was dropped and created again.
        tables: By `schema.table`, the OID as text or LEFT_OUT, or None if there is no such table.
        schemas: For each pattern `schema.*`, the OID of the schema as text or LEFT_OUT, or None if there is no such
            schema.
        untold: Losses that were found before this capture was recorded, and that no gap message reports yet.
    """

    publications: dict[str, dict[str, Any]]
    tables: dict[str, str | None]
    schemas: dict[str, str | None]
    untold: tuple[str, ...] = ()

    def dump(self) -> dict[str, Any]:
        """Return the capture as a dictionary that the store keeps as JSON."""
        return asdict(self)


def look(connection: Connection, publications: Sequence[str], patterns: Sequence[str]) -> Capture:
    """Read the present state from the catalogue.

    Args:
        connection: A session on the source.
        publications: The names of the publications.
        patterns: The patterns of all consumers, for example `public.orders` and `sales.*`.
    """
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
    """Return one sentence for each difference between two captures through which changes may have been lost.

    The list is empty if no changes can be missing. If a table or schema has been dropped, nothing is lost, because
    nothing is left in it to change. A table or schema that only `now` contains was not captured before, so nothing of
    it is missing.
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
    """The capture that the bridge began to stream with, and the session that compares the catalogue with it.

    Tables that were left out of the capture are not compared. The bridge reports the changes that they missed when it
    starts to stream the next time.
    """

    def __init__(self, connection: Connection, began: Capture) -> None:
        self._connection = connection
        tables = {name: oid for name, oid in began.tables.items() if oid != LEFT_OUT}
        schemas = {name: oid for name, oid in began.schemas.items() if oid != LEFT_OUT}
        self._began = Capture(began.publications, tables, schemas)
        self._patterns = [*tables, *(f"{schema}.*" for schema in schemas)]

    def losses(self) -> list[str]:
        """Return one sentence for each difference from the first capture through which changes may have been lost."""
        return losses(self._began, look(self._connection, list(self._began.publications), self._patterns))
