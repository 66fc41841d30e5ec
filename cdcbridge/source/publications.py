"""Create and alter the publications through which pgoutput reads.

A publication is created before the slot, because decoding looks publications up as of each change. This module never
publishes a change that could make a statement of an application fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

import psycopg
from psycopg import sql

from cdcbridge.config import Config, Consumer
from cdcbridge.database import Connection, source_errors
from cdcbridge.errors import CdcbridgeError, SourceUnavailable, TableLocked
from cdcbridge.routing.patterns import whole
from cdcbridge.routing.router import OPERATIONS
from cdcbridge.source.table_locks import holders
from cdcbridge.source.tables import find_tables

_WRITES: Final = frozenset({"update", "delete"})


LOCK_TIMEOUT: Final = "2s"
_STORED_SINCE: Final = 180000  # the first version with publish_generated_columns


@dataclass(slots=True, frozen=True)
class Publication:
    """A publication as it is or as it should be: named tables, whole schemas, or everything.

    Attributes:
        filtered: Tables with a row filter.
        column_lists: Tables with a column list.
        generated: Whether it publishes stored generated columns (PostgreSQL 18).
        generated_needed: Whether a statement of an application fails unless stored generated columns are published.
    """

    name: str
    operations: frozenset[str]
    tables: frozenset[str] = frozenset()
    schemas: frozenset[str] = frozenset()
    everything: bool = False
    via_root: bool = True
    filtered: frozenset[str] = frozenset()
    column_lists: frozenset[str] = frozenset()
    generated: bool = False
    generated_needed: bool = field(default=False, compare=False)

    def takes(self, table: str) -> bool:
        """Return whether the publication contains the table, which is given as `schema.table`."""
        return self.everything or table in self.tables or table.partition(".")[0] in self.schemas

    def left_out(self, wanted: Publication, *, own: bool = False) -> str:
        """Describe which changes of the wanted tables are not published, or return '' if all are.

        Args:
            wanted: The publication that the consumers need.
            own: Whether the bridge made this publication, so that it should also contain all wanted tables.
        """
        parts = []
        if missing := wanted.operations - self.operations:
            parts.append(f"it does not publish {', '.join(one for one in OPERATIONS if one in missing)}")
        for what, tables in (("a row filter", self.filtered), ("a column list", self.column_lists)):
            if concerned := sorted(table for table in tables if wanted.takes(table)):
                parts.append(f"{what} on {', '.join(concerned)}")
        lacking = sorted(wanted.schemas - self.schemas) + sorted(t for t in wanted.tables if not self.takes(t))
        if own and not self.everything and (lacking or wanted.everything):
            parts.append(f"it lacks {', '.join(lacking) or 'tables'}")
        return "; ".join(parts)

    def covers(self, wanted: Publication) -> bool:
        """Return whether the publication publishes at least everything in `wanted`."""
        missing = wanted.tables - self.tables
        return (
            wanted.operations <= self.operations
            and not any(wanted.takes(table) for table in self.filtered | self.column_lists)
            and (self.via_root or not wanted.via_root)
            and (self.generated or not wanted.generated_needed)
            and (
                self.everything
                or (
                    not wanted.everything
                    and wanted.schemas <= self.schemas
                    and all(table.partition(".")[0] in self.schemas for table in missing)
                )
            )
        )


def needed(config: Config, connection: Connection) -> list[Publication]:
    """Return the publications that the consumers need on this server.

    Under REPLICA IDENTITY FULL, PostgreSQL 18 refuses UPDATE and DELETE of a table with a stored generated column,
    unless the publication publishes such columns. Any table may get into this state later. Once a consumer takes
    updates or deletes, all publications therefore include such columns.
    """
    wanted = wanted_publications(config.source.publication, config.consumers)
    if connection.info.server_version < _STORED_SINCE:
        return wanted
    patterns = {pattern for c in config.consumers if _WRITES & set(c.operations) for pattern in whole(c.tables)}
    tables = [t for p in sorted(patterns) for t in find_tables(connection, p, config.store.schema_)]
    full = [t for table in tables for t in (table, *table.leaves) if t.full]
    if not patterns:
        return wanted
    # PostgreSQL refuses to decode a table if two of its publications differ about generated columns.
    return [replace(one, generated=True, generated_needed=any(t.generated for t in full)) for one in wanted]


def wanted_publications(name: str, consumers: Iterable[Consumer]) -> list[Publication]:
    """Return the publications that the consumers need, without regard to the version of the server.

    Tables of which no consumer takes updates or deletes get a publication of their own, so that they need no replica
    identity. If updates of a table without one were published, PostgreSQL would make the application's UPDATE fail.
    """
    wanted: dict[str, set[str]] = {}
    for consumer in consumers:
        for pattern in whole(consumer.tables):
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


# If the name of a schema contains a dot, it is quoted here. Its tables are therefore never mistaken for tables that a
# consumer names.
_TABLES: Final = """
    select case when position('.' in n.nspname) > 0 then quote_ident(n.nspname) else n.nspname end || '.' || c.relname,
           r.prqual is not null, r.prattrs is not null
    from pg_publication_rel r join pg_class c on c.oid = r.prrelid join pg_namespace n on n.oid = c.relnamespace
    where r.prpubid = %s
"""


def publication(connection: Connection, name: str) -> Publication | None:
    """Return the publication of that name as it is, or None if there is none."""
    generated = "pubgencols = 's'" if connection.info.server_version >= _STORED_SINCE else "false"
    with source_errors():
        row = connection.execute(
            "select oid, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot,"  # noqa: S608
            f" {generated} from pg_publication where pubname = %s".encode(),
            (name,),
        ).fetchone()
        if row is None:
            return None
        tables = connection.execute(_TABLES, (row[0],)).fetchall()
        schemas = connection.execute(
            "select n.nspname from pg_publication_namespace r join pg_namespace n on n.oid = r.pnnspid"
            " where r.pnpubid = %s",
            (row[0],),
        ).fetchall()
    operations = zip(OPERATIONS, row[2:6], strict=True)
    return Publication(
        name,
        frozenset(operation for operation, on in operations if on),
        frozenset(table for table, _, _ in tables),
        frozenset(schema for (schema,) in schemas),
        row[1],
        row[6],
        frozenset(table for table, filtered, _ in tables if filtered),
        frozenset(table for table, _, listed in tables if listed),
        row[7],
    )


def publication_sql(wanted: Publication, existing: Publication | None) -> list[sql.Composed]:
    """Return the statements that create the publication, or alter it to match the wanted one.

    The list is empty if nothing has to change. Each table is named with `only`. Otherwise PostgreSQL would also publish
    the tables that inherit from it, and refuse an UPDATE of such a table if it has no primary key.
    """
    if existing == wanted:
        return []
    name = sql.Identifier(wanted.name)
    operations = ", ".join(operation for operation in OPERATIONS if operation in wanted.operations)
    generated = ", publish_generated_columns = stored" if wanted.generated else ""
    if existing is not None and existing.generated and not wanted.generated:
        generated = ", publish_generated_columns = none"
    options = sql.SQL("(publish = {}, publish_via_partition_root = true" + generated + ")").format(
        sql.Literal(operations)
    )
    if wanted.everything:
        objects = sql.SQL("all tables")
    else:
        tables = [sql.SQL("table only {}").format(sql.Identifier(*t.split(".", 1))) for t in sorted(wanted.tables)]
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
    """Create or alter the publications so that they match the consumers, and return the SQL that was run.

    A publication that publishes enough stays as it is if the role may not alter it, for example because its owner made
    it by hand. A statement that waits for a lock makes other sessions wait, so none waits for long (LOCK_TIMEOUT).

    Raises:
        OperatorNeeded: A publication does not publish enough, and the role may not change that.
        SourceUnavailable: Another session holds a lock on one of the tables.
    """
    pairs = [(one, publication(connection, one.name)) for one in wanted]
    try:
        return _alter(connection, pairs)
    except CdcbridgeError as error:
        # A standby cannot be written to, but its primary's publications may be enough. The same is true of publications
        # that cannot be altered because of a lock.
        locked = isinstance(error, TableLocked)
        standby = getattr(error.__cause__, "sqlstate", None) == "25006"
        if isinstance(error, SourceUnavailable) and not (locked or standby):
            raise
        kept = [existing for one, existing in pairs if existing is not None and existing.covers(one)]
        if not kept:
            raise
    rest = [(one, existing) for one, existing in pairs if existing not in kept]
    ran = _alter(connection, [(replace(one, generated=kept[0].generated), existing) for one, existing in rest])
    for one, existing in pairs:
        if existing in kept and not locked:
            with contextlib.suppress(CdcbridgeError):
                ran += _alter(connection, [(replace(one, generated=kept[0].generated), existing)])
    return ran


def _alter(connection: Connection, pairs: list[tuple[Publication, Publication | None]]) -> list[str]:
    """Run the statements for all publications in one transaction.

    If two publications of a table differ about generated columns, the table's changes cannot be decoded. They must not
    differ even for a moment.
    """
    statements = [statement for one, existing in pairs for statement in publication_sql(one, existing)]
    if not statements:
        return []
    try:
        with source_errors(), connection.transaction():
            connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
            for statement in statements:
                connection.execute(statement)
    except SourceUnavailable as error:
        if getattr(error.__cause__, "sqlstate", None) != "55P03":
            raise
        names = ", ".join(one.name for one, _ in pairs)
        found = holders(connection, {table for one, _ in pairs for table in one.tables})
        said = "; ".join(holder.said for holder in found) or "one of its tables was locked"
        raise TableLocked(f"source: the publication {names} cannot be changed yet: {said}") from error
    return [statement.as_string(connection) for statement in statements]


def create_spare_publication(connection: Connection, name: str) -> None:
    """Create the empty publication for tables of which only inserts are taken, so that it is older than the slot.

    Decoding looks publications up as of each change. If this publication were created only when the first such table is
    declared, it would be unknown to all earlier WAL. If the role may not create it now, it is created when it is
    needed.
    """
    options = sql.SQL("(publish = 'insert, truncate', publish_via_partition_root = true)")
    with contextlib.suppress(psycopg.Error):
        connection.execute(sql.SQL("create publication {} with {}").format(sql.Identifier(f"{name}_inserts"), options))
