"""A worker: `python examples/worker.py DSN CONSUMER` handles eight messages at a time until SIGTERM.

What returns is acked, what raises comes again after the consumer's back-off, and long work is kept from expiring.
"""

import logging
import sys

from cdcbridge import Message, Queue

logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
log = logging.getLogger("orders")
queue = Queue.connect(sys.argv[1], consumer=sys.argv[2])


@queue.worker(concurrency=8)
def handle(message: Message) -> None:
    record = message.data["record"]
    log.info("%s %s %s %s", message.topic, message.key, message.data["op"], record)


handle.run()
