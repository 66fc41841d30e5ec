"""Read the log for a revert: the changes that are to be undone, and the messages of their keys.

This module only reads the store. Never reads the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

from cdcbridge.config import Config
from cdcbridge.database import Connection, store_errors
from cdcbridge.errors import CdcbridgeError, RevertRefused, UsageError
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.revert.history import Place, RowTracer, Traced
from cdcbridge.revert.messages import CHANGES, Recorded, read_message
from cdcbridge.routing.copy_format import GAP_TOPIC
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.store.consumers import all_subscriptions
from cdcbridge.store.log import log_end

_AT_ONCE: Final = 1000  # rows that are fetched at a time
_ANNOTATED: Final = 100  # seqs that an annotation lists
_NAMED: Final = 10  # changes that an error lists
_ROWS: Final = (
    "select m.seq, m.topic, m.key, m.old_key, m.data::text, m.commit_lsn::text, m.inserted_at from messages m where "
)
_OF_KEYS: Final = (
    "m.topic = any (%(topics)s) and (m.key = any (%(keys)s) or m.old_key = any (%(keys)s) or m.seq = any (%(seqs)s)"
    " or m.key is null and op_of(m.data) = 'truncate')"
    " and (m.reader is null or exists (select from consumers c where c.id = m.reader"
    ' and c.config -> \'operations\' @> \'["insert", "update", "delete", "truncate"]\'))'
    f" or m.topic = '{GAP_TOPIC}' order by m.seq"
)
_OF_ROWS: Final = (*CHANGES, "truncate")
_NO_CHANGE: Final = {
    "read": "is a row that a backfill read, and not a change",
    "message": "is a published message, and not a change of a table",
    "gap": "is a gap message, and not a change of a table",
    "truncate": "is a truncate, which cannot be undone: the WAL does not contain the rows that it removed",
}


@dataclass(slots=True, frozen=True)
class Selection:
    """The changes that a user wants to undo. One of the four ways of naming them is given.

    Attributes:
        seqs: The seqs of single changes.
        transaction: The commit LSN of a transaction.
        table: The table with its schema, for a key or a time span.
        key: The key, as the log has it.
        to: The seq of the message to whose state the key returns. Later changes are undone.
        begin: The time at which the span begins, as the user wrote it.
        end: The time before which the span ends, as the user wrote it, or None for now.
    """

    seqs: tuple[int, ...] = ()
    transaction: str | None = None
    table: str | None = None
    key: str | None = None
    to: int | None = None
    begin: str | None = None
    end: str | None = None

    @property
    def named(self) -> dict[str, object]:
        """The selection for the annotation, for example `{"table": "public.orders", "key": "17", "to": 40}`.

        It is short, because each change of the revert carries it. The seqs are in rising order.
        """
        if len(self.seqs) > _ANNOTATED:
            return {"first_seq": self.seqs[0], "last_seq": self.seqs[-1]}
        if self.seqs:
            return {"seqs": list(self.seqs)}
        named = {"transaction": self.transaction, "table": self.table, "key": self.key, "to": self.to}
        span = {"from": self.begin, "until": self.end}
        return {name: value for name, value in (named | span).items() if value is not None}


def selected(store: Connection, selection: Selection) -> list[Recorded]:
    """Return the selected changes in the order of the log.

    Raises:
        UsageError: The log lacks one of the seqs, the transaction, or the key.
        RevertRefused: A selected message is not a change that can be undone.
    """
    with store_errors():
        if selection.seqs:
            found = _of_seqs(store, selection.seqs)
        elif selection.transaction is not None:
            found = _of_transaction(store, selection.transaction)
        elif selection.to is not None:
            found = _since(store, selection, selection.to)
        else:
            found = _of_span(store, selection)
    refused = [f"seq {one.seq} {_NO_CHANGE.get(one.op, one.op)}" for one in found if one.op not in CHANGES]
    if refused:
        raise RevertRefused("; ".join(_some(refused)))
    return found


def _of_seqs(store: Connection, seqs: tuple[int, ...]) -> list[Recorded]:
    found = _read(store, "m.seq = any (%s) order by m.seq", list(seqs))
    missing = sorted(set(seqs) - {one.seq for one in found})
    if missing:
        first, last = store.execute("select min(seq), max(seq) from messages").fetchone() or (None, None)
        extent = "is empty" if first is None else f"has seq {first} to {last}"
        raise UsageError(
            f"the log has no message with seq {', '.join(_some(map(str, missing)))}: it {extent}",
            hint="`cdcbridge tail`, browse_log() in SQL and the dashboard show the seqs of messages.",
        )
    return found


def _of_transaction(store: Connection, lsn: str) -> list[Recorded]:
    try:
        number = parse_lsn(lsn)
    except ValueError as error:
        raise UsageError(f"--transaction: {error}") from error
    found = _read(store, "m.commit_lsn = %s::pg_lsn and m.xid is not null order by m.seq", lsn)
    if not found:
        raise UsageError(
            f"the log has no change of a transaction with the commit LSN {lsn}",
            hint="Each message has the `commit_lsn` of its transaction. The log keeps messages for store.retention, and"
            " has only changes that a consumer takes.",
        )
    if log_end(store) <= number:
        raise CdcbridgeError(
            f"the log does not have the whole transaction {format_lsn(number)} yet", hint="Try again in a moment."
        )
    return found


def _since(store: Connection, selection: Selection, to: int) -> list[Recorded]:
    """Return the changes of the key after the seq `to`."""
    first, last = store.execute("select log_begin(), coalesce(max(seq), 0) from messages").fetchone() or (1, 0)
    if not first - 1 <= to <= last:
        raise UsageError(f"--to: seq {to} is not in the log, which has seq {first} to {last}")
    known = store.execute(
        "select from messages m where m.topic = %s and (m.key = %s or m.old_key = %s) limit 1",
        (selection.table, selection.key, selection.key),
    ).fetchone()
    if known is None:
        raise UsageError(
            f"the log has no message of {selection.table} with the key {selection.key!r}",
            hint='A key of several columns is a JSON array of texts, for example \'["7","a"]\'.',
        )
    found = _read(
        store,
        "m.topic = %s and (m.key = %s or m.old_key = %s or m.key is null) and m.seq > %s order by m.seq",
        selection.table,
        selection.key,
        selection.key,
        to,
    )
    return _of_key(found)


def _of_span(store: Connection, selection: Selection) -> list[Recorded]:
    condition: LiteralString = (
        "m.topic = %s and m.commit_time >= time_of(%s, 'time') and m.commit_time < time_of(%s, 'time')"
    )
    given: tuple[str | None, ...] = (selection.table, selection.begin, selection.end or "now")
    if selection.key is not None:
        condition += " and (m.key = %s or m.old_key = %s or m.key is null)"
        given += (selection.key, selection.key)
    found = _read(store, condition + " order by m.seq", *given)
    return _of_key(found) if selection.key is not None else [one for one in found if one.op in _OF_ROWS]


def _of_key(found: list[Recorded]) -> list[Recorded]:
    """Leave out rows without a key. A truncate also removes the rows of every key."""
    return [one for one in found if one.op == "truncate" or (one.op in CHANGES and one.key is not None)]


def _read(store: Connection, condition: LiteralString, *given: Any) -> list[Recorded]:
    return [read_message(*row) for row in store.execute(_ROWS + condition, given).fetchall()]


def _some(texts: Iterable[str]) -> list[str]:
    found = list(texts)
    more = len(found) - _NAMED
    return [*found[:_NAMED], f"and {more} more"] if more > 0 else found


def trace(
    store: Connection, config: Config, changes: list[Recorded], floats: dict[str, frozenset[str]]
) -> list[Traced]:
    """Return the changes with the rows before and after each, as the log knows them.

    A row may have had another key before. The messages of such keys are read as well, until there are no more.
    """
    if not changes:
        return []
    wanted, topics = frozenset(one.seq for one in changes), {one.topic for one in changes}
    since = _complete_since(store, config, topics)
    keys: set[Place] = {(one.topic, key) for one in changes for key in (one.key, one.old_key) if key is not None}
    while True:
        tracer = RowTracer(wanted, floats, since)
        for message in _of_keys(store, topics, keys, wanted):
            tracer.feed(message)
        if len(tracer.traced) != len(wanted):
            raise CdcbridgeError("messages of the log were dropped meanwhile", hint="Run the command again.")
        if tracer.former <= keys:
            return tracer.traced
        keys |= tracer.former


def _of_keys(store: Connection, topics: set[str], keys: set[Place], wanted: frozenset[int]) -> Iterator[Recorded]:
    given = {
        "topics": sorted(topics),
        "keys": sorted({key for _, key in keys}),
        "seqs": sorted(wanted),
    }
    with store_errors(), store.transaction(), store.cursor("history") as cursor:
        cursor.itersize = _AT_ONCE
        for row in cursor.execute(_ROWS + _OF_KEYS, given):
            yield read_message(*row)


def _complete_since(store: Connection, config: Config, topics: Iterable[str]) -> dict[str, datetime | None]:
    """Return the time since which the log has each change of a table, by topic. None: it may lack changes.

    The log has only the changes that a consumer takes. It has all of them while one consumer takes all operations
    without a filter.
    """
    router = Router(all_subscriptions(store), config.store.schema_)
    with store_errors():
        made: dict[str, datetime] = dict(store.execute("select name, created_at from consumers").fetchall())
    found: dict[str, datetime | None] = {}
    for topic in topics:
        schema, _, name = topic.partition(".")
        readers = router.subscriptions(schema, name)
        whole = [made[s.name] for s in readers if s.filter is None and s.operations == frozenset(OPERATIONS)]
        found[topic] = min(whole, default=None)
    return found
