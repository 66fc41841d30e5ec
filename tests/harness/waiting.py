"""An asynchronous client as a synchronous one, so that the same tests are for both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Self

from cdcbridge import AsyncBatch, AsyncMessage


class Waiting:
    """An asynchronous object whose calls wait."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self._target, self._runner = target, runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            result = value(*(unwrap(a) for a in arguments), **{k: unwrap(v) for k, v in named.items()})
            if hasattr(result, "__anext__"):
                return self._iterate(result)
            return self._wrap(self._runner.run(result)) if asyncio.iscoroutine(result) else result

        return call

    def __len__(self) -> int:
        return len(self._target)

    def _iterate(self, iterator: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    item = self._runner.run(anext(iterator))
                except StopAsyncIteration:
                    return
                yield self._wrap(item)
        finally:
            self._runner.run(iterator.aclose())

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._wrap(item) for item in value]
        return Waiting(value, self._runner) if isinstance(value, AsyncMessage | AsyncBatch) else value

    def __enter__(self) -> Self:
        self._runner.run(self._target.__aenter__())
        return self

    def __exit__(self, *details: object) -> None:
        self._runner.run(self._target.__aexit__(*details))


def unwrap(value: Any) -> Any:
    if isinstance(value, list):
        return [unwrap(item) for item in value]
    return value._target if isinstance(value, Waiting) else value
