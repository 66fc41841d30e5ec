"""Commit the effect and the ack in one transaction: `python examples/exactly_once.py DSN CONSUMER` sums up by customer.

An order has many messages: it is inserted, updated, deleted. The program stores the amount that each order adds, and
the sum is a view. If it is killed at any moment, it counts nothing twice. It needs a consumer with
`mode: fifo`, and it writes into a schema of its own, which no consumer takes.

It needs a table with these columns, and stops at the first message that lacks one. Write other names below:

    create table orders (id int primary key, customer text, amount numeric);
"""

import logging
import sys
from decimal import Decimal
from typing import Any

import psycopg

from cdcbridge import Message, Queue, StaleReceipt

ORDER, CUSTOMER, AMOUNT = "id", "customer", "amount"  # the columns
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


class OtherShape(Exception):
    """A message without a column that this program needs: most probably all messages of the topic are so."""


def effect(connection: psycopg.Connection[Any], message: Message) -> None:
    """Store the effect of a message. After a backfill or a replay of the same message, the effect is the same."""
    match message.data:
        case {"op": "insert" | "read" | "message", "record": dict(row)}:
            count(connection, message, row)
        case {"op": "update", "record": dict(row), "old": old}:
            need(message, row, ORDER)
            before = old.get(ORDER) if old else None
            if before is not None and before != row.get(ORDER, before):
                forget(connection, message.topic, before)
            count(connection, message, row)
        case {"op": "delete", "record": dict(row)}:
            need(message, row, ORDER)
            forget(connection, message.topic, row[ORDER])
        case {"op": "truncate"}:
            connection.execute("delete from shop_effects.counted where topic = %s", (message.topic,))
        case {"op": "gap", "record": gap}:
            log.warning("changes are missing: %s. `cdcbridge backfill start` brings the rows again", gap)
        case data:
            raise BadRow(f"its op is {data['op']!r}, its record {data['record']!r}")


def need(message: Message, row: dict[str, Any], *columns: str) -> None:
    """Raise OtherShape where a column is missing. One with a large value that did not change is not missing."""
    missing = [column for column in columns if column not in row and column not in message.data["unchanged"]]
    if missing:
        raise OtherShape(f"{message.topic} has no {' and no '.join(missing)}, only {', '.join(row)}")


def count(connection: psycopg.Connection[Any], message: Message, row: dict[str, Any]) -> None:
    """Count the order for this customer and this amount, in the place of its earlier customer and amount."""
    published = message.data["op"] == "message"  # it may have no id: then it is an order of its own
    need(message, row, CUSTOMER, AMOUNT, *(() if published else (ORDER,)))
    order, customer, amount = row.get(ORDER, f"message {message.seq}"), row.get(CUSTOMER), row.get(AMOUNT)
    kept = message.data["unchanged"]  # the message does not carry these
    if (customer is None and CUSTOMER not in kept) or not isinstance(amount, int | Decimal):
        raise BadRow(f"{CUSTOMER} is {customer!r}, {AMOUNT} is {amount!r}")
    connection.execute(COUNT, (message.topic, str(order), customer, amount))


def forget(connection: psycopg.Connection[Any], topic: str, order: Any) -> None:
    """Remove the amount that the order added."""
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
        counted = dead = 0
        for message in queue.messages(wait=5, stop_when_empty=True):
            try:
                effect(connection, message)
                queue.ack([message], connection=connection)
                connection.commit()
                counted += 1
            except StaleReceipt:
                connection.rollback()  # it took too long, and somebody else has it now
            except OtherShape as error:
                connection.rollback()
                message.nack(reason=str(error))
                sys.exit(f"stopped at message {message.seq}: {error}. Write your columns into the program's head")
            except (BadRow, ValueError, psycopg.DataError) as error:  # UnreadableData is a ValueError
                connection.rollback()
                message.nack(reason=str(error), dead=True)
                dead += 1
                log.warning("message %s of %s is a dead letter: %s", message.seq, message.topic, error)
        print(f"{counted} messages counted, {dead} dead letters", f"(`cdcbridge dead list {consumer}`)" if dead else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
