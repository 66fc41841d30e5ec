"""The effect and the ack in one transaction: `python examples/exactly_once.py DSN CONSUMER` sums up by customer.

Each message arrives once, but an order has many messages: it is inserted, updated, deleted. So this keeps what each
order counts for, and the sum is a view. Killed at any moment, it counts nothing twice. It needs a consumer with
`mode: fifo`, and it writes into a schema of its own, which no consumer takes.
"""

import logging
import sys
from decimal import Decimal
from typing import Any

import psycopg

from cdcbridge import Message, Queue, StaleReceipt

log = logging.getLogger("exactly_once")
SETUP = """
    create schema if not exists shop_effects;
    create table if not exists shop_effects.counted
        (topic text, id text, customer text, amount numeric, primary key (topic, id));
    create or replace view shop_effects.totals as
        select customer, sum(amount) as amount from shop_effects.counted group by customer
"""
COUNT = """
    insert into shop_effects.counted values (%s, %s, %s, %s)
    on conflict (topic, id) do update set
        customer = coalesce(excluded.customer, counted.customer), amount = coalesce(excluded.amount, counted.amount)
"""


class BadRow(Exception):
    """A row that cannot be counted, today or tomorrow."""


def effect(connection: psycopg.Connection[Any], message: Message) -> None:
    """Do what the message says. A backfill or a replay says it again, and then the effect is the same."""
    match message.data:
        case {"op": "insert" | "read" | "message", "record": dict(row)}:
            count(connection, message, row)
        case {"op": "update", "record": dict(row), "old": old}:
            if old and old["id"] != row["id"]:
                forget(connection, message.topic, old["id"])
            count(connection, message, row)
        case {"op": "delete", "record": {"id": order}}:
            forget(connection, message.topic, order)
        case {"op": "truncate"}:
            connection.execute("delete from shop_effects.counted where topic = %s", (message.topic,))
        case {"op": "gap", "record": gap}:
            log.warning("changes are missing: %s. `cdcbridge backfill start` brings the rows again", gap)
        case data:
            raise BadRow(f"an {data['op']} without the columns that it needs")


def count(connection: psycopg.Connection[Any], message: Message, row: dict[str, Any]) -> None:
    """The order counts for this customer and this amount, whatever it counted for before."""
    order, customer, amount = row.get("id", f"message {message.seq}"), row.get("customer"), row.get("amount")
    kept = message.data["unchanged"]  # large values that the update did not touch: the message does not carry them
    if (customer is None and "customer" not in kept) or not isinstance(amount, int | Decimal):
        raise BadRow(f"customer is {customer!r}, amount is {amount!r}")
    connection.execute(COUNT, (message.topic, str(order), customer, amount))


def forget(connection: psycopg.Connection[Any], topic: str, order: Any) -> None:
    """The order counts for nothing any more."""
    connection.execute("delete from shop_effects.counted where topic = %s and id = %s", (topic, str(order)))


def main(dsn: str, consumer: str) -> None:
    # Without parse_float an amount would be a float, and 0.1 + 0.2 would not be 0.3.
    with (
        psycopg.connect(dsn, client_encoding="UTF8") as connection,
        Queue.connect(dsn, consumer=consumer, parse_float=Decimal) as queue,
    ):
        # Whatever the server's defaults are: the ack of a fifo consumer needs both.
        connection.isolation_level, connection.read_only = psycopg.IsolationLevel.READ_COMMITTED, False
        connection.execute(SETUP)
        connection.commit()
        for message in queue.messages(wait=5, stop_when_empty=True):
            try:
                effect(connection, message)
                queue.ack([message], connection=connection)
                connection.commit()
            except StaleReceipt:
                connection.rollback()  # it took too long, and somebody else has it now
            except (BadRow, ValueError, psycopg.DataError) as error:  # UnreadableData is a ValueError
                connection.rollback()
                message.nack(reason=str(error), dead=True)  # `cdcbridge dead list` shows it


if __name__ == "__main__":
    main(*sys.argv[1:])
