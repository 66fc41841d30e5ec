"""Check that a table's updates and deletes can be published, by the rules of the server, and give a fix if not.

Source: PostgreSQL, CheckCmdReplicaIdentity(). Without a replica identity, an application's own UPDATE fails as soon as
the table is in a publication. For example, a deferrable primary key cannot be the replica identity. This module never
accesses a database.
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
    """Yield the faults of a table's replica identity, and of the leaf partitions of a partitioned table.

    Args:
        consumer: The consumer that takes the table.
        table: The table, with its leaf partitions.
        strict: True for pgoutput on PostgreSQL 18, which does not publish virtual generated columns, and refuses
            REPLICA IDENTITY FULL on a table that has one.
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
        return  # the key names a missing column, which checks/columns.py reports
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
    """Return the reason why PostgreSQL refuses an UPDATE of the table, or why its old rows cannot be identified.

    The result is None if the replica identity is usable. For `strict` see `identity_problems()`.
    """
    if not table.identified:
        if table.replica_identity == "n":
            return "its replica identity is set to nothing"
        if table.replica_identity == "i":
            return "the index of its replica identity does not exist"
        key = table.primary_key
        return "it has no primary key" if key is None else "its primary key is deferrable"
    if table.full and table.virtual and strict:
        return (
            "its replica identity is full, and PostgreSQL 18 cannot publish the virtual generated column"
            f" {', '.join(table.virtual)}"
        )
    index = table.identity_index
    hidden = [name for name in table.generated if index and name in index.columns]
    if hidden:
        return f"its replica identity contains the generated column {', '.join(hidden)}, whose values do not arrive"
    return None


def identity_fix(table: Table, key: Sequence[str], *, strict: bool) -> str:
    """Return the statement that gives the table a replica identity with all columns of `key`.

    The order of preference is: the primary key, a unique index, the whole row, a new primary key. If no statement
    would do, the fix is a sentence. For `strict` see `identity_problems()`.
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
    """Return the alternative to REPLICA IDENTITY FULL for a table whose own indexes do not fit."""
    primary = table.primary_key
    if primary is None:
        return f"give it a primary key{' with ' + ', '.join(key) if key else ''}"
    hidden = not set(primary.columns).isdisjoint(table.generated)
    if key:
        first = "leave the consumer's key out"
        if hidden or not primary.usable:
            return f"{first}, and make the primary key {'of other columns' if hidden else 'not deferrable'}"
        return f"{first}, so that the key is the primary key, {', '.join(primary.columns)}"
    return "give it a primary key without generated columns" if hidden else "make its primary key not deferrable"


def _joined(fixes: list[str]) -> str:
    """Join the statements to one line, without their comments: a comment would hide the statements after it."""
    if len(fixes) == 1:
        return fixes[0]
    return " ".join(fix.partition(" -- ")[0] for fix in fixes)
