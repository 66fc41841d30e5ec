"""The same client with asyncio: `python examples/async_consumer.py DSN CONSUMER` prints what there is, and ends.

It takes any table and any topic.
"""

import asyncio
import sys
from contextlib import aclosing
from decimal import Decimal

from cdcbridge import AsyncMessage, AsyncQueue


async def handle(message: AsyncMessage) -> None:
    match message.data:
        case {"op": "truncate"}:
            print(message.seq, message.topic, "is empty")
        case {"op": "gap", "record": gap}:
            print(message.seq, "changes are missing:", gap)
        case {"op": op, "record": record}:  # insert, update, delete, read, message
            print(message.seq, op, record)


async def main(dsn: str, consumer: str) -> None:
    async with await AsyncQueue.connect(dsn, consumer=consumer, parse_float=Decimal) as queue:
        async with aclosing(queue.messages(wait=1, stop_when_empty=True)) as messages:
            async for message in messages:
                try:
                    async with message:  # acks on leaving, and gives back where handle() raises
                        await handle(message)
                except ValueError as error:  # JSON that Python cannot hold: it came back, and goes to the dead letters
                    print(message.seq, "comes again, and then is a dead letter:", error)


asyncio.run(main(*sys.argv[1:]))
