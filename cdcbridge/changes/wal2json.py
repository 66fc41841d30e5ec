"""Decode wal2json, format version 2: one JSON object per message, with type OIDs and without type names.

The format does not show the root of a partition, the order of a key's columns, or the generated columns. The format
also omits TOASTed values that did not change, without naming their columns. The decoder asks the `Wal2jsonCatalog` of
its caller for all of these. This module is pure. Never skips a message that it cannot decode.

Source: wal2json's README. Edge cases were measured on versions 2.5 and 2.6.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeAlias

import orjson

from cdcbridge.changes.events import (
    Begin,
    Change,
    Commit,
    Event,
    Ignored,
    JsonValue,
    LogicalMessage,
    Relation,
    Row,
    Truncate,
)
from cdcbridge.changes.keys import key_columns
from cdcbridge.changes.pgtypes import (
    BOOL,
    BYTEA,
    FLOATING,
    INTEGERS,
    NUMERIC,
    OID,
    TIMESTAMP,
    TIMESTAMPTZ,
    Types,
    text,
    timestamp,
    timestamptz,
)
from cdcbridge.errors import DecodeError
from cdcbridge.lsn import parse_lsn

Parsed = dict[str, Any]
_POSTGRES_EPOCH = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
# wal2json writes numeric values without quotes, and orjson would read them as doubles. Inside a JSON string every
# quote is escaped, so these bytes can only be followed by the value of a numeric column.
_NUMERIC_MARK: Final = b'"typeoid":%d,"value":' % NUMERIC
_STAMPS: Final[dict[int, Callable[[str], JsonValue]]] = {TIMESTAMP: timestamp, TIMESTAMPTZ: timestamptz}
_NUMERIC_VALUE = re.compile(re.escape(_NUMERIC_MARK) + rb"(-?[0-9][^,}]*)")


@dataclass(slots=True, frozen=True)
class TableShape:
    """The definition of one table in the catalogue, at some moment.

    Attributes:
        relation: The table.
        captured: A consumer may want the table.
        partition: The rows belong to the topic of the root.
        generated: The generated columns.
        toastable: The columns that an UPDATE may omit.
        doubtful: The decoder has to ask again for the next row, which may give more information.
        primary_key: The columns of the root's primary key, in key order.
        identity_order: The columns of the replica identity's index, in key order.
        replica_identity: d, n, f or i, as in pg_class.
    """

    relation: Relation
    captured: bool
    partition: bool = False
    generated: frozenset[str] = frozenset()
    toastable: tuple[str, ...] = ()
    doubtful: bool = False
    primary_key: tuple[str, ...] = ()
    identity_order: tuple[str, ...] = ()
    replica_identity: str = "d"


class Wal2jsonCatalog(Protocol):
    """The facts about tables that wal2json does not send."""

    def advance(self, begin: Begin) -> bool:
        """Note that the stream has reached this transaction.

        Returns:
            True if the answers of table() may have changed.
        """

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        """Return the table as the current transaction saw it.

        Args:
            schema: The table's schema.
            table: The table's name.
            action: The kind of the message: I, U, D or T.
            columns: The columns in the message, with their type OIDs.
        """


_Special: TypeAlias = tuple[tuple[int, Callable[[Any], JsonValue]], ...]


class _Specials(dict[tuple[int, ...], _Special]):
    """The type OIDs of a row → (index, converter) of each column that needs a converter.

    The values of the other columns are already right in wal2json.
    """

    def __init__(self, types: Types, numbers_as_text: bool) -> None:
        super().__init__()
        self._types = types
        self.numbers_as_text = numbers_as_text

    def __missing__(self, oids: tuple[int, ...]) -> _Special:
        found = [(index, self._converter(oid & 0xFFFFFFFF)) for index, oid in enumerate(oids)]  # printed as signed
        self[oids] = special = tuple((index, convert) for index, convert in found if convert is not None)
        return special

    def _converter(self, oid: int) -> Callable[[Any], JsonValue] | None:
        if oid in INTEGERS:
            return int if self.numbers_as_text else None
        if oid in FLOATING:
            return _number if oid == NUMERIC or self.numbers_as_text else None
        if oid == OID:
            return str
        if oid == BYTEA:
            return _bytea
        if oid == BOOL:
            return None
        if oid in _STAMPS:
            return _STAMPS[oid]
        from_text = self._types.converter(oid)
        if from_text is text:
            return None
        return lambda value: from_text(value.encode()) if isinstance(value, str) else value


def _number(value: Any) -> JsonValue:
    # As in pgtypes.number(), digits stay as they are, and NaN and Infinity are strings.
    return orjson.Fragment(value) if isinstance(value, str) and "0" <= value[-1:] <= "9" else value


def _quoted(match: re.Match[bytes]) -> bytes:
    # This is a function, because re takes four times as long for a template that contains a group.
    return _NUMERIC_MARK + b'"' + match[1] + b'"'


def _is_utf8(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True


def _offset(message: bytes, position: int) -> int:
    """Convert a position in the text with added quotes to a position in the message."""
    added = 0
    for match in _NUMERIC_VALUE.finditer(message):
        added += 2 * (match.end() + added + 2 <= position)
    return position - added


def _bytea(value: str) -> JsonValue:
    return "\\x" + value


class Wal2jsonDecoder:
    """A decoder that yields exactly one event for each message of wal2json."""

    plugin: Final = "wal2json"

    def __init__(
        self,
        types: Types,
        catalog: Wal2jsonCatalog,
        where: Callable[[], int | None] = lambda: None,
        *,
        numbers_as_text: bool = False,
    ) -> None:
        """Create a decoder that knows no table yet.

        Args:
            types: The converters of values.
            catalog: The facts about tables.
            where: Returns the LSN of the current message, for errors.
            numbers_as_text: The option numeric-data-types-as-string is on (wal2json 2.6 and newer).
        """
        self._where = where
        self._catalog = catalog
        self._specials = _Specials(types, numbers_as_text)
        self._tables: dict[tuple[str, str], tuple[TableShape, list[Parsed] | None]] = {}  # with the row's primary key
        self._keyed: dict[tuple[Relation, tuple[str, ...]], TableShape] = {}
        self._oids: list[int] = []  # of the last row; _special has their converters
        self._special: _Special = ()
        self._readers: dict[str, Callable[[Parsed], Event]] = {
            "I": self._insert,
            "U": self._update,
            "D": self._delete,
            "B": self._begin,
            "C": self._commit,
            "T": self._truncate,
            "M": self._message,
        }

    def events(self, messages: Iterable[bytes]) -> Iterator[Event]:
        """Yield one event for each message of format 2.

        This is a generator because it runs for every row, so the cost of a call matters.

        Raises:
            DecodeError: One of the messages is not a message of format 2.
        """
        loads, quote, readers = orjson.loads, _NUMERIC_VALUE.sub, self._readers
        for message in messages:
            try:
                parsed = loads(quote(_quoted, message))
                event = readers[parsed["action"]](parsed)
            except orjson.JSONDecodeError as error:
                event = self._unparsed(message, error)
            except DecodeError as error:
                raise DecodeError(self.plugin, error.reason, lsn=self._where()) from None
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"not a message of format 2: {type(error).__name__}: {error}: {message[:120]!r}"
                raise DecodeError(self.plugin, reason, lsn=self._where()) from error
            yield event

    def _unparsed(self, message: bytes, error: orjson.JSONDecodeError) -> Event:
        if message.startswith(b'{"action":"M"') and not _is_utf8(message):
            # Any role may emit any bytes as the content of a logical message. That must not stop the changes.
            return next(self.events([message.decode(errors="replace").encode()]))
        offset = _offset(message, error.pos)
        raise DecodeError(self.plugin, f"not JSON: {error.msg}", offset=offset, lsn=self._where()) from None

    # rows: the hot path

    def _insert(self, parsed: Parsed) -> Event:
        table = self._table(parsed)
        if not table.captured:
            return Ignored()
        return Change("insert", table.relation, self._row(parsed["columns"], table))

    def _update(self, parsed: Parsed) -> Event:
        table = self._table(parsed)
        if not table.captured:
            return Ignored()
        columns, identity = parsed["columns"], parsed["identity"]
        record = self._row(columns, table)
        missing = [name for name in table.toastable if name not in record]
        new = {column["name"]: column["value"] for column in columns}
        full = table.relation.full
        changed = full or any(column["value"] != new.get(column["name"], column["value"]) for column in identity)
        old = self._row(identity, table) if changed or missing else {}
        if missing:
            # The old row, or the old key, contains values that the new row omits because they did not change.
            record.update((name, old[name]) for name in missing if name in old)
            missing = [name for name in missing if name not in old]
        return Change("update", table.relation, record, old if changed else None, tuple(missing))

    def _delete(self, parsed: Parsed) -> Event:
        table = self._table(parsed)
        if not table.captured:
            return Ignored()
        return Change("delete", table.relation, self._row(parsed["identity"], table))

    def _row(self, columns: list[Parsed], table: TableShape) -> Row:
        record: Row = {}
        oids = []
        for column in columns:
            record[column["name"]] = column["value"]
            oids.append(column["typeoid"])
        if oids != self._oids:
            self._oids, self._special = oids, self._specials[tuple(oids)]
        for index, convert in self._special:
            name = columns[index]["name"]
            if (value := record[name]) is not None:
                record[name] = convert(value)
        for name in table.generated:
            record.pop(name, None)
        return record

    def _table(self, parsed: Parsed) -> TableShape:
        name = (parsed["schema"], parsed["table"])
        primary_key = parsed.get("pk")
        known = self._tables.get(name)
        if known is not None and known[1] == primary_key:
            return known[0]
        row = parsed.get("columns") or parsed.get("identity") or []
        columns = {column["name"]: column["typeoid"] & 0xFFFFFFFF for column in row}  # wal2json prints them signed
        found = self._catalog.table(*name, parsed["action"], columns)
        if primary_key is not None and found.captured:
            found = self._with_key(found, tuple(column["name"] for column in primary_key))
        if not found.doubtful:
            self._tables[name] = (found, primary_key)
        return found

    def _with_key(self, table: TableShape, sent: tuple[str, ...]) -> TableShape:
        """Return the table with the primary key that it had at this change.

        `sent` is that key, with its columns in the order of the table. The catalogue has the order of the key's
        columns, but is older or younger than the change. Rows that were written before the key existed, for example by
        `pg_restore`, are sent without a key. They get the key of the catalogue.
        """
        primary = table.primary_key if not sent or set(table.primary_key) == set(sent) else sent
        identity = primary if table.replica_identity == "d" else table.identity_order
        key = key_columns(primary, identity, full=table.relation.full)
        if key == table.relation.key:
            return table
        found = self._keyed.get((table.relation, sent))
        if found is None:
            relation = replace(table.relation, key=key, identity=frozenset(identity))
            found = self._keyed[table.relation, sent] = replace(table, relation=relation)
        return found

    # everything else

    def _begin(self, parsed: Parsed) -> Event:
        begin = Begin(parse_lsn(parsed["lsn"]), parsed["xid"], postgres_microseconds(parsed["timestamp"]))
        if self._catalog.advance(begin):
            self._tables.clear()
        return begin

    def _commit(self, parsed: Parsed) -> Event:
        return Commit(parse_lsn(parsed["nextlsn"]), parse_lsn(parsed["lsn"]))

    def _truncate(self, parsed: Parsed) -> Event:
        table = self._table(parsed)
        # A TRUNCATE of a partitioned table names the root and then each partition. Only the root's message counts.
        return Truncate((table.relation,) if table.captured and not table.partition else (), 1)

    def _message(self, parsed: Parsed) -> Event:
        return LogicalMessage(
            parsed["transactional"], parsed["prefix"], parsed["content"].encode(), parse_lsn(parsed["lsn"])
        )


def postgres_microseconds(stamp: str) -> int:
    """Convert a time to microseconds since 2000-01-01 UTC, as PostgreSQL stores it.

    An example of such a time is `2024-02-29 12:00:00.5+00`.
    """
    return (dt.datetime.fromisoformat(stamp) - _POSTGRES_EPOCH) // _MICROSECOND
