"""Show what a sink would send for messages of the log, for `cdcbridge sinks test`.

Never contacts a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from psycopg.types.json import Jsonb
from pydantic import SecretStr

from cdcbridge.config import Config, Consumer
from cdcbridge.config.sink import HttpSink, shown_destination
from cdcbridge.database import Connection
from cdcbridge.errors import UsageError
from cdcbridge.routing.subscription import Subscription
from cdcbridge.sinks.log_row import LogRow, read_integers
from cdcbridge.sinks.message import Origin, SinkMessage
from cdcbridge.sinks.reading import judge
from cdcbridge.sinks.shaper import Names, Shaper, Unshaped, as_json
from cdcbridge.sinks.targets import target_class
from cdcbridge.store.consumers import stored_config
from cdcbridge.store.replay import latest

_LAST: Final = 5  # messages that are shown if no seq is given
_ROWS: Final = """
    select m.seq, m.topic, m.key, m.partition, m.data::text, project(m.data, nullif(%s::jsonb, 'null'))::text,
           m.commit_lsn, m.ordinal, m.xid, m.commit_time, m.inserted_at, m.old_key
    from messages m where m.seq = any (%s) order by m.seq"""


def trial(
    store: Connection, config: Config, consumer: Consumer, seqs: Sequence[int], low: int = 0
) -> list[dict[str, Any]]:
    """Return what the consumer's sink would send for each of these messages.

    Args:
        store: A session on the store.
        config: The configuration.
        consumer: A consumer with a sink. The store need not know it yet.
        seqs: The messages. Empty: the last ones that the consumer takes.
        low: Without `seqs`, messages up to this seq are not looked at.

    Raises:
        UsageError: The log does not have one of the messages.
    """
    stored = stored_config(consumer)
    wanted = Subscription.from_config(0, consumer.name, consumer.mode, stored)
    chosen = list(seqs) or [row[0] for row in latest(store, wanted, _LAST, low)]
    found = store.execute("select * from sink_source()").fetchone()
    if found is None:
        raise UsageError("the log is empty: no bridge has read the source yet", hint="Start it: cdcbridge run")
    origin = Origin(*found)
    cursor = store.cursor(binary=True)
    read_integers(cursor)
    rows = cursor.execute(_ROWS, (Jsonb(stored.get("columns")), chosen)).fetchall()
    if lacking := set(seqs) - {row[0] for row in rows}:
        raise UsageError(f"the log has no message {min(lacking)}")
    sink = consumer.needed_sink
    if isinstance(sink, HttpSink):  # the address may have secrets
        shown_sink = sink.model_copy(update={"url": SecretStr(shown_destination(sink))})
        consumer = consumer.model_copy(update={"sink": shown_sink})
    adapter = target_class(sink)
    names = Names(config.source.name or origin.database, origin.database)
    shaper = Shaper(consumer, names, adapter.attribute_prefix)
    shown: list[dict[str, Any]] = []
    for row in rows:
        shown += _shown(LogRow(*row), wanted, origin, shaper, projected=consumer.columns is not None)
    return shown


def _shown(
    row: LogRow, wanted: Subscription, origin: Origin, shaper: Shaper, *, projected: bool
) -> list[dict[str, Any]]:
    said = judge(row, wanted, origin, projected=projected)
    if said is None:
        return [{"seq": row.seq, "passed_over": "the filter refuses it"}]
    shaped = shaper.shape(said) if isinstance(said, SinkMessage) else said
    if isinstance(shaped, Unshaped):
        return [{"seq": row.seq, "dead_letter": shaped.reason}]
    return [as_json(one) for one in shaped]
