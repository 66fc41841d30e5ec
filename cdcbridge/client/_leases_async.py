"""Leases that are extended in the background while their messages are handled, asynchronous.

`_leases.py` is made from this file by `make client`: change this one.

Never begins a delivery and never ends one. The owner marks the leases that cannot be extended as lost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol, TypeAlias

from cdcbridge.client._tasks import begin, end, sleep
from cdcbridge.errors import CdcbridgeError, ClientClosed

_TICK: Final = 0.25  # seconds between looks for leases to extend
_SHORTEST: Final = 0.02  # the same for the shortest leases
_LINGER: Final = 10.0  # seconds without a lease after which the background run ends
log: Final = logging.getLogger("cdcbridge.client")


class Lease(Protocol):
    """The lease of a delivery, or of a batch of a stream."""

    @property
    def _half_over(self) -> bool: ...
    @property
    def _idle(self) -> bool: ...
    @property
    def _visibility(self) -> float: ...


Renew: TypeAlias = Callable[[list[Any]], Awaitable[None]]


class AsyncKeeper:
    """A keeper of leases, which extends each lease that it holds when half of it is over.

    The function `renew` extends the leases that are due, and marks the lost ones.
    """

    def __init__(self, renew: Renew) -> None:
        self._renew = renew
        self._held: set[Lease] = set()
        self._guard = threading.Lock()  # held only for an instant, so tasks may block on it, too
        self._beside: Any = None

    def hold(self, leases: Iterable[Lease]) -> None:
        """Extend these leases from now on."""
        with self._guard:
            self._held.update(leases)
            if self._held and self._beside is None:
                self._beside = begin(self._run)

    def drop(self, leases: Iterable[Lease]) -> None:
        """Stop extending these leases."""
        with self._guard:
            self._held.difference_update(leases)

    def close(self) -> None:
        """Stop extending all leases, and end the background run."""
        with self._guard:
            self._held.clear()
            beside, self._beside = self._beside, None
        if beside is not None:
            end(beside)

    async def _run(self) -> None:
        """Extend the leases that are due, until close() or until no lease was held for _LINGER seconds."""
        with self._guard:  # hold() keeps the guard until it has stored this run
            mine = self._beside
        unused = 0.0
        while True:
            with self._guard:
                held = [lease for lease in self._held if not lease._idle]
                unused = 0.0 if held else unused + _TICK
                if self._beside is not mine or unused > _LINGER:
                    self._beside = None if self._beside is mine else self._beside
                    return
            due = [lease for lease in held if lease._half_over]
            if due:
                await self._prolong(due)
            await sleep(max(_SHORTEST, min([_TICK, *(lease._visibility / 8 for lease in held)])))

    async def _prolong(self, due: list[Lease]) -> None:
        """Extend these leases. Log an error instead of raising it, so that the background run continues."""
        try:
            await self._renew(due)
        except ClientClosed:
            pass
        except CdcbridgeError as error:
            log.warning("%s. The messages being handled may be delivered again", error)
        except Exception:
            log.exception("leases could not be extended. The messages being handled may be delivered again")
