"""The same client with asyncio: `python examples/async_consumer.py DSN CONSUMER` prints what there is, and ends."""

import asyncio
import sys
from contextlib import aclosing

from cdcbridge import AsyncQueue


async def main(dsn: str, consumer: str) -> None:
    async with await AsyncQueue.connect(dsn, consumer=consumer) as queue:
        async with aclosing(queue.messages(wait=1, stop_when_empty=True)) as messages:
            async for message in messages:
                async with message:
                    print(message.seq, message.data["record"])


asyncio.run(main(*sys.argv[1:]))
