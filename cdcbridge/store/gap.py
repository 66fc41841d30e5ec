"""Append gap messages, and continue after the gap.

A gap message reports to consumers which changes are missing or void, and at which LSN the log continues. All code that
skips changes calls this module. The message and the position after the gap are one commit.
"""

from __future__ import annotations

from typing import Any, Final

import orjson
import structlog

from cdcbridge.changes.position import Position, postgres_now
from cdcbridge.database import store_errors
from cdcbridge.lsn import format_lsn
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.copy_format import GAP_TOPIC, for_reader, message_row, shared_part
from cdcbridge.routing.patterns import take
from cdcbridge.store import consumers
from cdcbridge.store.log import BridgeStore

# Several gap messages can have one LSN: the log's end, as long as a session has nothing else to append.
_LOWEST: Final = """
    select coalesce(min(ordinal), 0)
    from (select topic, commit_lsn, ordinal from messages order by seq desc limit 1000) newest
    where topic = %s and commit_lsn = %s::pg_lsn and ordinal < 0
"""
log = structlog.get_logger()


def leave_gap(
    store: BridgeStore,
    first: int,
    last: int,
    *,
    go_on: int,
    timeline: int | None = None,
    reason: str | None = None,
    capture: dict[str, Any] | None = None,
    table: str | None = None,
    consumer: str | None = None,
) -> None:
    """Append a gap message for the changes from LSN `first` to `last`, and continue at LSN `go_on`. Call it as leader.

    timeline: The source's present timeline, if the log has messages of a history that the source has left.
    reason: The reason why changes may be missing, for people.
    capture: The publications and tables to compare with in the next session, stored in the commit of the message.
    table: Only updates and deletes of this table are missing, and only consumers that take these get the message.
    consumer: The name of the only consumer that gets the message.
    """
    record: dict[str, object] = {"from": format_lsn(first), "to": format_lsn(last)}
    if timeline is not None:
        record["timeline"] = timeline
    if table is not None:
        record["table"] = table
    if reason is not None:
        record["reason"] = reason
    data = orjson.dumps({"op": "gap", "record": record, "old": None, "unchanged": []})
    if timeline is not None:
        _forget_marks(store, first)
    subscriptions = consumers.all_subscriptions(store.connection)
    shared = shared_part(GAP_TOPIC, go_on, 0, postgres_now())
    if consumer is not None:
        subscriptions = [s for s in subscriptions if s.name == consumer]
        if not subscriptions:
            return  # removed just now
        shared = for_reader(shared, subscriptions[0].consumer_id)
    # Its ordinal is below 0, which no change has, so it precedes the changes of a transaction that commits at this LSN.
    row = message_row(_ordinal(store, go_on), None, 0, data, shared)
    if table is not None:
        subscriptions = [s for s in subscriptions if take(s.tables, table) and s.operations & {"update", "delete"}]
    everyone = tuple(s.consumer_id for s in subscriptions if not s.reads_log)
    store.append(
        AppendBatch(
            rows=[row],
            keys=[None],
            in_order=frozenset(s.consumer_id for s in subscriptions if s.in_order),
            groups={everyone: [0]} if everyone else {},
            streams={s.consumer_id for s in subscriptions if s.reads_log},
            position=Position(go_on, -1),
            end_lsn=go_on,
            gap=True,
            gaps=[(record, [s.name for s in subscriptions])],
            capture=capture,
            fed_again=None if consumer is None else subscriptions[0].consumer_id,
        ),
        None,
    )
    log.warning("slot.gap" if consumer is None else "consumer.gap", consumer=consumer, **record)


def _ordinal(store: BridgeStore, lsn: int) -> int:
    """Return the ordinal of the next gap message at an LSN, one below the lowest that the log has there."""
    with store_errors():
        row = store.connection.execute(_LOWEST, (GAP_TOPIC, format_lsn(lsn))).fetchone()
    return (row[0] if row else 0) - 1


def _forget_marks(store: BridgeStore, lsn: int) -> None:
    """Delete the notes about transactions that the source has lost, because what they had seen is void as well."""
    with store_errors():
        store.connection.execute("delete from transaction_marks where commit_lsn > %s::pg_lsn", (format_lsn(lsn),))
