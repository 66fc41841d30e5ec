"""Whether the log tells a table's state: messages folded by key, against the table at one moment. Part of the rim.

Compares hashes by bucket of keys, and looks at the keys themselves only where these differ. Reads; never mends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

from cdcbridge import chunks
from cdcbridge.check_sessions import refuse_row_security
from cdcbridge.config import Config
from cdcbridge.consumers import all_subscriptions
from cdcbridge.database import Connection, connect_source, connect_store, source_errors, store_errors
from cdcbridge.errors import CdcbridgeError, UsageError
from cdcbridge.handover import mark
from cdcbridge.lsn import format_lsn
from cdcbridge.route import OPERATIONS, Router
from cdcbridge.store import log_end

_XIDS: Final = 1 << 32
_POLL: Final = 0.05
_IN_LOG: Final = """
    select s.key, md5(s.record::text) from log_state(%s, %s, %s) s
    where ('x' || left(md5(s.key), 3))::bit(12)::int = any (%s)
"""


@dataclass(slots=True, frozen=True)
class Verified:
    """What was compared. `missing`: keys that the table has and the log has not; `extra`: the other way round;
    `different`: in both, with other values.
    """

    table: str
    rows: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    different: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not (self.missing or self.extra or self.different)


def verify(config: Config, table: str, wait: float = 30.0) -> Verified:
    """Compare the log with the table, as it is at a moment of this call.

    Waits up to `wait` seconds for the bridge to bring the log to that moment. Raises UsageError for a table that is
    not there, has no key, or of which no consumer takes all there is; CdcbridgeError where the log does not come.
    """
    schema, _, name = table.partition(".")
    with (
        connect_source(config.source_dsn, "cdcbridge verify") as source,
        connect_store(config.store_dsn, config.store.schema_, "cdcbridge verify") as store,
    ):
        shape = chunks.describe(source, schema, name)
        refuse_row_security(source, schema, name)
        _refuse(config, store, schema, name)
        if not shape.key:
            raise UsageError(f"{table} has no primary key (or replica identity index) to tell its rows apart by")
        with source_errors(), source.transaction():
            source.execute("set transaction isolation level repeatable read")
            seen = chunks.snapshot(source)
            ours = _hashes(source.execute(chunks.hashes_query(shape)))
            _wait_for_log(config, store, wait)
            with store_errors():
                given = (table, seen.xmax % _XIDS, [xid % _XIDS for xid in sorted(seen.running)])
                theirs = _hashes(store.execute("select * from log_hashes(%s, %s, %s)", given))
                buckets = sorted(b for b in ours.keys() | theirs.keys() if ours.get(b) != theirs.get(b))
                in_log = _texts(store.execute(_IN_LOG, (*given, buckets))) if buckets else {}
            in_table = _texts(source.execute(chunks.records_query(shape, buckets))) if buckets else {}
    return Verified(
        table,
        sum(keys for keys, _ in ours.values()),
        tuple(sorted(in_table.keys() - in_log.keys())),
        tuple(sorted(in_log.keys() - in_table.keys())),
        tuple(sorted(key for key in in_table.keys() & in_log.keys() if in_table[key] != in_log[key])),
    )


def _refuse(config: Config, store: Connection, schema: str, name: str) -> None:
    table = f"{schema}.{name}"
    readers = Router(all_subscriptions(store), config.store.schema_).subscriptions(schema, name)
    if not any(s.filter is None and s.operations == frozenset(OPERATIONS) for s in readers):
        raise UsageError(
            f"no consumer takes all operations of {table} without a filter: the log has not all that happens to it"
        )
    with store_errors():
        unfinished = store.execute(
            "select c.name, b.state from backfills b join consumers c on c.id = b.consumer_id"
            " where b.table_name = %s and b.state in ('waiting', 'running', 'paused')",
            (table,),
        ).fetchone()
    if unfinished:
        raise CdcbridgeError(
            f"a backfill of {table} into {unfinished[0]!r} is {unfinished[1]}: the log is not complete yet",
            hint="Verify again when it is done: cdcbridge backfill list",
        )


def _wait_for_log(config: Config, store: Connection, wait: float) -> None:
    """Until the log has all that is committed now."""
    with connect_source(config.source_dsn, "cdcbridge watermark") as marker:
        target = mark(marker, b"verify")
    deadline = time.monotonic() + wait
    while (end := log_end(store)) < target:
        if time.monotonic() > deadline:
            raise CdcbridgeError(
                f"the log ends at {format_lsn(end)}, and did not come to {format_lsn(target)} in {wait:g} s",
                hint="Is the bridge running? `cdcbridge lag` tells; --wait gives it longer.",
            )
        time.sleep(_POLL)


def _hashes(rows: Any) -> dict[int, tuple[int, Any]]:
    return {bucket: (keys, value) for bucket, keys, value in rows.fetchall()}


def _texts(rows: Any) -> dict[str, str]:
    return dict(rows.fetchall())
