"""A gap in the log: one message to every consumer that says what is missing, or what is void, and where it goes on.
Part of the rim.

Whatever leaves changes behind goes through here: the message and the position behind the gap are one commit.
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

# Several gaps begin at one position: the log's end, where a session has nothing else to append.
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
    """Tell everybody of the gap from LSN `first` to `last`, and go on from LSN `go_on`. Call with the lead taken.

    timeline: the one that the source is on now, where messages between the two are of a history that it has left.
    reason: why changes may be missing, for people.
    capture: what the next session begins with; it is committed together with the message.
    table: only its updates and deletes are missing, and only the consumers that take these are told.
    consumer: the name of the only one that is told.
    """
    record: dict[str, object] = {"from": format_lsn(first), "to": format_lsn(last)}
    if timeline is not None:
        record["timeline"] = timeline
    if table is not None:
        record["table"] = table
    if reason is not None:
        record["reason"] = reason
    data = orjson.dumps({"op": "gap", "record": record, "old": None, "unchanged": []})
    subscriptions = consumers.all_subscriptions(store.connection)
    shared = shared_part(GAP_TOPIC, go_on, 0, postgres_now())
    if consumer is not None:
        subscriptions = [s for s in subscriptions if s.name == consumer]
        if not subscriptions:
            return  # removed just now
        shared = for_reader(shared, subscriptions[0].consumer_id)
    # It stands before whatever commits where things go on: no change has an ordinal below 0.
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
    """The ordinal of the next gap message at a position, below those of the ones that the log has there."""
    with store_errors():
        row = store.connection.execute(_LOWEST, (GAP_TOPIC, format_lsn(lsn))).fetchone()
    return (row[0] if row else 0) - 1
