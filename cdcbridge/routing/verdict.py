"""Decide whether a consumer gets a message that its tables and operations match, or a delete instead. Pure.

The one place that decides this, for changes as they arrive, for rows of backfills, and for what the log holds already.
So a message is the same whichever way it takes.

`on_leave: delete` answers the question "did the row match before this update?". Where the WAL does not tell, the answer
is yes. For example, an order goes from paid to cancelled, and the consumer's filter is `record.status == 'paid'`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import orjson

from cdcbridge.changes.events import Row
from cdcbridge.changes.keys import key_text
from cdcbridge.routing.copy_format import encode_data
from cdcbridge.routing.filters import FilterError, PartialRow
from cdcbridge.routing.logical_messages import members
from cdcbridge.routing.subscription import Subscription

Verdict: TypeAlias = Literal["taken", "passed", "left"]
_NONE: Final[frozenset[str]] = frozenset()


class Logged(NamedTuple):
    """A message of the log: its `data` as JSON text, and the other values that a filter may read."""

    text: str | bytes
    topic: str
    key: str | None
    commit_lsn: str | None
    ordinal: int | None
    xid: int | None
    old_key: str | None = None


def verdict(
    wanted: Subscription,
    environment: dict[str, Any],
    unchanged: Sequence[str],
    identity: Collection[str],
    old_key: str | None = None,
) -> Verdict:
    """Decide on a table's message. Raises FilterError where it must become a dead letter.

    environment: a value for each variable of a filter.
    unchanged: columns that the WAL did not carry.
    identity: the columns of the table's replica identity.
    old_key: the log's key of the row before the update, if that was another one.
    """
    if wanted.filter is None or wanted.filter.wants(environment, unchanged):
        return "taken"
    if not wanted.on_leave or environment["op"] != "update":
        return "passed"
    record, old = environment["record"] or {}, environment["old"]
    before = _known_before(record, old, identity)
    unknown = [name for name in (*record, *unchanged) if name not in before]
    key = environment["key"] if old_key is None else old_key
    # The row became known to the consumer by one of these.
    for op in ("insert", "update", "read") if wanted.filter.reads_op else ("update",):
        try:
            if wanted.filter.wants({**environment, "op": op, "record": before, "old": None, "key": key}, unknown):
                return "left"
        except FilterError:
            return "left"  # it cannot be told
    return "passed"


def verdict_of_text(wanted: Subscription, message: Logged, identity: Collection[str] = _NONE) -> Verdict:
    """Decide on a message of the log. Raises FilterError."""
    if wanted.filter is None:
        return "taken"
    return verdict(wanted, *environment_of(message), identity, message.old_key)


def environment_of(message: Logged) -> tuple[dict[str, Any], Sequence[str]]:
    """The values that a filter reads of a message, and the columns that the WAL did not carry. Raises FilterError."""
    try:
        data: dict[str, Any] = orjson.loads(message.text)
    except orjson.JSONDecodeError as error:
        data = _readable(message.text, error)
    schema, _, table = message.topic.partition(".")
    place = {"commit_lsn": message.commit_lsn, "ordinal": message.ordinal, "xid": message.xid}
    meta = {"schema": schema, "table": table, **place}
    environment = {**data, "topic": message.topic, "key": message.key, "meta": meta}
    return environment, environment.pop("unchanged")


def _readable(text: str | bytes, error: orjson.JSONDecodeError) -> dict[str, Any]:
    """What can be read of `data`: a filter may do without the rest. Raises FilterError where no row is left."""
    try:
        parts = dict(members(text if isinstance(text, str) else text.decode()))
        rows = {name: PartialRow(members(parts[name])) if parts[name] != "null" else None for name in ("record", "old")}
        return {"op": orjson.loads(parts["op"]), **rows, "unchanged": orjson.loads(parts["unchanged"])}
    except (ValueError, LookupError):
        raise FilterError(f"a value that CEL cannot hold: {error.msg}") from error


def row_that_left(record: Row | None, old: Row | None, identity: Collection[str]) -> Row:
    """The row as a delete of it has it: whole under REPLICA IDENTITY FULL, else the identity's columns.

    Where no identity is known, for example of a table that is gone, it is the row as the update made it.
    """
    return _known_before(record or {}, old, identity) or record or {}


def deletion(row: Row) -> bytes:
    """The `data` of the message that says that the row left."""
    return encode_data("delete", row, None, ())


def text_that_left(text: str, identity: Collection[str]) -> Row:
    """row_that_left() of a message of the log. Values stay the texts that they are."""
    parts = dict(members(text))
    old = None if parts["old"] == "null" else _row(parts["old"])
    return row_that_left(_row(parts["record"]), old, identity)


def own_key(wanted: Subscription, row: Row, key: str | None) -> str | None:
    """The consumer's key of a row whose key in the log is `key`."""
    return key if wanted.key is None else key_text(row, wanted.key)


def _known_before(record: Row, old: Row | None, identity: Collection[str]) -> Row:
    """The known columns of the row before an update. Without `old` the identity's columns did not change."""
    return {name: value for name, value in record.items() if name in identity} if old is None else old


def _row(text: str) -> Row:
    return {name: orjson.Fragment(value) for name, value in members(text)}
