"""Whether a table's updates and deletes can be published, as the server decides it, each with its mend. Pure.

Source: PostgreSQL, CheckCmdReplicaIdentity(). Without a replica identity, an application's own UPDATE fails as soon as
a publication has the table. For example, a deferrable primary key is no replica identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from psycopg import sql

from cdcbridge.config import Consumer
from cdcbridge.problem import Problem
from cdcbridge.source.tables import Table

_KEY: Final = "bigint generated always as identity primary key"


def identity_problems(consumer: Consumer, table: Table, *, strict: bool) -> Iterator[Problem]:
    """Find faults in the replica identity of a table, and of the leaves of a partitioned one.

    strict: pgoutput on PostgreSQL 18, which publishes no virtual generated column, and refuses REPLICA IDENTITY FULL
    with one.
    """
    writes = [operation for operation in ("update", "delete") if operation in consumer.operations]
    if not writes:
        return
    takes = f"consumer {consumer.name} takes {' and '.join(write + 's' for write in writes)} of {table.topic}"
    leaves = [leaf for leaf in table.leaves if leaf.logged]
    fixes = []
    if trouble := identity_trouble(table, strict=strict):
        takes += f", which has no usable replica identity: {trouble}"
        fixes.append(identity_fix(table, (), strict=strict))
    without = [(leaf, said) for leaf in leaves if (said := identity_trouble(leaf, strict=strict))]
    if without:
        said = "; ".join(f"{leaf.topic}: {trouble}" for leaf, trouble in without)
        takes += f", and partitions of it have no usable replica identity: {said}"
        fixes += [identity_fix(leaf, (), strict=strict) for leaf, _ in without]
    if fixes:
        yield Problem("replica_identity", "error", table.topic, takes, _joined(fixes))
        return
    uncovered = [one for one in (table, *leaves) if consumer.key and not set(consumer.key) <= one.identity]
    if not {column.name for column in table.columns}.issuperset(consumer.key or ()):
        return  # a name that no column has, which is a problem of its own
    if consumer.key and uncovered:
        missing = ", ".join(sorted({name for one in uncovered for name in set(consumer.key) - one.identity}))
        yield Problem(
            "key_not_covered",
            "error",
            table.topic,
            f"consumer {consumer.name} has the key ({', '.join(consumer.key)}), and a delete of {table.topic} carries"
            f" no {missing}: its replica identity does not cover it",
            _joined([identity_fix(one, consumer.key, strict=strict) for one in uncovered]),
        )


def identity_trouble(table: Table, *, strict: bool) -> str | None:
    """Say why PostgreSQL would refuse an UPDATE of the table, or the WAL would not identify its old rows."""
    if not table.identified:
        if table.replica_identity == "n":
            return "it is set to nothing"
        if table.replica_identity == "i":
            return "the index of its replica identity is gone"
        key = table.primary_key
        return "it has no primary key" if key is None else "its primary key is deferrable"
    if table.full and table.virtual and strict:
        return f"it is full, and PostgreSQL 18 cannot publish the virtual generated column {', '.join(table.virtual)}"
    index = table.identity_index
    hidden = [name for name in table.generated if index and name in index.columns]
    if hidden:
        return f"it contains the generated column {', '.join(hidden)}, whose values do not arrive"
    return None


def identity_fix(table: Table, key: Sequence[str], *, strict: bool) -> str:
    """Write the statement that gives the table a replica identity which covers `key`.

    In order of preference: the primary key, a unique index, the whole row, a new primary key.
    """
    name = table.identifier.as_string()
    fitting = [index for index in table.indexes if index.suitable and set(key) <= set(index.columns)]
    if any(index.primary for index in fitting):
        return f"alter table {name} replica identity default;"
    if fitting:
        return f"alter table {name} replica identity using index {sql.Identifier(fitting[0].name).as_string()};"
    if not (table.virtual and strict) and set(key).isdisjoint(table.generated):
        return f"alter table {name} replica identity full; -- or {_other_way(table, key)}"
    deferrable = table.primary_key
    if key or table.partition or table.kind == "p" or (deferrable and set(deferrable.columns) & set(table.generated)):
        columns = f"that include {', '.join(key)}" if key else "that are not generated"
        return f"Give {table.topic} a unique index of not-null columns {columns}, and set it as its replica identity."
    if deferrable:
        columns = sql.SQL(", ").join(map(sql.Identifier, deferrable.columns)).as_string()
        constraint = sql.Identifier(deferrable.name).as_string()
        return (
            f"alter table {name} drop constraint {constraint}, add primary key ({columns}), replica identity default;"
        )
    return f"alter table {name} add column cdcbridge_key {_KEY}, replica identity default; -- or a key of your own"


def _other_way(table: Table, key: Sequence[str]) -> str:
    """Say what else would do, for a table whose primary key or unique indexes do not."""
    primary = table.primary_key
    if primary is None:
        return f"give it a primary key{' with ' + ', '.join(key) if key else ''}"
    hidden = not set(primary.columns).isdisjoint(table.generated)
    if key:
        first = "leave the consumer's key out"
        if hidden or not primary.usable:
            return f"{first}, and make the primary key {'of other columns' if hidden else 'not deferrable'}"
        return f"{first}: then it is the primary key, {', '.join(primary.columns)}"
    return "give it a primary key without generated columns" if hidden else "make its primary key not deferrable"


def _joined(fixes: list[str]) -> str:
    """One line of statements: a comment would hide those after it."""
    if len(fixes) == 1:
        return fixes[0]
    return " ".join(fix.partition(" -- ")[0] for fix in fixes)
