"""The source database beside the stream: its facts, slot and publications. Part of the rim.

Reads catalogues, and makes what `run` needs: the publication first, then the slot, since decoding looks the
publication up as of each change. Never alters a table, and never publishes what could make an application's
statement fail.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdcbridge.config import Consumer
from cdcbridge.database import Connection, connect_source, source_errors
from cdcbridge.errors import CdcbridgeError
from cdcbridge.lsn import parse_lsn

_WRITES: Final = frozenset({"update", "delete"})


@dataclass(slots=True, frozen=True)
class Slot:
    """A row of pg_replication_slots."""

    name: str
    plugin: str
    database: str
    active_pid: int | None
    wal_status: str
    restart_lsn: int | None
    confirmed_flush_lsn: int | None
    invalidation: str | None = None
    safe_wal_size: int | None = None  # bytes until max_slot_wal_keep_size; None without that limit
    inactive_seconds: float | None = None  # None while it is active, and before PostgreSQL 17, which does not know
    failover: bool | None = None  # None before PostgreSQL 17


@dataclass(slots=True, frozen=True)
class Table:
    """A table that a consumer's pattern names or covers; for partitions, only their root."""

    schema: str
    name: str
    oid: int
    kind: str
    identity: frozenset[str]
    full: bool
    generated: tuple[str, ...]
    floats: tuple[str, ...]
    partition: bool
    persistence: str
    leaves_without_identity: tuple[str, ...]

    @property
    def topic(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


def slots(connection: Connection, name: str | None = None) -> list[Slot]:
    """The logical slots of the cluster, or the one of that name."""
    with source_errors():
        version = connection.info.server_version
        newer = "null, null, null"
        if version >= 170000:
            newer = "invalidation_reason, extract(epoch from clock_timestamp() - inactive_since)::float8, failover"
        rows = connection.execute(
            f"select slot_name, plugin, database, active_pid, wal_status, restart_lsn::text,"  # noqa: S608
            f" confirmed_flush_lsn::text, safe_wal_size, {newer} from pg_replication_slots"
            " where slot_type = 'logical' and (%s::text is null or slot_name = %s) order by slot_name",
            (name, name),
        ).fetchall()
    return [Slot(r[0], r[1], r[2], r[3], r[4], _lsn(r[5]), _lsn(r[6]), r[8], r[7], r[9], r[10]) for r in rows]


def _lsn(text: str | None) -> int | None:
    return None if text is None else parse_lsn(text)


def identify(connection: Connection) -> tuple[str, str]:
    """(system identifier, database)."""
    query = "select system_identifier::text, current_database()::text from pg_control_system()"
    with source_errors():
        row = connection.execute(query).fetchone()
    return (row[0], row[1]) if row else ("", "")


def in_recovery(connection: Connection) -> bool:
    """Whether the source is a standby."""
    with source_errors():
        return connection.execute("select pg_is_in_recovery()").fetchone() == (True,)


def may_fail_over(connection: Connection) -> bool:
    """Whether the server can keep slots on its standbys, too: PostgreSQL 17, "Logical Replication Failover"."""
    return connection.info.server_version >= 170000 and not in_recovery(connection)


def current_lsn(connection: Connection) -> int:
    """Where the WAL is written to now (on a standby: replayed to)."""
    with source_errors():
        row = connection.execute(
            "select (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end)::text"
        ).fetchone()
    return parse_lsn(row[0]) if row else 0


_TABLES: Final = """
    select n.nspname, c.relname, c.oid, c.relkind,
           case c.relreplident
               when 'f' then (select array_agg(a.attname::text) from pg_attribute a
                              where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
               when 'n' then null
               else (select array_agg(a.attname::text) from pg_index i
                     join pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey)
                     where i.indrelid = c.oid and i.indisvalid
                       and case c.relreplident when 'd' then i.indisprimary else i.indisreplident end)
           end,
           c.relreplident = 'f',
           (select coalesce(array_agg(a.attname::text order by a.attnum), '{{}}') from pg_attribute a
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> ''),
           (select coalesce(array_agg(a.attname::text order by a.attnum), '{{}}') from pg_attribute a
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.atttypid in (700, 701, 1700)),
           c.relispartition, c.relpersistence,
           (select coalesce(array_agg(l.relid::regclass::text order by 1), '{{}}')
            from pg_partition_tree(c.oid) l join pg_class p on p.oid = l.relid
            where c.relkind = 'p' and l.isleaf and p.relreplident <> 'f' and not exists (
                select from pg_index i where i.indrelid = p.oid and i.indisvalid
                  and case p.relreplident when 'd' then i.indisprimary else i.indisreplident end))
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'f', 'v', 'm') and c.relpersistence <> 't'
      and n.nspname !~ '^pg_' and n.nspname <> 'information_schema' and {condition}
    order by 1, 2
"""


def find_tables(connection: Connection, pattern: str, own_schema: str) -> list[Table]:
    """The tables that a pattern names (any kind of relation) or covers (tables that can be published, root only)."""
    schema, _, name = pattern.partition(".")
    if name != "*":
        condition, given = "n.nspname = %s and c.relname = %s", (schema, name)
    else:
        condition = "(%s = '*' or n.nspname = %s) and n.nspname <> %s and c.relkind in ('r', 'p')"
        condition += " and c.relpersistence = 'p' and not c.relispartition"
        given = (schema, schema, own_schema)  # type: ignore[assignment]
    with source_errors():
        rows = connection.execute(_TABLES.format(condition=condition).encode(), given).fetchall()
    return [
        Table(
            r[0],
            r[1],
            r[2],
            r[3],
            frozenset(r[4] or ()),
            r[5],
            tuple(r[6]),
            tuple(r[7]),
            r[8],
            r[9],
            tuple(r[10]),
        )
        for r in rows
    ]


# publications


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


# slots


def create_slot(dsn: str, name: str, plugin: str, *, failover: bool, waiting: Callable[[str], None]) -> int:
    """Create the slot; its first position. `failover`: where the server can. Tells through `waiting` which open
    transactions it waits for.

    Source: PostgreSQL manual, "Replication Slots": creation waits for the writing transactions that are open.
    """
    with (
        connect_source(dsn, "cdcbridge slot") as creator,
        watch_creation(dsn, creator.info.backend_pid, waiting),
        source_errors(),
    ):
        more = ", failover => true" if failover and may_fail_over(creator) else ""
        row = creator.execute(
            f"select lsn::text from pg_create_logical_replication_slot(%s, %s{more})".encode(),  # noqa: S608
            (name, plugin),
        ).fetchone()
    return parse_lsn(row[0]) if row else 0


@contextlib.contextmanager
def watch_creation(dsn: str, pid: int, waiting: Callable[[str], None]) -> Iterator[None]:
    """While session `pid` creates a slot: tell which open transactions it waits for."""
    with connect_source(dsn, "cdcbridge slot watch") as watcher:
        done = threading.Event()

        def watch() -> None:
            told: list[int] = []
            standby = in_recovery(watcher)
            while not done.wait(1.0):
                row = watcher.execute(_BLOCKERS, (pid,)).fetchone()
                if row and row[0] and row[0] != told:
                    told = row[0]
                    waiting(row[1])
                elif standby and not told:
                    told = [0]
                    waiting("the primary, to log its running transactions: select pg_log_standby_snapshot() there")

        thread = threading.Thread(target=watch, name="slot-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


_BLOCKERS: Final = """
    select array_agg(a.pid order by a.pid),
           string_agg(format('pid %%s (%%s, %%s, open for %%s)', a.pid, a.usename, a.state,
                             date_trunc('second', clock_timestamp() - a.xact_start)), '; ' order by a.pid)
    from unnest(pg_blocking_pids(%s)) b (pid) join pg_stat_activity a using (pid)
"""
