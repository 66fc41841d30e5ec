"""An adapter with a mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cdcbridge.config.sink import CustomSink
from cdcbridge.sinks.target import Failure, Outgoing, Target


class Broken(Target[CustomSink]):
    async def open(self) -> None:
        pass

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        return {len(batch) // 0: Failure("never")}

    async def close(self) -> None:
        pass
