"""Decode pgoutput, protocol version 1, in text format, with publish_via_partition_root.

This module is pure. The protocol contains no primary keys and no definitions of types that are not built in. The
decoder gets them from the `PgoutputCatalog` and the `Types` of its caller. Never skips a message that it cannot decode.

Source: PostgreSQL manual, "Logical Replication Message Formats".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import orjson

from cdcbridge.changes.events import (
    Begin,
    Change,
    Commit,
    Converter,
    Event,
    Ignored,
    JsonValue,
    LogicalMessage,
    Relation,
    Row,
    Truncate,
)
from cdcbridge.changes.keys import key_columns
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.wal2json import TableShape
from cdcbridge.errors import DecodeError

_U16 = struct.Struct("!H").unpack_from
_U32 = struct.Struct("!I").unpack_from
_BEGIN = struct.Struct("!QqI")
_COMMIT = struct.Struct("!BQQq")
_MESSAGE = struct.Struct("!BQ")
_TEXT, _NULL, _UNCHANGED, _BINARY = b"t"[0], b"n"[0], b"u"[0], b"b"[0]
_NEW, _OLD_KEY, _OLD_ROW = b"N"[0], b"K"[0], b"O"[0]
_FULL: Final = b"f"[0]
_DEFAULT: Final = b"d"[0]


class PgoutputCatalog(Protocol):
    """The facts about tables that pgoutput does not send.

    The decoder asks for a table once per Relation message.
    """

    def advance(self, begin: Begin) -> bool:
        """Note that the stream has reached this transaction."""

    def captures(self, schema: str, table: str) -> bool:
        """Return whether any consumer may want this table."""

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        """Return the table as the current transaction saw it, for the columns and the order of its key."""


@dataclass(slots=True, frozen=True)
class _Known:
    """A Relation message, prepared for the rows after it.

    `columns` has a (name, converter) pair for each column, in the order in which the server sends the values.
    """

    relation: Relation
    columns: tuple[tuple[str, Converter], ...]
    captured: bool
    generated: frozenset[str] = frozenset()  # PostgreSQL 18 sends them; `record` omits them


_Identity: TypeAlias = tuple[frozenset[str], bool]  # the columns of a replica identity, and True if it is FULL


class PgoutputDecoder:
    """A decoder for messages of pgoutput.

    events() yields one event for each message. It yields none for Type, Origin, and the Relation of a table that is not
    captured.
    """

    plugin: Final = "pgoutput"

    def __init__(
        self,
        types: Types,
        catalog: PgoutputCatalog,
        where: Callable[[], int | None] = lambda: None,
        to_utf8: Callable[[bytes], bytes] = lambda content: content,
    ) -> None:
        """Create a decoder that knows no table yet.

        Args:
            types: The converters of values.
            catalog: The facts about tables.
            where: Returns the LSN of the current message, for errors.
            to_utf8: Converts the content of a logical message to UTF-8.
        """
        self._where = where
        self._to_utf8 = to_utf8
        self._types = types
        self._catalog = catalog
        self._relations: dict[int, _Known] = {}
        self._fresh: list[int] = []  # relations whose message arrived after the last change
        self._leaves: dict[int, dict[int, _Identity]] = {}  # partitioned table -> partitions that had changes
        self._readers: dict[int, Callable[[bytes], Event | None]] = {
            b"I"[0]: self._insert,
            b"U"[0]: self._update,
            b"D"[0]: self._delete,
            b"B"[0]: self._begin,
            b"C"[0]: self._commit,
            b"R"[0]: self._relation,
            b"T"[0]: self._truncate,
            b"M"[0]: self._message,
            b"Y"[0]: self._type,
            b"O"[0]: self._origin,
        }

    def events(self, messages: Iterable[bytes]) -> Iterator[Event]:
        """Yield the events of these messages.

        This is a generator because it runs for every row, so the cost of a call matters.

        Raises:
            DecodeError: One of the messages is not exactly one message of the protocol.
        """
        readers = self._readers
        for message in messages:
            try:
                event = readers[message[0]](message)
            except DecodeError as error:
                raise DecodeError(self.plugin, error.reason, offset=error.offset, lsn=self._where()) from None
            except KeyError:
                raise DecodeError(self.plugin, f"unknown message type {message[:1]!r}", lsn=self._where()) from None
            except (struct.error, IndexError, ValueError) as error:
                reason = f"malformed or truncated {message[:1]!r} message: {error}" if message else "empty message"
                raise DecodeError(self.plugin, reason, offset=len(message), lsn=self._where()) from error
            if event is not None:
                yield event

    # rows: the hot path

    def _insert(self, message: bytes) -> Event:
        known = self._known(message)
        if message[5] != _NEW:
            raise DecodeError(self.plugin, f"INSERT without a new row: {message[5:6]!r}", offset=5)
        record, end, _ = self._row(message, 6, known)
        _expect_end(message, end)
        return Change("insert", known.relation, record) if known.captured else Ignored()

    def _update(self, message: bytes) -> Event:
        known = self._known(message)
        position, old = 5, None
        identity, full = known.relation.identity, known.relation.full
        if message[5] in (_OLD_KEY, _OLD_ROW):
            old, position, _ = self._row(message, 6, known)
            identity, full = self._identity_of(message, known, old)
            if not full:
                old = {name: old[name] for name in old if name in identity}
        if message[position] != _NEW:
            raise DecodeError(
                self.plugin, f"UPDATE without a new row: {message[position : position + 1]!r}", offset=position
            )
        record, end, unchanged = self._row(message, position + 1, known)
        _expect_end(message, end)
        if unchanged and old is not None:
            record, unchanged, old = _filled(known, record, unchanged, old, keep=full)
        return Change("update", known.relation, record, old, unchanged) if known.captured else Ignored()

    def _delete(self, message: bytes) -> Event:
        known = self._known(message)
        if message[5] not in (_OLD_KEY, _OLD_ROW):
            raise DecodeError(self.plugin, f"DELETE without an old row: {message[5:6]!r}", offset=5)
        record, end, _ = self._row(message, 6, known)
        _expect_end(message, end)
        identity, full = self._identity_of(message, known, record)
        if not full:
            record = {name: record[name] for name in record if name in identity}
        return Change("delete", known.relation, record) if known.captured else Ignored()

    def _identity_of(self, message: bytes, known: _Known, old: Row) -> _Identity:
        """Return the replica identity by which an old row was sent.

        The server sends the changes of a partition as changes of its root. The Relation message of the root contains
        the root's own identity. Before the first change of a partition, the server also sends the partition's Relation
        message. The identity in the partition's message applies.
        """
        leaves = self._leaves.get(_U32(message, 1)[0])
        if not leaves:
            return known.relation.identity, known.relation.full
        found = set(leaves.values())
        if len(found) == 1:
            return next(iter(found))
        # The partitions differ. If the row was sent by a key, all its other columns are null.
        carried = {name for name, value in old.items() if value is not None}
        fitting = [identity for identity in found if not identity[1] and carried <= identity[0]]
        return min(fitting, key=lambda identity: len(identity[0])) if fitting else (known.relation.identity, True)

    def _row(self, message: bytes, position: int, known: _Known) -> tuple[Row, int, tuple[str, ...]]:
        """Decode the TupleData at `position`.

        The result is the values by column, the position after the data, and the columns whose values were not sent.
        """
        record: Row = {}
        unchanged: tuple[str, ...] = ()
        (count,) = _U16(message, position)
        if count != len(known.columns):
            reason = f"{known.relation.topic}: {count} values for {len(known.columns)} columns"
            raise DecodeError(self.plugin, reason, offset=position)
        position += 2
        for name, convert in known.columns:
            kind = message[position]
            if kind == _TEXT:
                start = position + 5
                position = start + _U32(message, position + 1)[0]
                # A truncated value moves `position` past the end, which the callers refuse.
                record[name] = convert(message[start:position])
            elif kind == _NULL:
                record[name] = None
                position += 1
            elif kind == _UNCHANGED:
                unchanged = (*unchanged, name)
                position += 1
            else:
                raise DecodeError(
                    self.plugin, f"column {name}: unknown kind {message[position : position + 1]!r}", offset=position
                )
        if known.generated:
            record = {name: value for name, value in record.items() if name not in known.generated}
            unchanged = tuple(name for name in unchanged if name not in known.generated)
        return record, position, unchanged

    def _known(self, message: bytes) -> _Known:
        (oid,) = _U32(message, 1)
        known = self._relations.get(oid)
        if known is None:
            raise DecodeError(self.plugin, f"a change of relation {oid}, which no Relation message named", offset=1)
        if self._fresh:
            self._attribute(oid)
        return known

    def _attribute(self, oid: int) -> None:
        """Note the partitions of a table.

        A relation is a partition of this table if its Relation message arrived just before a change of the table.
        """
        for leaf in self._fresh:
            if leaf != oid:
                relation = self._relations[leaf].relation
                self._leaves.setdefault(oid, {})[leaf] = (relation.identity, relation.full)
        self._fresh.clear()

    # everything else

    def _begin(self, message: bytes) -> Event:
        commit_lsn, commit_time, xid = _BEGIN.unpack(message[1:])
        begin = Begin(commit_lsn, xid, commit_time)
        self._catalog.advance(begin)
        self._fresh.clear()
        return begin

    def _commit(self, message: bytes) -> Event:
        _flags, commit_lsn, end_lsn, _time = _COMMIT.unpack(message[1:])
        return Commit(end_lsn, commit_lsn)

    def _relation(self, message: bytes) -> Event | None:
        (oid,) = _U32(message, 1)
        schema, position = _string(message, 5)
        table, position = _string(message, position)
        replica_identity = message[position]
        (count,) = _U16(message, position + 1)
        position += 3
        columns: list[tuple[str, Converter]] = []
        identity: list[str] = []
        for _ in range(count):
            flags = message[position]
            name, position = _string(message, position + 1)
            (type_oid,) = _U32(message, position)
            position += 8  # the OID of the type, and its modifier
            columns.append((name, self._types.converter(type_oid)))
            if flags & 1:
                identity.append(name)
        _expect_end(message, position)
        schema = schema or "pg_catalog"
        captured = self._catalog.captures(schema, table)
        full = replica_identity == _FULL
        names = frozenset(name for name, _ in columns)
        key: tuple[str, ...] | None = None
        generated: frozenset[str] = frozenset()
        if captured:
            known = self._catalog.table(schema, table, "I", {})
            generated = known.generated & names
            names -= generated
            key = _key(known, replica_identity, tuple(name for name in identity if name in names), names)
        relation = Relation(schema, table, f"{schema}.{table}", key, frozenset(identity) & names, full, names)
        self._relations[oid] = _Known(relation, tuple(columns), captured, generated)
        self._fresh.append(oid)
        return relation if captured else None

    def _truncate(self, message: bytes) -> Event:
        (count,) = _U32(message, 1)
        oids = struct.unpack(f"!{count}I", message[6:])
        missing = [oid for oid in oids if oid not in self._relations]
        if missing:
            raise DecodeError(self.plugin, f"TRUNCATE of relation {missing[0]}, which no Relation message named")
        known = [self._relations[oid] for oid in oids]
        self._fresh.clear()
        return Truncate(tuple(k.relation for k in known if k.captured), count)

    def _message(self, message: bytes) -> Event:
        flags, lsn = _MESSAGE.unpack_from(message, 1)
        prefix, position = _string(message, 10)
        (size,) = _U32(message, position)
        _expect_end(message, position + 4 + size)
        return LogicalMessage(bool(flags & 1), prefix, self._to_utf8(message[position + 4 :]), lsn)

    def _type(self, message: bytes) -> None:
        """Check a Type message, which contains only the name of a type that is not built in.

        The definition of the type is read from the catalogue when a column needs it.
        """
        _schema, position = _string(message, 5)
        _name, position = _string(message, position)
        _expect_end(message, position)

    def _origin(self, message: bytes) -> None:
        _name, position = _string(message, 9)
        _expect_end(message, position)


def _key(table: TableShape, kind: int, sent: tuple[str, ...], columns: frozenset[str]) -> tuple[str, ...] | None:
    """Return the columns of the log's key at a Relation message.

    Args:
        table: The table in the catalogue. It has the order of a key's columns, and may be younger than the message.
        kind: The replica identity: d, n, f or i.
        sent: The columns of the identity, as the message has them.
        columns: The columns of the table, without generated ones.
    """
    full = kind == _FULL
    primary = table.primary_key if set(table.primary_key) <= columns else ()
    identity = table.identity_order if set(table.identity_order) == set(sent) else sent
    if kind == _DEFAULT and sent:
        primary = primary if set(primary) == set(sent) else sent
    return key_columns(primary, () if full else identity, full=full)


def _filled(
    known: _Known, record: Row, unchanged: tuple[str, ...], old: Row, *, keep: bool
) -> tuple[Row, tuple[str, ...], Row | None]:
    """Return (record, unchanged, old) of an update, with values of the old row for those that the new row omits.

    The new row omits values that are stored out of line and did not change. `keep` means that the old row is a whole
    row. Otherwise the old row is a key. The server also sends a key of which nothing changed, if one of its columns is
    stored out of line. Then the update has no old key to report, and `old` is None.
    """
    carried = [name for name in unchanged if name in old]
    if not keep and carried and all(_same(old[name], record[name]) for name in old if name in record):
        kept: Row | None = None
    else:
        kept = old
    row = {
        name: record[name] if name in record else old[name]
        for name, _ in known.columns
        if name in record or name in old
    }
    return row, tuple(name for name in unchanged if name not in old), kept


def _same(one: JsonValue, other: JsonValue) -> bool:
    """Compare two values as JSON, because a Fragment is equal only to itself."""
    return orjson.dumps(one) == orjson.dumps(other)


def _string(message: bytes, position: int) -> tuple[str, int]:
    end = message.index(b"\0", position)
    return message[position:end].decode(), end + 1


def _expect_end(message: bytes, position: int) -> None:
    if position != len(message):
        reason = "cut off" if position > len(message) else "followed by unknown bytes"
        raise DecodeError("pgoutput", f"message {message[:1]!r} is {reason}", offset=min(position, len(message)))
