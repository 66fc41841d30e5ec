"""What both decoders speak: typed events, with values that are ready to be JSON.

Plain data without behaviour. A value is None, bool, int, float, str, a list of values, or an
`orjson.Fragment` that holds JSON text which must not go through a Python number (numeric, json, jsonb).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

# orjson.Fragment has no useful static type, and a recursive alias only burdens the reader.
JsonValue: TypeAlias = Any
Row: TypeAlias = dict[str, JsonValue]


@dataclass(slots=True, frozen=True, eq=False)
class Relation:
    """A captured table as one moment of the stream knows it; compared by identity, so that plans can be cached.

    `topic` is `schema.table`, for a partition its root's. `key` names the columns of the log's key (primary key,
    else the replica identity's index), or is None. `identity` names the columns that an UPDATE or DELETE
    identifies its row by, and is empty where there is none; `full` tells that these are all columns. `columns` names
    all that a row has, less generated ones; empty where that is not known. As an event: from here on the table looks
    like this.
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
    """A transaction starts. `commit_time` is in microseconds since 2000-01-01 UTC; None where the input has none."""

    commit_lsn: int | None
    xid: int | None
    commit_time: int | None


@dataclass(slots=True)
class Commit:
    """The transaction that began last is complete; `end_lsn` is where the WAL goes on after it."""

    end_lsn: int | None
    commit_lsn: int | None = None


@dataclass(slots=True)
class Change:
    """One row: `op` is insert, update or delete; `record`, `old` and `unchanged` as CONTRACT's `data` has them."""

    op: str
    relation: Relation
    record: Row | None
    old: Row | None = None
    unchanged: tuple[str, ...] = ()


@dataclass(slots=True)
class Truncate:
    """One TRUNCATE: the relations that are topics of their own, and how many the plugin named in all."""

    relations: tuple[Relation, ...]
    named: int


@dataclass(slots=True)
class LogicalMessage:
    """pg_logical_emit_message. Outside a transaction when not `transactional`."""

    transactional: bool
    prefix: str
    content: bytes
    lsn: int | None


@dataclass(slots=True)
class Ignored:
    """Something the plugin sent that is nobody's message but has its ordinal: a change of a table not captured."""


Event: TypeAlias = Begin | Commit | Change | Truncate | LogicalMessage | Ignored | Relation
Converter: TypeAlias = Callable[[bytes], JsonValue]
