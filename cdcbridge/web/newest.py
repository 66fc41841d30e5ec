"""The newest measurement of slot and consumers, for the pages of the dashboard.

The bridge keeps one in the store every ten seconds. Without a bridge that measures, this process measures by itself, in
a thread and only while somebody looks. A page never waits for a count of rows, except for the very first one. Never
writes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import orjson
import structlog

from cdcbridge.observe.lag import Lag
from cdcbridge.web.store import WebStore

_KEPT: Final = """
    select extract(epoch from clock_timestamp() - measured_at)::float8, measured_at::text,
           case when measured_at::text is distinct from %s then lag::text end
    from measurements"""
_OLD: Final = 60.0  # seconds after which a measurement of a bridge is replaced by one of this process
_OWN: Final = 10.0  # seconds from one measurement of this process to the next
_FAILED: Final = 60.0  # seconds to the next one after a failure, for example because it takes too long
_FIRST: Final = 3.0  # seconds that a page waits for the first measurement of all
log = structlog.get_logger()


@dataclass(slots=True, frozen=True)
class Measurement:
    """A measurement.

    Attributes:
        lag: What `cdcbridge lag --json` prints, or {} if nothing was measured yet.
        age: Its age in seconds, or None if nothing was measured yet.
        by_bridge: Whether a bridge measured it.
    """

    lag: Mapping[str, Any]
    age: float | None
    by_bridge: bool

    @property
    def stale(self) -> bool:
        """Whether the figures are older than they should be."""
        return self.age is None or self.age > _OLD

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return a list of the measurement, for example that of the consumers."""
        return list(self.lag.get(name) or ())

    def consumers(self) -> list[dict[str, Any]]:
        """Return the consumers, each with all of its figures."""
        health = {row["name"]: row for row in self.rows("consumer_health")}
        return [{**row, **health.get(row["name"], {})} for row in self.rows("consumers")]


class Newest:
    """The newest measurement, from the store or from this process.

    Args:
        store: The sessions on the store.
        measure: Measures the slot and the consumers.
    """

    def __init__(self, store: WebStore, measure: Callable[[], Awaitable[Lag]]) -> None:
        self._store = store
        self._measure = measure
        self._own: tuple[float, Mapping[str, Any]] | None = None
        self._kept: tuple[str, Mapping[str, Any]] = ("", {})
        self._next = 0.0  # when this process may measure again
        self._task: asyncio.Task[None] | None = None

    async def measurement(self) -> Measurement:
        """Return the newest measurement.

        Raises:
            StoreUnavailable: The store cannot be reached.
        """
        kept = await self._from_store()
        if kept is not None and kept.age is not None and kept.age <= _OLD:
            return kept
        if self._task is None and monotonic() >= self._next:
            first = self._next == 0.0
            self._next = monotonic() + _FAILED
            self._task = asyncio.create_task(self._renew())
            if first:
                await asyncio.wait({self._task}, timeout=_FIRST)
        own = None if self._own is None else Measurement(self._own[1], monotonic() - self._own[0], by_bridge=False)
        if own is None:
            return kept or Measurement({}, None, by_bridge=False)
        return own if kept is None or (own.age or 0.0) < (kept.age or 0.0) else kept

    def close(self) -> None:
        """End a measurement in progress."""
        if self._task is not None:
            self._task.cancel()

    async def _from_store(self) -> Measurement | None:
        """Return the measurement that a bridge has kept. It is transferred only if it is a new one."""
        rows = await self._store.rows(_KEPT, (self._kept[0],))
        if not rows:
            return None
        age, at, text = rows[0]
        if text is not None:
            self._kept = (at, orjson.loads(text))
        return Measurement(self._kept[1], age, by_bridge=True)

    async def _renew(self) -> None:
        try:
            self._own = (monotonic(), (await self._measure()).as_json())
            self._next = monotonic() + _OWN
        except Exception as error:  # noqa: BLE001 - the pages show the figures that they have
            log.warning("api.not_measured", error=str(error))
        finally:
            self._task = None
