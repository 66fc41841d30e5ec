"""What the decoders ask of the source's catalogue, as of the change that is being decoded. Part of the rim.

pgoutput decodes with historic catalogues and needs little. wal2json names partitions by themselves and leaves
unchanged TOAST columns out, so a table's past matters: each table keeps the version that was known before the
youngest DDL on it, until the stream has passed the transaction of that DDL. Never answers from a look that is older
than the transaction asking.
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

_TYPES: Final = "/types"  # among the names of tables, which have a schema: where types are remembered
_HALF: Final = 1 << 31
_REMEMBERED: Final = 100_000  # transactions of the stream that are known to have passed
log = structlog.get_logger()


@dataclass(slots=True)
class _Version:
    """A table's definition since a transaction's commit (`since`), as a look found it; `looked_at` is an LSN that all
    transactions which came before the look lie below. `changed`: the youngest DDL in it.
    """

    since: int
    looked_at: int
    changed: int
    table: TableShape
    columns: dict[str, list[int]] = field(default_factory=dict)  # toastable ones → number, DDL that last changed it
    attributes: dict[str, int] = field(default_factory=dict)  # all, dropped ones too: number → that DDL


@dataclass(slots=True)
class _Versions:
    """One table: its versions, oldest first. Up to the LSN `covered` no other is to be expected."""

    known: list[_Version] = field(default_factory=list)
    covered: int = -1
    unknown: TableShape | None = None  # what it is where no version tells


class _Column(NamedTuple):
    """Of a partitioned table: its type's OID (0 once dropped), whether an UPDATE may leave it out, its last DDL."""

    type_oid: int
    toastable: bool
    changed: int


@dataclass(slots=True)
class _Roots:
    """The columns of all partitioned tables, as a look found them."""

    covered: int = -1
    looked_at: int = -1
    columns: dict[tuple[str, str], dict[str, _Column]] = field(default_factory=dict)


class SourceCatalog:
    """Answers for both decoders. One session, used by the decoding thread alone."""

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
        self._dirty = True  # what remember() gives may have changed
        self._types = TypeMemory(connection, remembered.get(_TYPES, {}))
        self.lookup_type = self._types.lookup
        for name, entry in remembered.items():
            if name == _TYPES:
                continue
            schema, _, table = name.partition("/")
            versions = self._tables.setdefault((schema, table), _Versions())
            versions.known.append(_Version(0, -1, entry["changed"], self._restore(schema, table, entry)))

    def is_standby_on(self, timeline: int) -> bool:
        """Whether the source is a standby still, and what it receives is of this timeline."""
        with source_errors():
            row = self._connection.execute(
                "select pg_is_in_recovery(), (select received_tli from pg_stat_wal_receiver)"
            ).fetchone()
        return row is not None and row[0] and row[1] in (None, timeline)

    def captures(self, schema: str, table: str) -> bool:
        """Whether any consumer may want a table of this name."""
        return bool(self._router.subscriptions(schema, table))

    def wal_end(self) -> int:
        """Where the source's WAL ends now."""
        return current_lsn(self._connection)

    def has_identity(self, relation: Relation) -> bool:
        """Whether the table has a usable replica identity now. Of a partitioned one, its partitions' counts."""
        rows = one_table(self._connection, relation.schema, relation.table).rows
        found = Found(*rows[0]) if rows else None
        return found is not None and (found.kind == "p" or found.replica_identity == "f" or bool(found.identity))

    def columns(self) -> dict[str, frozenset[str]]:
        """The columns of each captured topic as they were last known, before the stream brings anything."""
        return {
            versions.known[0].table.relation.topic: versions.known[0].table.relation.columns
            for versions in self._tables.values()
            if versions.known and versions.known[0].table.captured and versions.known[0].table.relation.columns
        }

    def meet_all(self) -> None:
        """Look at every table that is captured now, so that its definition is known after it was dropped or altered.

        Where nothing is remembered, the stream begins now, and each table was always as it is.
        """
        look = all_tables(self._connection, self._router.patterns)
        first = not self._tables
        for row in look.rows:
            found = Found(*row)
            versions = self._tables.setdefault((found.schema, found.table), _Versions())
            versions.covered = max(versions.covered, look.covered)
            self._meet(found, versions, look.looked_at, first=first)

    def advance(self, begin: Begin) -> bool:
        """See the decoder's protocol. What was looked up before this transaction committed may be out of date."""
        self._transaction = begin
        self._passed[begin.xid or 0] = None
        if len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]
        if (begin.commit_lsn or 0) < self._covered and not self._unsettled:
            return False
        self._covered, self._unsettled = NEVER, False
        return True

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        """See the decoder's protocol."""
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
        """What a restart must know of captured tables and partitions, if that changed since it was last asked for."""
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
            since = 0  # a key was dropped, which leaves no trace of the transaction: the new version holds at once
        if not versions.known and found.partition and not first:
            # Seen for the first time, as a partition: before it was attached it was a table of its own.
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
            # No such table any more, and never seen before: its rows are named by what the stream says.
            versions.unknown = versions.unknown or self._unknown(schema, table)
            return versions.unknown
        if len(known) > 1:
            self._unsettled = True  # the next transaction may be past the DDL between the two
            return self._between(known[0], known[1])
        if not self._has_passed(known[0], known[0].table):
            # Known only as it is after a DDL that is yet to come: a column that it changed may not be there yet.
            self._unsettled = True
            there = tuple(c for c, (_, since) in known[0].columns.items() if self._passed_by(since, known[0].looked_at))
            return replace(known[0].table, toastable=there)
        return known[0].table

    def _between(self, older: _Version, newer: _Version) -> TableShape:
        """The older version, less the columns that one of several DDLs up to the newer one has changed by now."""
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

    # tables that were gone, or no partition any more, when they were first looked at

    def _in_doubt(self, versions: _Versions) -> bool:
        """Whether it may have been a partition at this point of the stream, with nothing in the catalogue to tell: it
        is gone, or all of it was rewritten by what is yet to come, as detaching does.
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
        """The captured table whose partition it is taken for, going by the columns of one of its rows.

        Rather a row too many than one lost: a table of its own that has the same columns is taken for a partition,
        too. An identity alone is little to go by: there the name must begin with the root's.
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
        """Whether a row with these columns can be of one of the root's partitions, DDL that is yet to come aside."""
        settled: dict[str, _Column] = {}
        coming = 0
        for name, column in self._roots.columns[root].items():
            if not self._passed_by(column.changed, self._roots.looked_at):
                coming += 1  # of another type or name before, or not there
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
        """Whether the stream is past the DDL that made the newer version."""
        # Leaving a partition tree waits for certainty: else rows would be lost.
        return self._passed_by(newer.since, newer.looked_at, certainly=older.partition and not newer.table.partition)

    def _passed_by(self, xid: int, looked_at: int, *, certainly: bool = False) -> bool:
        """Whether the stream is past the commit of `xid`, which a look at `looked_at` saw."""
        if certainly and xid == self._transaction.xid:
            return False  # somewhere in this very transaction
        if xid in self._passed or (self._transaction.commit_lsn or 0) >= looked_at:
            return True
        # Not seen in the stream: it committed before the stream's start, or is yet to come. Its age tells which,
        # unless it was open for long.
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
    """What of a definition can change without a trace in pg_class and pg_attribute."""
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
