"""Compare the state of a table with the messages of the log, for `cdcbridge verify`.

The messages are folded by key, to the last state of each key, and compared with the table at one moment. Keys are put
into buckets, whose hashes are compared. Single keys are compared only in buckets that differ. This module only reads,
and never repairs anything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson
import psycopg
from psycopg import sql

from cdcbridge.backfill.watermarks import mark
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, source_errors, store_errors
from cdcbridge.database.rights import as_owner, of_store
from cdcbridge.errors import CdcbridgeError, OperatorNeeded, UsageError
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.overtaken import Snapshot
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.source import shapes
from cdcbridge.source.row_sql import hashes_query, records_query
from cdcbridge.source.sessions import refuse_row_security
from cdcbridge.source.shapes import ReadColumn, ReadShape
from cdcbridge.store.consumers import all_subscriptions
from cdcbridge.store.log import log_end

_XIDS: Final = 1 << 32
_HALF: Final = 1 << 31
_POLL: Final = 0.05
_NO_KEY: Final = -1  # the bucket of messages without a key
NAMED: Final = 20  # keys that are listed for people
_AT_ONCE: Final = 1000  # rows that are fetched at a time from either side


@dataclass(slots=True, frozen=True)
class Verified:
    """The result of a comparison.

    Attributes:
        missing: Keys that the table has and the log lacks.
        extra: Keys that the log has and the table lacks.
        different: Keys that both have, with different values.
        notes: The parts that could not be compared, and the reasons.
        key: The columns of the key.
        whole: A consumer that takes all rows, so that a backfill for it adds each of them to the log.
    """

    table: str
    rows: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    different: tuple[str, ...]
    notes: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    whole: str = ""

    @property
    def deletion(self) -> str:
        """The SQL that deletes the first `extra` keys from a copy of the table, for people to check and run."""
        schema, _, name = self.table.partition(".")
        one = len(self.key) == 1
        columns = sql.SQL(", ").join(map(sql.Identifier, self.key))
        rows = [sql.SQL(", ").join(map(sql.Literal, [key] if one else orjson.loads(key))) for key in self.extra[:NAMED]]
        if not one:
            columns, *rows = (sql.SQL("({})").format(values) for values in (columns, *rows))
        return (
            sql.SQL("delete from {} where {} in ({});")
            .format(sql.Identifier(schema, name), columns, sql.SQL(", ").join(rows))
            .as_string()
        )

    @property
    def ok(self) -> bool:
        return not (self.missing or self.extra or self.different)


def verify(config: Config, table: str, wait: float = 30.0) -> Verified:
    """Compare the log with the table, as the table is at one moment during this call.

    Args:
        config: The configuration.
        table: The table with its schema, for example `public.orders`.
        wait: Seconds to wait for the bridge to append everything up to that moment.

    Raises:
        UsageError: The table does not exist or has no key, or no consumer takes all its changes.
        CdcbridgeError: The log did not reach that moment in time, or a backfill of the table is not finished.
    """
    schema, _, name = table.partition(".")
    with (
        connect_source(config.source_dsn, "cdcbridge verify") as source,
        connect_store(config.store_dsn, config.store.schema_, "cdcbridge verify") as store,
        as_owner(store, "`cdcbridge verify`"),
        _naming_grant(source, table),
    ):
        shape = shapes.describe(source, schema, name)
        refuse_row_security(source, schema, name)
        whole = _whole(config, store, schema, name)
        if not shape.key:
            raise UsageError(
                f"{table} has no primary key and no replica identity index, so its rows cannot be compared"
            )
        try:
            found = _compare(config, source, store, shape, wait, harmless=False)
            return replace(found, whole=whole)
        except CdcbridgeError as error:
            if not isinstance(error.__cause__, psycopg.DataError):
                raise
        # Some json values are not valid as jsonb: "\\u0000", half of a surrogate pair, a number that is too large.
        return replace(_compare(config, source, store, shape, wait, harmless=True), whole=whole)


@contextmanager
def _naming_grant(source: Connection, table: str) -> Iterator[None]:
    """Add the missing grant as the hint of an error, if the role may not read the table."""
    try:
        yield
    except OperatorNeeded as error:
        if isinstance(error.__cause__, psycopg.errors.InsufficientPrivilege) and not of_store(error):
            names = "select quote_ident(current_user), quote_ident(%s) || '.' || quote_ident(%s)"
            schema, _, name = table.partition(".")
            role, quoted = source.execute(names, (schema, name)).fetchone() or ("", table)
            error.hint = f"As the table's owner: grant select on {quoted} to {role};"
        raise


def _compare(
    config: Config, source: Connection, store: Connection, shape: ReadShape, wait: float, *, harmless: bool
) -> Verified:
    table = f"{shape.schema}.{shape.name}"
    with source_errors(), source.transaction():
        shapes.begin_locked(source, shape)
        seen = shapes.snapshot(source)
        if not shapes.is_still(source, shape):
            shape = shapes.describe(source, shape.schema, shape.name)
        ours = _hashes(source.execute(hashes_query(shape, defused=harmless)))
        _wait_for_log(config, store, wait)
        running = [xid % _XIDS for xid in sorted(seen.running)]
        given = (table, seen.xmax % _XIDS, running, [column.name for column in shape.key], harmless)
        with store_errors():
            theirs = _hashes(store.execute("select * from log_hashes(%s, %s, %s, %s, %s)", given))
        keyless = _NO_KEY in theirs
        buckets = sorted(b for b in ours.keys() | theirs.keys() if b != _NO_KEY and ours.get(b) != theirs.get(b))
        found = _Found(shape, seen)
        if buckets:
            with store_errors(), store.transaction(), source.cursor("ours") as rows, store.cursor("theirs") as messages:
                rows.itersize = messages.itersize = _AT_ONCE
                rows.execute(records_query(shape, buckets, defused=harmless))
                messages.execute("select * from log_records(%s, %s, %s, %s, %s, %s)", (*given, buckets))
                found.merge(iter(rows), iter(messages))
    return Verified(
        table,
        sum(keys for keys, _ in ours.values()),
        tuple(found.missing),
        tuple(found.extra),
        tuple(found.different),
        found.notes(keyless=keyless),
        tuple(column.name for column in shape.key),
    )


@dataclass(slots=True)
class _Found:
    """The differences found while both sides are read in the order of their keys."""

    shape: ReadShape
    seen: Snapshot
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    # By column, the number of rows whose records in the log lack the column, and of those whose records may be from
    # before the column was altered.
    absent: Counter[str] = field(default_factory=Counter)
    older: Counter[str] = field(default_factory=Counter)

    def merge(self, rows: Iterator[tuple[Any, ...]], messages: Iterator[tuple[Any, ...]]) -> None:
        """Compare both sides, which are in the order of their keys' bytes."""
        row, message = next(rows, None), next(messages, None)
        while row is not None or message is not None:
            if message is None or (row is not None and row[0].encode() < message[0].encode()):
                self.missing.append(row[0] if row else "")
                row = next(rows, None)
            elif row is None or row[0] != message[0]:
                self.extra.append(message[0])
                message = next(messages, None)
            else:
                self._row(row[0], row[1], message[1], message[2])
                row, message = next(rows, None), next(messages, None)

    def _row(self, key: str, ours: dict[str, str], theirs: dict[str, str], xid: int | None) -> None:
        differs = False
        for column in self.shape.columns:
            if column.name not in theirs:
                self.absent[column.name] += 1
            elif ours[column.name] != theirs[column.name]:
                if self._is_older(column, xid):
                    self.older[column.name] += 1
                else:
                    differs = True
        if differs:
            self.different.append(key)

    def _is_older(self, column: ReadColumn, xid: int | None) -> bool:
        """Return whether the column was altered after the record was made, or may have been."""
        if column.changed is None:
            return False
        return xid is None or (column.changed - xid) % _XIDS < _HALF

    def notes(self, *, keyless: bool) -> tuple[str, ...]:
        notes = [
            f"column {name!r}: the log's records of {rows} rows do not have it, because it was added or renamed"
            " later, or the backfill did not read it"
            for name, rows in sorted(self.absent.items())
        ]
        notes += [
            f"column {name!r}: {rows} rows have other values in the log, from before the column was altered"
            for name, rows in sorted(self.older.items())
        ]
        if keyless:
            notes.append("the log has messages without a key, which were not compared")
        return tuple(notes)


def _whole(config: Config, store: Connection, schema: str, name: str) -> str:
    """Return a consumer that takes everything of the table.

    Raises:
        UsageError: There is no such consumer.
        CdcbridgeError: A backfill of the table is not finished.
    """
    table = f"{schema}.{name}"
    readers = Router(all_subscriptions(store), config.store.schema_).subscriptions(schema, name)
    whole = [s.name for s in readers if s.filter is None and s.operations == frozenset(OPERATIONS)]
    if not whole:
        raise UsageError(
            f"no consumer takes all operations of {table} without a filter: the log may lack some of its changes"
        )
    with store_errors():
        unfinished = store.execute(
            "select c.name, b.state from backfills b join consumers c on c.id = b.consumer_id"
            " where b.table_name = %s and b.state in ('waiting', 'running', 'paused')",
            (table,),
        ).fetchone()
    if unfinished:
        raise CdcbridgeError(
            f"a backfill of {table} into {unfinished[0]!r} is {unfinished[1]}, so the log is not complete yet",
            hint="Verify again when `cdcbridge backfill list` shows that it is done.",
        )
    return whole[0]


def _wait_for_log(config: Config, store: Connection, wait: float) -> None:
    """Wait until the log has everything that is committed now."""
    with connect_source(config.source_dsn, "cdcbridge watermark") as marker:
        target = mark(marker, b"verify")
    deadline = time.monotonic() + wait
    while (end := log_end(store)) < target:
        if time.monotonic() > deadline:
            raise CdcbridgeError(
                f"the log ends at {format_lsn(end)}, and did not reach {format_lsn(target)} in {wait:g} s",
                hint="Is the bridge running? `cdcbridge lag` shows it. A longer --wait gives it more time.",
            )
        time.sleep(_POLL)


def _hashes(rows: Any) -> dict[int, tuple[int, Any]]:
    return {_NO_KEY if bucket is None else bucket: (keys, value) for bucket, keys, value in rows.fetchall()}
