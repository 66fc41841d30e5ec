"""The newest measurement of slot and consumers, for the pages of the dashboard.

The bridge keeps one in the store every ten seconds. Without a bridge that measures, this process measures by itself, in
a thread and only while somebody looks. A page never waits for a count of rows, except for the very first one. Never
writes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import orjson
import structlog

from cdcbridge.errors import CdcbridgeError
from cdcbridge.observe.lag import Lag
from cdcbridge.web.store import WebStore

_KEPT: Final = (
    "select extract(epoch from clock_timestamp() - measured_at)::float8, measured_at::text, lag::text from measurements"
)
_OLD: Final = 25.0  # seconds after which a measurement of a bridge is replaced by one of this process
_OWN: Final = 10.0  # seconds between two measurements of this process
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
        self._parsed: tuple[str, Mapping[str, Any]] = ("", {})
        self._task: asyncio.Task[None] | None = None

    async def measurement(self) -> Measurement:
        """Return the newest measurement.

        Raises:
            StoreUnavailable: The store cannot be reached.
        """
        rows = await self._store.rows(_KEPT)
        if rows and rows[0][0] <= _OLD:
            return Measurement(self._document(*rows[0][1:]), rows[0][0], by_bridge=True)
        now = monotonic()
        if self._task is None and (self._own is None or now - self._own[0] > _OWN):
            self._task = asyncio.create_task(self._renew())
        if self._own is None and self._task is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._task), _FIRST)
        if self._own is not None and not (rows and rows[0][0] < now - self._own[0]):
            return Measurement(self._own[1], monotonic() - self._own[0], by_bridge=False)
        if rows:
            return Measurement(self._document(*rows[0][1:]), rows[0][0], by_bridge=True)
        return Measurement({}, None, by_bridge=False)

    def close(self) -> None:
        """End a measurement in progress."""
        if self._task is not None:
            self._task.cancel()

    def _document(self, at: str, text: str) -> Mapping[str, Any]:
        if self._parsed[0] != at:
            self._parsed = (at, orjson.loads(text))
        return self._parsed[1]

    async def _renew(self) -> None:
        try:
            self._own = (monotonic(), (await self._measure()).as_json())
        except CdcbridgeError as error:
            log.warning("api.not_measured", error=str(error))
        finally:
            self._task = None
