"""Read and update the requests for backfills, and refuse a request that would make its backfill fail."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import psycopg
import structlog

from cdcbridge.config import Config
from cdcbridge.database import Connection, store_errors
from cdcbridge.errors import CdcbridgeError, OperatorNeeded, UsageError
from cdcbridge.routing.overtaken import Snapshot
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.source import shapes
from cdcbridge.source.copying import try_condition
from cdcbridge.source.sessions import refuse_row_security
from cdcbridge.store.consumers import all_subscriptions

log = structlog.get_logger()


class Order(NamedTuple):
    """A requested backfill, with its progress: a row of the table `backfills`.

    Attributes:
        condition: The SQL condition that rows have to meet, or None for all rows.
        columns: The columns to read, or None for all.
        rate: The greatest number of rows to read in a second, or None for no limit.
        after_seq: The log's last seq when the consumer began, if its `start` is `snapshot`.
        since: The snapshot at which the backfill began, as text. Younger row versions arrive as changes.
        early: The keys that changed before the first chunk entered the log.
        place: The place after which the next chunk begins.
    """

    backfill_id: int
    consumer_id: int
    consumer: str
    table: str
    condition: str | None
    columns: list[str] | None
    rate: int | None
    after_seq: int | None
    since: str | None
    early: list[str | None] | None
    place: list[Any] | None


_UNFINISHED: Final = """
    select b.id, b.consumer_id, c.name, b.table_name, b.condition, b.columns, b.rate, b.after_seq, b.since, b.early,
           p.place
    from backfills b join consumers c on c.id = b.consumer_id left join lateral newest_progress(b.id) p on true
    where b.state in ('waiting', 'running') order by b.id
"""


def unfinished(store: Connection) -> dict[int, Order]:
    """Return the backfills that are waiting or running, by id, the oldest first."""
    with store_errors():
        return {row[0]: Order(*row) for row in store.execute(_UNFINISHED).fetchall()}


def begin(store: Connection, order: Order, now: Snapshot, rows: int, *, going_on: bool) -> Snapshot | None:
    """Mark the backfill as running, and return the snapshot at which it first began.

    Row versions younger than that snapshot arrive as changes, even if the backfill was interrupted meanwhile.

    Args:
        store: A session on the store.
        order: The backfill.
        now: The present snapshot, which is stored unless `going_on`.
        rows: The estimated number of rows.
        going_on: The backfill continues, and keeps its stored snapshot.

    Returns:
        The stored snapshot, or None if the backfill was paused or cancelled meanwhile.
    """
    text = f"{now.xmin}:{now.xmax}:{','.join(map(str, sorted(now.running)))}"
    with store_errors():
        row = store.execute(
            "update backfills set state = 'running', note = null, since = case when %s then since else %s end,"
            " total = coalesce(total, %s), started_at = coalesce(started_at, moment())"
            " where id = %s and state in ('waiting', 'running') returning since",
            (going_on, text, rows, order.backfill_id),
        ).fetchone()
    return Snapshot.parse(row[0]) if row else None


def begin_anew(store: Connection, order: Order) -> None:
    """Clear the start snapshot of the backfill, because the table was rewritten.

    After a rewrite, old rows look as if they were younger than the snapshot.
    """
    with store_errors():
        store.execute("update backfills set since = null where id = %s", (order.backfill_id,))


def truncated_since(store: Connection, table: str, since: Snapshot) -> bool:
    """Return whether the log has a TRUNCATE of the table by a transaction that the snapshot does not see."""
    with store_errors():
        return any(not since.sees(xid) for (xid,) in store.execute("select truncates(%s)", (table,)).fetchall())


def fail(store: Connection, order: Order, error: Exception) -> None:
    """Mark the backfill as failed, and store the reason.

    Also clear its start snapshot: while it is stopped the consumer may miss changes, so a resumed backfill must not
    assume that it received them.
    """
    hint = error.hint if isinstance(error, CdcbridgeError) else None
    message = " ".join(f"{error}: {hint}".split() if hint else str(error).split())
    log.error("backfill.failed", consumer=order.consumer, table=order.table, error=message)
    with store_errors():
        store.execute(
            "update backfills set state = 'failed', note = %s, finished_at = moment(), since = null"
            " where id = %s and state in ('waiting', 'running')",
            (message, order.backfill_id),
        )


def refuse_order(
    config: Config,
    source: Connection,
    store: Connection,
    consumer: str,
    table: str,
    condition: str | None,
    columns: list[str] | None,
) -> None:
    """Raise the error with which such a backfill would fail.

    Raises:
        UsageError: The consumer is unknown, or does not take the table. The table or a column does not exist. The
            condition cannot be used.
        OperatorNeeded: The role lacks the rights to read the table.
    """
    with store_errors():
        row = store.execute("select (consumer_named(%s)).id", (consumer,)).fetchone()
    schema, _, name = table.partition(".")
    shape = shapes.describe(source, schema, name)
    router = Router(all_subscriptions(store), config.store.schema_)
    subscription_of(router, row[0] if row else 0, consumer, schema, name)
    refuse_unknown_columns(shape, columns)
    if config.source.read_dsn is None:
        refuse_row_security(source, schema, name)
    try:
        try_condition(source, shape, condition)
    except psycopg.errors.InsufficientPrivilege as error:
        reader = source.info.user
        raise OperatorNeeded(
            f"the role {reader} may not read {table}: {error.diag.message_primary}",
            hint=f"grant select on {table} to {reader}; grant usage on schema {schema} to {reader};",
        ) from error
    except psycopg.Error as error:
        raise UsageError(f"the condition {condition!r} cannot be used: {error.diag.message_primary}") from error


def subscription_of(router: Router, consumer_id: int, consumer: str, schema: str, name: str) -> Subscription:
    """Return the consumer's subscription, which takes this table.

    Raises:
        UsageError: The consumer does not take the table.
    """
    for subscription in router.subscriptions(schema, name):
        if subscription.consumer_id == consumer_id:
            return subscription
    raise UsageError(
        f"consumer {consumer!r} does not take {schema}.{name}",
        hint="Add the table to its `tables` in the configuration. `cdcbridge consumers show` prints the stored ones.",
    )


def refuse_unknown_columns(shape: shapes.ReadShape, columns: Iterable[str] | None) -> None:
    """Raise UsageError if the table lacks one of these columns."""
    unknown = set(columns or ()) - {column.name for column in shape.columns}
    if unknown:
        raise UsageError(f"{shape.schema}.{shape.name} has no column {min(unknown)!r}")
