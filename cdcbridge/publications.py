"""The publications that pgoutput reads through. Part of the rim.

A publication is made before the slot, since decoding looks it up as of each change. None publishes a change that
could make an application's statement fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdcbridge.config import Consumer
from cdcbridge.database import Connection, source_errors
from cdcbridge.errors import CdcbridgeError

_WRITES: Final = frozenset({"update", "delete"})


@dataclass(slots=True, frozen=True)
class Publication:
    """A publication as it is, or as it should be: tables by name, whole schemas, or everything."""

    name: str
    operations: frozenset[str]
    tables: frozenset[str] = frozenset()
    schemas: frozenset[str] = frozenset()
    everything: bool = False
    via_root: bool = True

    def covers(self, wanted: Publication) -> bool:
        """Publishes at least what is wanted."""
        missing = wanted.tables - self.tables
        return (
            wanted.operations <= self.operations
            and (self.via_root or not wanted.via_root)
            and (
                self.everything
                or (
                    not wanted.everything
                    and wanted.schemas <= self.schemas
                    and all(table.partition(".")[0] in self.schemas for table in missing)
                )
            )
        )


def wanted_publications(name: str, consumers: Iterable[Consumer]) -> list[Publication]:
    """What the consumers need. Tables of which nobody takes updates or deletes stand in a publication of their own,
    so that PostgreSQL asks no replica identity of them: publishing updates of a table without one makes the
    application's UPDATE fail.
    """
    wanted: dict[str, set[str]] = {}
    for consumer in consumers:
        for pattern in consumer.tables:
            wanted.setdefault(pattern, set()).update(consumer.operations)
    full = {pattern: operations for pattern, operations in wanted.items() if operations & _WRITES}
    inserts = {pattern: operations for pattern, operations in wanted.items() if not operations & _WRITES}
    made = []
    if full or not inserts:
        made.append(_publication(name, full))
    if inserts:
        made.append(_publication(f"{name}_inserts" if full else name, inserts))
    return made


def _publication(name: str, wanted: dict[str, set[str]]) -> Publication:
    return Publication(
        name,
        frozenset(operation for operations in wanted.values() for operation in operations),
        frozenset(pattern for pattern in wanted if not pattern.endswith(".*")),
        frozenset(pattern[:-2] for pattern in wanted if pattern.endswith(".*") and pattern != "*.*"),
        "*.*" in wanted,
    )


def publication(connection: Connection, name: str) -> Publication | None:
    """The publication of that name as it is, or None."""
    with source_errors():
        row = connection.execute(
            "select oid, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot"
            " from pg_publication where pubname = %s",
            (name,),
        ).fetchone()
        if row is None:
            return None
        tables = connection.execute(
            "select n.nspname || '.' || c.relname from pg_publication_rel r join pg_class c on c.oid = r.prrelid"
            " join pg_namespace n on n.oid = c.relnamespace where r.prpubid = %s",
            (row[0],),
        ).fetchall()
        schemas = connection.execute(
            "select n.nspname from pg_publication_namespace r join pg_namespace n on n.oid = r.pnnspid"
            " where r.pnpubid = %s",
            (row[0],),
        ).fetchall()
    operations = zip(("insert", "update", "delete", "truncate"), row[2:6], strict=True)
    return Publication(
        name,
        frozenset(operation for operation, on in operations if on),
        frozenset(table for (table,) in tables),
        frozenset(schema for (schema,) in schemas),
        row[1],
        row[6],
    )


def publication_sql(wanted: Publication, existing: Publication | None) -> list[sql.Composed]:
    """The statements that bring the publication into step; none where it is in step already."""
    if existing == wanted:
        return []
    name = sql.Identifier(wanted.name)
    operations = ", ".join(op for op in ("insert", "update", "delete", "truncate") if op in wanted.operations)
    options = sql.SQL("(publish = {}, publish_via_partition_root = true)").format(sql.Literal(operations))
    if wanted.everything:
        objects = sql.SQL("all tables")
    else:
        tables = [sql.SQL("table {}").format(sql.Identifier(*t.split(".", 1))) for t in sorted(wanted.tables)]
        schemas = [sql.SQL("tables in schema {}").format(sql.Identifier(s)) for s in sorted(wanted.schemas)]
        objects = sql.SQL(", ").join(tables + schemas)  # type: ignore[assignment]
    target = sql.SQL("for {} ").format(objects) if wanted.everything or wanted.tables or wanted.schemas else sql.SQL("")
    create = sql.SQL("create publication {} {}with {}").format(name, target, options)
    if existing is None:
        return [create]
    empty = not (wanted.tables or wanted.schemas)
    if existing.everything or wanted.everything or empty:
        return [sql.SQL("drop publication {}").format(name), create]
    return [
        sql.SQL("alter publication {} set {}").format(name, objects),
        sql.SQL("alter publication {} set {}").format(name, options),
    ]


def ensure_publications(connection: Connection, wanted: list[Publication]) -> list[str]:
    """Bring the publications into step with the consumers; the SQL that was run.

    One that publishes enough and may not be altered (it was made by hand by the owner) stays as it is.
    Raises OperatorNeeded where it is not enough and the role may not mend it.
    """
    ran: list[str] = []
    for one in wanted:
        existing = publication(connection, one.name)
        statements = publication_sql(one, existing)
        if not statements:
            continue
        try:
            with source_errors(), connection.transaction():
                for statement in statements:
                    connection.execute(statement)
        except CdcbridgeError:
            if existing is None or not existing.covers(one):
                raise
            continue
        ran += [statement.as_string(connection) for statement in statements]
    return ran


def create_spare_publication(connection: Connection, name: str) -> None:
    """The publication for tables of which only inserts are taken, empty, so that it is older than the slot.

    Decoding looks publications up as of each change: one that is made when the first such table is declared would
    be unknown to all WAL before. Where the role may not, it is made when it is needed.
    """
    options = sql.SQL("(publish = 'insert, truncate', publish_via_partition_root = true)")
    with contextlib.suppress(psycopg.Error):
        connection.execute(sql.SQL("create publication {} with {}").format(sql.Identifier(f"{name}_inserts"), options))
