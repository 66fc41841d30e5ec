"""A gap in the log: one message to every consumer that says what is missing, or what is void, and where it goes on.
Part of the rim.

Whatever leaves changes behind goes through here: the message and the position behind the gap are one commit.
"""

from __future__ import annotations

from typing import Any

import orjson
import structlog

from cdcbridge import consumers
from cdcbridge.batch import Batch
from cdcbridge.encode import GAP_TOPIC, message_row, shared_part
from cdcbridge.lsn import format_lsn
from cdcbridge.patterns import take
from cdcbridge.position import Position
from cdcbridge.replication import postgres_now
from cdcbridge.store import Store

log = structlog.get_logger()


def leave_gap(
    store: Store,
    first: int,
    last: int,
    *,
    go_on: int,
    timeline: int | None = None,
    reason: str | None = None,
    capture: dict[str, Any] | None = None,
    table: str | None = None,
    number: int = 0,
) -> None:
    """Tell everybody of the gap from LSN `first` to `last`, and go on from LSN `go_on`. Call with the lead taken.

    timeline: the one that the source is on now, where messages between the two are of a history that it has left.
    reason: why changes may be missing, for people.
    capture: what the next session begins with; it is committed together with the message.
    table: only its updates and deletes are missing, and only the consumers that take these are told.
    number: of several messages at one position, from 0 on.
    """
    record: dict[str, object] = {"from": format_lsn(first), "to": format_lsn(last)}
    if timeline is not None:
        record["timeline"] = timeline
    if table is not None:
        record["table"] = table
    if reason is not None:
        record["reason"] = reason
    data = orjson.dumps({"op": "gap", "record": record, "old": None, "unchanged": []})
    # It stands before whatever commits where things go on: no change has an ordinal below 0.
    row = message_row(-1 - number, None, 0, data, shared_part(GAP_TOPIC, go_on, 0, postgres_now()))
    subscriptions = consumers.all_subscriptions(store.connection)
    if table is not None:
        subscriptions = [s for s in subscriptions if take(s.tables, table) and s.operations & {"update", "delete"}]
    everyone = tuple(s.consumer_id for s in subscriptions if not s.reads_log)
    store.append(
        Batch(
            rows=[row],
            keys=[None],
            in_order=frozenset(s.consumer_id for s in subscriptions if s.in_order),
            groups={everyone: [0]} if everyone else {},
            streams={s.consumer_id for s in subscriptions if s.reads_log},
            position=Position(go_on, -1),
            end_lsn=go_on,
            gap=True,
            capture=capture,
        ),
        None,
    )
    log.warning("slot.gap", **record)
