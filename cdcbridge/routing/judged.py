"""Define two kinds of messages that a verdict is given on: a change as it arrives, and a message of the log.

The third kind is a message that an application wrote into the WAL, `logical_messages.Published`. A value that costs
time is made when a verdict first needs it. For example, a change that all filters refuse is never encoded. The module
is pure and never decides on a message: `verdict` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import orjson

from cdcbridge.changes.events import Begin, Change, Row
from cdcbridge.changes.keys import key_text
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.annotations import PLAIN, Encoder, annotating
from cdcbridge.routing.copy_format import GAP_TOPIC
from cdcbridge.routing.filters import FilterError, PartialRow, natives
from cdcbridge.routing.logical_messages import members


class Changed:
    """A change of a row, or a truncate, as the stream brings it."""

    __slots__ = ("_begin", "_change", "_data", "_environment", "_ordinal", "encode", "key", "old_key")

    def __init__(
        self,
        change: Change,
        key: str | None,
        old_key: str | None,
        begin: Begin | None,
        ordinal: int,
        encode: Encoder = PLAIN,
    ) -> None:
        """Take the change and its place in the WAL.

        Args:
            change: The change.
            key: The log's key of the row after the change.
            old_key: The log's key of the row before the change, if the WAL carried the old row.
            begin: The transaction, or None.
            ordinal: The place of the change in the transaction.
            encode: Makes `data`. It adds the annotation of the transaction, if there is one.
        """
        self.encode = encode
        self._change = change
        self._begin = begin
        self._ordinal = ordinal
        self._data: bytes | None = None
        self._environment: dict[str, Any] | None = None
        self.key = key
        self.old_key = old_key

    @property
    def of_table(self) -> bool:
        """True: filters apply to every change."""
        return True

    @property
    def identity(self) -> Collection[str]:
        """The columns of the table's replica identity."""
        return self._change.relation.identity

    @property
    def data(self) -> bytes:
        """The log's `data` of it, as JSON text."""
        if self._data is None:
            change = self._change
            self._data = self.encode(change.op, change.record, change.old, change.unchanged)
        return self._data

    @property
    def size(self) -> int:
        """The number of bytes of its `data`."""
        return len(self.data)

    def own_key(self, columns: Sequence[str]) -> str | None:
        """Return the key that these columns make."""
        return key_text(self._change.record, columns)

    def environment(self) -> tuple[dict[str, Any], Sequence[str]]:
        """Return the values of a filter's variables, and the columns that the WAL did not carry."""
        if self._environment is None:
            self._environment = self._read()
        return self._environment, self._change.unchanged

    def _read(self) -> dict[str, Any]:
        change, begin = self._change, self._begin
        commit_lsn = begin.commit_lsn if begin is not None else None
        return {
            "op": change.op,
            "topic": change.relation.topic,
            "key": self.key,
            "record": natives(change.record),
            "old": natives(change.old),
            "meta": {
                "schema": change.relation.schema,
                "table": change.relation.table,
                "commit_lsn": format_lsn(commit_lsn or 0),
                "ordinal": self._ordinal,
                "xid": begin.xid if begin is not None else None,
            },
        }

    def row_that_left(self) -> Row:
        """Return the row as a delete of it has it: whole under REPLICA IDENTITY FULL, else the identity's columns."""
        return _that_left(self._change.record, self._change.old, self.identity)


class Logged(NamedTuple):
    """A message of the log, or a row that a backfill is about to put there.

    Attributes:
        text: The message's `data` as JSON text.
        topic: The message's topic.
        key: The log's key.
        commit_lsn: The commit LSN of the message's position. None: it has no position.
        ordinal: The ordinal of the message's position.
        xid: The transaction. None: not known, as for rows of backfills.
        old_key: The log's key of the row before the update, if that was another one.
        its_key: The key that the consumer's own columns make, if it names some.
        identity: The columns of the table's replica identity, if they are known.
        size: The number of bytes of `data`, as the store counts them.
        least: The least number of bytes of a row that was too large to be loaded. Then `text` has only a part of it.
    """

    text: str | bytes
    topic: str
    key: str | None
    commit_lsn: str | None
    ordinal: int | None
    xid: int | None
    old_key: str | None = None
    its_key: str | None = None
    identity: Collection[str] = frozenset()
    size: int = 0
    least: int | None = None

    @property
    def of_table(self) -> bool:
        """True if filters apply to the message.

        They do not apply to published messages, whose topics have no dot, nor to gap messages.
        """
        return "." in self.topic and self.topic != GAP_TOPIC

    def own_key(self, columns: Sequence[str]) -> str | None:  # noqa: ARG002 - the store has made it of these
        """Return the key that the consumer's columns make."""
        return self.its_key

    @property
    def encode(self) -> Encoder:
        """The function that makes `data` with the annotation of the message, if it has one."""
        annotation = dict(members(_as_text(self.text))).get("annotation")
        return PLAIN if annotation is None else annotating(annotation.encode())

    def environment(self) -> tuple[dict[str, Any], Sequence[str]]:
        """Return the values of a filter's variables, and the columns that the WAL did not carry.

        Raises:
            FilterError: CEL cannot hold a value of the message, and no row is left without it.
        """
        try:
            data: dict[str, Any] = orjson.loads(self.text)
        except orjson.JSONDecodeError as error:
            data = _readable(self.text, error)
        schema, _, table = self.topic.partition(".")
        place = {"commit_lsn": self.commit_lsn, "ordinal": self.ordinal, "xid": self.xid}
        meta = {"schema": schema, "table": table, **place}
        environment = {**data, "topic": self.topic, "key": self.key, "meta": meta}
        return environment, environment.pop("unchanged")

    def row_that_left(self) -> Row:
        """Return the row as a delete of it has it, as for a change.

        Values remain the JSON texts that they are.
        """
        parts = dict(members(_as_text(self.text)))
        old = None if parts["old"] == "null" else _row(parts["old"])
        return _that_left(_row(parts["record"]), old, self.identity)


def known_before(record: Row, old: Row | None, identity: Collection[str]) -> Row:
    """Return the columns that are known of the row before an update.

    Without `old`, the update did not change the columns of the identity, so these are known from the row after it.

    Args:
        record: The row after the update.
        old: The row before the update as far as the WAL carried it, or None.
        identity: The columns of the table's replica identity.
    """
    return {name: value for name, value in record.items() if name in identity} if old is None else old


def _that_left(record: Row | None, old: Row | None, identity: Collection[str]) -> Row:
    """Return the row before the update.

    If no identity is known, for example for a table that was dropped, the result is the row after the update.
    """
    return known_before(record or {}, old, identity) or record or {}


def _readable(text: str | bytes, error: orjson.JSONDecodeError) -> dict[str, Any]:
    """Return the readable parts of `data`, because a filter may not need the rest.

    Raise FilterError if no row is left.
    """
    try:
        parts = dict(members(_as_text(text)))
        rows = {name: PartialRow(members(parts[name])) if parts[name] != "null" else None for name in ("record", "old")}
        return {"op": orjson.loads(parts["op"]), **rows, "unchanged": orjson.loads(parts["unchanged"])}
    except (ValueError, LookupError):
        raise FilterError(f"a value that CEL cannot hold: {error.msg}") from error


def _as_text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode()


def _row(text: str) -> Row:
    return {name: orjson.Fragment(value) for name, value in members(text)}
