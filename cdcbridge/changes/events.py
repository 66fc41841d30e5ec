"""The typed events that both decoders produce, with values that are ready to become JSON.

Events are plain data without behaviour. A value is None, bool, int, float, str or a list of values. A value can also be
an `orjson.Fragment`, which holds JSON text. Such text must not become a Python number, which could lose digits
(numeric, json, jsonb). Never reads the output of a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

# orjson.Fragment has no useful static type, and a recursive alias would be harder to read.
JsonValue: TypeAlias = Any
Row: TypeAlias = dict[str, JsonValue]


@dataclass(slots=True, frozen=True, eq=False)
class Relation:
    """A table as it is at one point of the stream.

    As an event, a relation means that the table has this definition from here on. Two relations are equal only if they
    are the same object, so that plans can be cached by relation.

    Attributes:
        schema: The table's schema.
        table: The table's name.
        topic: `schema.table` of the table. A partition has the topic of its root.
        key: The columns of the log's key, or None. They are the primary key, else the index of the replica identity.
        identity: The columns that identify the row of an UPDATE or DELETE. Empty if there are none.
        full: The replica identity is FULL, so all columns identify the row, even if `identity` is empty.
        columns: The columns of a row, without generated ones. Empty if they are not known.
    """

    schema: str
    table: str
    topic: str
    key: tuple[str, ...] | None
    identity: frozenset[str]
    full: bool = False
    columns: frozenset[str] = frozenset()


@dataclass(slots=True)
class Begin:
    """The start of a transaction.

    `commit_time` is in microseconds since 2000-01-01 UTC. It is None if the input does not contain the time.
    """

    commit_lsn: int | None
    xid: int | None
    commit_time: int | None


@dataclass(slots=True)
class Commit:
    """The end of the transaction that began last.

    `end_lsn` is the LSN at which the WAL continues after the transaction.
    """

    end_lsn: int | None
    commit_lsn: int | None = None


@dataclass(slots=True)
class Change:
    """A change of one row.

    `op` is insert, update or delete. `record`, `old` and `unchanged` are as in the `data` of a message
    (docs/CONSUMERS.md).
    """

    op: str
    relation: Relation
    record: Row | None
    old: Row | None = None
    unchanged: tuple[str, ...] = ()


@dataclass(slots=True)
class Truncate:
    """A TRUNCATE of one or more tables.

    Attributes:
        relations: The tables that are topics of their own.
        named: The number of tables that the plugin named in all.
    """

    relations: tuple[Relation, ...]
    named: int


@dataclass(slots=True)
class LogicalMessage:
    """A message of pg_logical_emit_message(), which is outside of any transaction if it is not `transactional`."""

    transactional: bool
    prefix: str
    content: bytes
    lsn: int | None


@dataclass(slots=True)
class Ignored:
    """Output of the plugin that becomes no message but counts in the ordinals.

    An example is a change of a table that is not captured.
    """


Event: TypeAlias = Begin | Commit | Change | Truncate | LogicalMessage | Ignored | Relation
Converter: TypeAlias = Callable[[bytes], JsonValue]
