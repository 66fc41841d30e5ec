"""Adapters with a mistake."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence

from cdcbridge.config.sink import CustomSink
from cdcbridge.sinks.target import Failure, Outgoing, Target


class Hanging(Target[CustomSink]):
    """Calls something that never returns, in a thread that nobody can end."""

    async def open(self) -> None:
        await asyncio.to_thread(threading.Event().wait)

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        raise NotImplementedError

    async def close(self) -> None:
        pass


class Broken(Target[CustomSink]):
    async def open(self) -> None:
        pass

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        return {len(batch) // 0: Failure("never")}

    async def close(self) -> None:
        pass
