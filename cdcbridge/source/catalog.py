"""Answer the decoders' questions about tables, as of the change that is being decoded.

pgoutput decodes with the catalogue as of each change, and asks for little. wal2json names a partition and not its root,
and omits TOAST columns that did not change, so the past definition of a table matters. For each table this module keeps
the version from before the youngest DDL on it, until the stream has passed the transaction of that DDL.

This module never answers from a look at the catalogue that is older than the transaction being decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import structlog

from cdcbridge.changes.events import Begin, Relation
from cdcbridge.changes.wal2json import TableShape
from cdcbridge.database import Connection, source_errors
from cdcbridge.routing.router import Router
from cdcbridge.source.catalog_look import NEVER, Found, all_tables, one_table, partitioned_tables
from cdcbridge.source.message_contents import content_reader
from cdcbridge.source.slots import current_lsn
from cdcbridge.source.type_memory import TypeMemory

_TYPES: Final = "/types"  # the key of the remembered types, among keys of tables such as "public/orders"
_HALF: Final = 1 << 31
_REMEMBERED: Final = 100_000  # transactions of the stream that are known to have passed
log = structlog.get_logger()


@dataclass(slots=True)
class _Version:
    """A table's definition from the commit of one transaction on, as a look at the catalogue found it.

    Attributes:
        since: The ID of that transaction, or 0 if the definition holds at once.
        looked_at: An LSN above the commits of all transactions that the look saw.
        changed: The ID of the transaction with the youngest DDL in this definition.
    """

    since: int
    looked_at: int
    changed: int
    table: TableShape
    columns: dict[str, list[int]] = field(default_factory=dict)  # toastable ones → number, xid of the last DDL
    attributes: dict[str, int] = field(default_factory=dict)  # number → that xid, for dropped columns too


@dataclass(slots=True)
class _Versions:
    """The versions of one table, oldest first. No further version is expected up to the LSN `covered`."""

    known: list[_Version] = field(default_factory=list)
    covered: int = -1
    unknown: TableShape | None = None  # its definition if no version is known


class _Column(NamedTuple):
    """A column of a partitioned table.

    Attributes:
        type_oid: The OID of its type, 0 once the column is dropped.
        toastable: Whether an UPDATE may omit it.
        changed: The ID of the transaction with its last DDL.
    """

    type_oid: int
    toastable: bool
    changed: int


@dataclass(slots=True)
class _Roots:
    """The columns of all partitioned tables, as a look at the catalogue found them."""

    covered: int = -1
    looked_at: int = -1
    columns: dict[tuple[str, str], dict[str, _Column]] = field(default_factory=dict)


class SourceCatalog:
    """The source's catalogue for both decoders. Only the decoding thread uses this object and its session."""

    def __init__(self, connection: Connection, router: Router, remembered: dict[str, Any]) -> None:
        self._connection = connection
        self.to_utf8 = content_reader(connection)
        self._router = router
        self._transaction = Begin(0, 0, 0)
        self._passed: dict[int, None] = {}
        self._covered = NEVER
        self._unsettled = False
        self._tables: dict[tuple[str, str], _Versions] = {}
        self._roots = _Roots()
        self._saved = remembered
        self._dirty = True  # the result of remember() may have changed
        self._types = TypeMemory(connection, remembered.get(_TYPES, {}))
        self.lookup_type = self._types.lookup
        for name, entry in remembered.items():
            if name == _TYPES:
                continue
            schema, _, table = name.partition("/")
            versions = self._tables.setdefault((schema, table), _Versions())
            versions.known.append(_Version(0, -1, entry["changed"], self._restore(schema, table, entry)))

    def is_standby_on(self, timeline: int) -> bool:
        """Return whether the source is still a standby and receives WAL of this timeline.

        A standby that receives no WAL at present also counts.
        """
        with source_errors():
            row = self._connection.execute(
                "select pg_is_in_recovery(), (select received_tli from pg_stat_wal_receiver)"
            ).fetchone()
        return row is not None and row[0] and row[1] in (None, timeline)

    def captures(self, schema: str, table: str) -> bool:
        """Return whether any consumer may want the changes of a table with this name."""
        return bool(self._router.subscriptions(schema, table))

    def wal_end(self) -> int:
        """Return the LSN at which the source's WAL ends now."""
        return current_lsn(self._connection)

    def has_identity(self, relation: Relation) -> bool:
        """Return whether the table has a usable replica identity now.

        A partitioned table always counts as having one, because the identities of its partitions matter instead.
        """
        rows = one_table(self._connection, relation.schema, relation.table).rows
        found = Found(*rows[0]) if rows else None
        return found is not None and (found.kind == "p" or found.replica_identity == "f" or bool(found.identity))

    def columns(self) -> dict[str, frozenset[str]]:
        """Return the columns of each captured topic as they were last known, before the stream delivers anything."""
        return {
            versions.known[0].table.relation.topic: versions.known[0].table.relation.columns
            for versions in self._tables.values()
            if versions.known and versions.known[0].table.captured and versions.known[0].table.relation.columns
        }

    def meet_all(self) -> None:
        """Look at every captured table now, so that its definition is still known after it was dropped or altered.

        If no table is remembered, the stream begins now. Each table then counts as if it had always been as it is.
        """
        look = all_tables(self._connection, self._router.patterns)
        first = not self._tables
        for row in look.rows:
            found = Found(*row)
            versions = self._tables.setdefault((found.schema, found.table), _Versions())
            versions.covered = max(versions.covered, look.covered)
            self._meet(found, versions, look.looked_at, first=first)

    def advance(self, begin: Begin) -> bool:
        """Note that the stream has reached this transaction, and return whether answers of table() may change.

        Definitions that were looked up before this transaction committed may be out of date. See Wal2jsonCatalog in
        changes/wal2json.py.
        """
        self._transaction = begin
        self._passed[begin.xid or 0] = None
        if len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]
        if (begin.commit_lsn or 0) < self._covered and not self._unsettled:
            return False
        self._covered, self._unsettled = NEVER, False
        return True

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        """Return the table as the current transaction saw it. See Wal2jsonCatalog in changes/wal2json.py."""
        versions = self._tables.setdefault((schema, table), _Versions())
        if versions.covered <= (self._transaction.commit_lsn or 0):
            self._look(schema, table, versions)
        self._covered = min(self._covered, versions.covered)
        doubtful = not self.captures(schema, table) and self._in_doubt(versions)
        if doubtful and (root := self._assumed_root(schema, table, action, columns)):
            doubtful = False
            versions.known.insert(0, _Version(0, -1, 0, self._as_partition(schema, table, root)))
            self._dirty = True
        found = self._current(schema, table, versions)
        return replace(found, doubtful=True) if doubtful else found

    def remember(self) -> dict[str, Any] | None:
        """Return the definitions that a restart needs, of captured tables, partitions and types.

        The result is None if they have not changed since the last call.
        """
        types = self._types.dump()
        if not self._dirty and types is self._saved.get(_TYPES):
            return None
        self._dirty = False
        now = {
            f"{schema}/{table}": _entry(version)
            for (schema, table), versions in self._tables.items()
            for version in versions.known[:1]
            if version.table.captured
        } | {_TYPES: self._types.dump()}
        if now == self._saved:
            return None
        self._saved = now
        return now

    def _look(self, schema: str, table: str, versions: _Versions) -> None:
        look = one_table(self._connection, schema, table)
        versions.covered = look.covered
        if look.rows:
            self._meet(Found(*look.rows[0]), versions, look.looked_at)

    def _meet(self, found: Found, versions: _Versions, looked_at: int, *, first: bool = False) -> None:
        """Add the version that a look found, if it is a new one."""
        since = found.since
        table = found.definition(captured=self.captures(found.root_schema, found.root_table))
        if versions.known and versions.known[-1].changed == found.since:
            if _shape(versions.known[-1].table) == _shape(table):
                return
            since = 0  # a dropped key leaves no trace of its transaction, so the new version holds at once
        if not versions.known and found.partition and not first:
            # The table is seen for the first time and is a partition. Before it was attached it was a separate table.
            versions.known.append(_Version(0, -1, 0, self._unknown(found.schema, found.table)))
            since = found.attached or since
        versions.known.append(_Version(since, looked_at, found.since, table, found.toastable, found.attributes))
        self._dirty = True

    def _current(self, schema: str, table: str, versions: _Versions) -> TableShape:
        known = versions.known
        while len(known) > 1 and self._has_passed(known[1], known[0].table):
            del known[0]
            self._dirty = True
        if not known:
            # The table no longer exists and was never seen before. Its rows get the name in the stream as topic.
            versions.unknown = versions.unknown or self._unknown(schema, table)
            return versions.unknown
        if len(known) > 1:
            self._unsettled = True  # the next transaction may be past the DDL between the two versions
            return self._between(known[0], known[1])
        if not self._has_passed(known[0], known[0].table):
            # Only the definition after a DDL is known, and the stream has not reached that DDL. A column that the DDL
            # changed may not exist yet.
            self._unsettled = True
            there = tuple(c for c, (_, since) in known[0].columns.items() if self._passed_by(since, known[0].looked_at))
            return replace(known[0].table, toastable=there)
        return known[0].table

    def _between(self, older: _Version, newer: _Version) -> TableShape:
        """Return the older version without the TOAST columns that DDL has changed by now.

        Several DDLs may lie between the two versions, and the stream may have passed only some of them.
        """
        gone = {
            name
            for name, (number, since) in older.columns.items()
            if (changed := newer.attributes.get(str(number), since)) != since
            and self._passed_by(changed, newer.looked_at)
        }
        return replace(older.table, toastable=tuple(c for c in older.table.toastable if c not in gone))

    def _unknown(self, schema: str, table: str) -> TableShape:
        relation = Relation(schema, table, f"{schema}.{table}", None, frozenset())
        return TableShape(relation, self.captures(schema, table))

    # tables that had been dropped, or were no longer partitions, at the first look

    def _in_doubt(self, versions: _Versions) -> bool:
        """Return whether the table may have been a partition at this point of the stream.

        The catalogue cannot answer that if the table has been dropped. The same is true if DDL that the stream has not
        reached rewrote all its columns in the catalogue, as detaching a partition does.
        """
        if len(versions.known) != 1:
            return not versions.known
        only = versions.known[0]
        return (
            not only.table.partition
            and bool(only.attributes)
            and not any(self._passed_by(changed, only.looked_at) for changed in only.attributes.values())
        )

    def _assumed_root(self, schema: str, table: str, action: str, columns: dict[str, int]) -> tuple[str, str] | None:
        """Return the captured table of which this one is assumed to be a partition, judging by the columns of a row.

        One row too many is better than one row lost, so an independent table with the same columns is taken for a
        partition too. The columns of a replica identity alone, as in a delete, prove little. In that case the table's
        name must also begin with the root's name.
        """
        if self._roots.covered <= (self._transaction.commit_lsn or 0):
            covered, rows, looked_at = partitioned_tables(self._connection)
            self._roots = _Roots(covered, looked_at)
            for root_schema, root_table, name, *column in rows:
                self._roots.columns.setdefault((root_schema, root_table), {})[name] = _Column(*column)
        fitting = [
            root
            for root in self._roots.columns
            if self._fits(root, action, columns) and (action != "D" or table.startswith(root[1]))
        ]
        if not fitting:
            return None
        root = max(fitting, key=lambda root: (root[0] == schema, len(root[1]) * table.startswith(root[1]), root))
        return root if self.captures(*root) else None

    def _fits(self, root: tuple[str, str], action: str, columns: dict[str, int]) -> bool:
        """Return whether a row with these columns can belong to a partition of the root.

        Columns of the root that were changed by DDL which the stream has not reached are not compared. Their names and
        types may have been different.
        """
        settled: dict[str, _Column] = {}
        coming = 0
        for name, column in self._roots.columns[root].items():
            if not self._passed_by(column.changed, self._roots.looked_at):
                coming += 1  # it had another type or name before, or did not exist
            elif column.type_oid:
                settled[name] = column
        missing = [column for name, column in settled.items() if name not in columns]
        if action == "U":
            missing = [column for column in missing if not column.toastable]
        return (
            bool(columns)
            and all(settled[name].type_oid == oid for name, oid in columns.items() if name in settled)
            and len(columns.keys() - settled.keys()) <= coming
            and (action == "D" or not missing)
        )

    def _as_partition(self, schema: str, table: str, root: tuple[str, str]) -> TableShape:
        log.warning("catalog.partition_assumed", table=f"{schema}.{table}", root=".".join(root))
        found = self.table(*root, "I", {})
        return replace(found, relation=replace(found.relation, schema=schema, table=table), partition=True)

    def _has_passed(self, newer: _Version, older: TableShape) -> bool:
        """Return whether the stream is past the DDL that made the newer version."""
        # A table leaves a partition tree only when that is certain, because rows would be lost otherwise.
        return self._passed_by(newer.since, newer.looked_at, certainly=older.partition and not newer.table.partition)

    def _passed_by(self, xid: int, looked_at: int, *, certainly: bool = False) -> bool:
        """Return whether the stream is past the commit of `xid`, which a look at `looked_at` saw.

        With `certainly`, return True only if that is certain.
        """
        if certainly and xid == self._transaction.xid:
            return False  # the DDL is somewhere in this very transaction
        if xid in self._passed or (self._transaction.commit_lsn or 0) >= looked_at:
            return True
        # The stream has not delivered this transaction: it committed before the stream's start, or is still to come.
        # Its age shows which of the two, unless it was open for a long time.
        return not certainly and 0 <= ((self._transaction.xid or 0) - xid) % (1 << 32) < _HALF

    def _restore(self, schema: str, table: str, entry: dict[str, Any]) -> TableShape:
        topic = entry["topic"]
        relation = Relation(
            schema,
            table,
            topic,
            tuple(entry["key"]) if entry["key"] else None,
            frozenset(entry["identity"]),
            entry["full"],
            frozenset(entry.get("columns", ())),
        )
        captured = self.captures(*topic.split(".", 1))
        return TableShape(
            relation,
            captured,
            entry["partition"],
            frozenset(entry["generated"]),
            tuple(entry["toastable"]),
            primary_key=tuple(entry.get("primary_key", ())),
            identity_order=tuple(entry["identity"]),
            replica_identity=entry.get("replica_identity", "d"),
        )


def _shape(table: TableShape) -> tuple[object, ...]:
    """Return the parts of a definition that can change without a trace in pg_class and pg_attribute."""
    return (table.primary_key, table.identity_order, table.replica_identity, table.relation.topic)


def _entry(version: _Version) -> dict[str, Any]:
    table, relation = version.table, version.table.relation
    return {
        "changed": version.changed,
        "topic": relation.topic,
        "key": list(relation.key) if relation.key else None,
        "identity": list(table.identity_order),
        "full": relation.full,
        "columns": sorted(relation.columns),
        "primary_key": list(table.primary_key),
        "replica_identity": table.replica_identity,
        "partition": table.partition,
        "generated": sorted(table.generated),
        "toastable": list(table.toastable),
    }
