"""A worker: `python examples/worker.py DSN CONSUMER` handles eight messages at a time until SIGTERM.

What returns is acked, what raises comes again after the consumer's back-off, and long work is kept from expiring.
It takes any table and any topic. It prints what it gets.
"""

import logging
import sys
from decimal import Decimal

from cdcbridge import Message, Queue

logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
log = logging.getLogger("orders")
# With parse_float=Decimal a numeric keeps all of its digits.
queue = Queue.connect(sys.argv[1], consumer=sys.argv[2], parse_float=Decimal)


@queue.worker(concurrency=8)
def handle(message: Message) -> None:
    try:
        data = message.data
    except ValueError as error:  # JSON that Python cannot hold: trying again does not help
        message.nack(reason=str(error), dead=True)
        return
    match data["op"]:
        case "insert" | "update" | "read" | "message" as op:
            log.info("%s %s %s %s", message.topic, message.key, op, data["record"])
        case "delete":  # the row is gone: `record` has its key, or all of it under REPLICA IDENTITY FULL
            log.info("%s %s delete %s", message.topic, message.key, data["record"])
        case "truncate":  # the table is empty: no record, no key
            log.info("%s is empty", message.topic)
        case "gap":  # changes between two positions are not in the log: compare with the tables
            log.warning("changes are missing: %s", data["record"])


handle.run()
