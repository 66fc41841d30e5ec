"""The effect and the ack in one transaction: `python examples/exactly_once.py DSN CONSUMER`.

Sums up `amount` by customer in a table of the same database. Killed at any moment, it counts nothing twice.
"""

import sys

import psycopg

from cdcbridge import Queue, StaleReceipt

dsn, consumer = sys.argv[1:]
with psycopg.connect(dsn, client_encoding="UTF8") as connection, Queue.connect(dsn, consumer=consumer) as queue:
    # Whatever the server's defaults are: the ack of a fifo consumer needs both.
    connection.isolation_level, connection.read_only = psycopg.IsolationLevel.READ_COMMITTED, False
    connection.execute("create table if not exists totals (customer text primary key, amount numeric not null)")
    connection.commit()
    for message in queue.messages(wait=5, stop_when_empty=True):
        record = message.data["record"]
        try:
            connection.execute(
                "insert into totals values (%s, %s)"
                " on conflict (customer) do update set amount = totals.amount + excluded.amount",
                (record["customer"], record["amount"]),
            )
            queue.ack([message], connection=connection)
            connection.commit()
        except StaleReceipt:
            connection.rollback()  # it took too long, and somebody else has it now
