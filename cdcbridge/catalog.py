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

from cdcbridge.contents import content_reader
from cdcbridge.database import Connection, source_errors
from cdcbridge.decoders.wal2json import Table
from cdcbridge.lsn import parse_lsn
from cdcbridge.model import Begin, Relation
from cdcbridge.route import Router
from cdcbridge.type_memory import TypeMemory

_PRIMARY_KEY: Final = """
    select array_agg(a.attname::text order by k.n)
    from pg_index i cross join lateral unnest(i.indkey::int2[]) with ordinality as k (attnum, n)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indrelid = %s and {which} and i.indisvalid and k.n <= i.indnkeyatts
"""
# since: the youngest transaction that changed the table's definition or its place in a partition tree.
_TABLE: Final = """
    with t as (
        select c.oid, c.relispartition, c.relreplident, c.xmin as changed,
               case when c.relispartition then pg_partition_root(c.oid) else c.oid end as root
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = %s and c.relname = %s
    ), a as (
        select a.*, a.xmin as changed from pg_attribute a join t on a.attrelid = t.oid where a.attnum > 0
    )
    select t.oid::int8, t.root::int8, t.relispartition, t.relreplident::text, rn.nspname, rc.relname,
           (select coalesce(array_agg(attname::text), '{}') from a where not attisdropped and attgenerated <> ''),
           (select coalesce(json_object_agg(attname, array[attnum, changed::text::int8] order by attnum), '{}') from a
            where not attisdropped and attgenerated = '' and attlen = -1),  -- whatever attstorage says by now
           (select x::text::int8 from (select t.changed as x union all select a.changed from a
                                 union all select i.xmin from pg_inherits i where i.inhrelid = t.oid) y
            order by age(x) limit 1),
           (select i.xmin::text::int8 from pg_inherits i where i.inhrelid = t.oid),
           (select coalesce(json_object_agg(attnum, changed::text::int8), '{}') from a)
    from t join pg_class rc on rc.oid = t.root join pg_namespace rn on rn.oid = rc.relnamespace
"""
_ROOTS: Final = """
    select n.nspname, c.relname, a.attname, a.atttypid::int8, a.attlen = -1, a.xmin::text::int8
    from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid
    where c.relkind = 'p' and not c.relispartition and a.attnum > 0
"""
_TYPES: Final = "/types"  # among the names of tables, which have a schema: where types are remembered
_WAL_END: Final = "select pg_current_wal_insert_lsn()::text"
_HALF: Final = 1 << 31
_NEVER: Final = 1 << 64  # above every LSN
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
    table: Table
    columns: dict[str, list[int]] = field(default_factory=dict)  # toastable ones → number, DDL that last changed it
    attributes: dict[str, int] = field(default_factory=dict)  # all, dropped ones too: number → that DDL


@dataclass(slots=True)
class _Versions:
    """One table: its versions, oldest first. Up to the LSN `covered` no other is to be expected."""

    known: list[_Version] = field(default_factory=list)
    covered: int = -1
    unknown: Table | None = None  # what it is where no version tells


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
        self._covered = _NEVER
        self._unsettled = False
        self._tables: dict[tuple[str, str], _Versions] = {}
        self._roots = _Roots()
        self._saved = remembered
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

    # for pgoutput

    def primary_key(self, relation_oid: int) -> tuple[str, ...] | None:
        return self._index_columns(relation_oid, "i.indisprimary")

    def captures(self, schema: str, table: str) -> bool:
        return bool(self._router.subscriptions(schema, table))

    # for wal2json

    def advance(self, begin: Begin) -> bool:
        """See the decoder's protocol. What was looked up before this transaction committed may be out of date."""
        self._transaction = begin
        self._passed[begin.xid or 0] = None
        if len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]
        if (begin.commit_lsn or 0) < self._covered and not self._unsettled:
            return False
        self._covered, self._unsettled = _NEVER, False
        return True

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> Table:
        """See the decoder's protocol."""
        versions = self._tables.setdefault((schema, table), _Versions())
        if versions.covered <= (self._transaction.commit_lsn or 0):
            self._look(schema, table, versions)
        self._covered = min(self._covered, versions.covered)
        doubtful = not self.captures(schema, table) and self._in_doubt(versions)
        if doubtful and (root := self._assumed_root(schema, table, action, columns)):
            doubtful = False
            versions.known.insert(0, _Version(0, -1, 0, self._as_partition(schema, table, root)))
        found = self._current(schema, table, versions)
        return replace(found, doubtful=True) if doubtful else found

    def remember(self) -> dict[str, Any] | None:
        """What a restart must know of captured tables and partitions, if that changed since it was last asked for."""
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
        versions.covered, rows, looked_at = self._ask(_TABLE, (schema, table))
        if not rows or (versions.known and versions.known[-1].changed == rows[0][8]):
            return
        row = rows[0]
        found, since = self._found(schema, table, row), row[8]
        if not versions.known and found.partition:
            # Seen for the first time, as a partition: before it was attached it was a table of its own.
            versions.known.append(_Version(0, -1, 0, self._unknown(schema, table)))
            since = row[9]
        versions.known.append(_Version(since, looked_at, row[8], found, row[7], row[10]))

    def _ask(self, query: str, parameters: tuple[str, ...] = ()) -> tuple[int, list[tuple[Any, ...]], int]:
        """(LSN below which the look has seen every commit, rows, LSN above which it has seen none)."""
        with source_errors():
            before = self._connection.execute(_WAL_END).fetchone()
            rows = self._connection.execute(query.encode(), parameters or None).fetchall()
            after = self._connection.execute(_WAL_END).fetchone()
        return parse_lsn(before[0]) if before else 0, rows, parse_lsn(after[0]) if after else _NEVER

    def _found(self, schema: str, table: str, row: tuple[Any, ...]) -> Table:
        oid, root, partition, replica_identity, root_schema, root_table, generated, toastable = row[:8]
        identity = self._identity(oid, replica_identity)
        key = self._index_columns(root, "i.indisprimary") or (identity or None)
        relation = Relation(
            schema, table, f"{root_schema}.{root_table}", key, frozenset(identity), replica_identity == "f"
        )
        captured = self.captures(root_schema, root_table)
        return Table(relation, captured, partition, frozenset(generated), tuple(toastable))

    def _identity(self, oid: int, replica_identity: str) -> tuple[str, ...]:
        if replica_identity == "d":
            return self._index_columns(oid, "i.indisprimary") or ()
        return self._index_columns(oid, "i.indisreplident") or () if replica_identity == "i" else ()

    def _index_columns(self, oid: int, which: str) -> tuple[str, ...] | None:
        with source_errors():
            row = self._connection.execute(_PRIMARY_KEY.format(which=which).encode(), (oid,)).fetchone()
        return tuple(row[0]) if row and row[0] else None

    def _current(self, schema: str, table: str, versions: _Versions) -> Table:
        known = versions.known
        while len(known) > 1 and self._has_passed(known[1], known[0].table):
            del known[0]
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

    def _between(self, older: _Version, newer: _Version) -> Table:
        """The older version, less the columns that one of several DDLs up to the newer one has changed by now."""
        gone = {
            name
            for name, (number, since) in older.columns.items()
            if (changed := newer.attributes.get(str(number), since)) != since
            and self._passed_by(changed, newer.looked_at)
        }
        return replace(older.table, toastable=tuple(c for c in older.table.toastable if c not in gone))

    def _unknown(self, schema: str, table: str) -> Table:
        relation = Relation(schema, table, f"{schema}.{table}", None, frozenset())
        return Table(relation, self.captures(schema, table))

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
            covered, rows, looked_at = self._ask(_ROOTS)
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

    def _as_partition(self, schema: str, table: str, root: tuple[str, str]) -> Table:
        log.warning("catalog.partition_assumed", table=f"{schema}.{table}", root=".".join(root))
        found = self.table(*root, "I", {})
        return replace(found, relation=replace(found.relation, schema=schema, table=table), partition=True)

    def _has_passed(self, newer: _Version, older: Table) -> bool:
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

    def _restore(self, schema: str, table: str, entry: dict[str, Any]) -> Table:
        topic = entry["topic"]
        relation = Relation(
            schema,
            table,
            topic,
            tuple(entry["key"]) if entry["key"] else None,
            frozenset(entry["identity"]),
            entry["full"],
        )
        captured = self.captures(*topic.split(".", 1))
        return Table(relation, captured, entry["partition"], frozenset(entry["generated"]), tuple(entry["toastable"]))


def _entry(version: _Version) -> dict[str, Any]:
    table, relation = version.table, version.table.relation
    return {
        "changed": version.changed,
        "topic": relation.topic,
        "key": list(relation.key) if relation.key else None,
        "identity": sorted(relation.identity),
        "full": relation.full,
        "partition": table.partition,
        "generated": sorted(table.generated),
        "toastable": list(table.toastable),
    }
