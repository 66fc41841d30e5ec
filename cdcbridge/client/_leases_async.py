"""Leases that are prolonged in the background while their messages are handled, asynchronous.

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

_TICK: Final = 0.25  # seconds between looks at what has to be prolonged
_SHORTEST: Final = 0.02  # for the shortest leases
_LINGER: Final = 10.0  # seconds after which it ends where nothing is held
log: Final = logging.getLogger("cdcbridge.client")


class Lease(Protocol):
    """A delivery, or a batch of a stream."""

    @property
    def half_over(self) -> bool: ...
    @property
    def idle(self) -> bool: ...
    @property
    def visibility(self) -> float: ...


Renew: TypeAlias = Callable[[list[Any]], Awaitable[None]]


class AsyncKeeper:
    """Extends each lease that it holds when half of it is over. `renew` extends them, and marks lost ones."""

    def __init__(self, renew: Renew) -> None:
        self._renew = renew
        self._held: set[Lease] = set()
        self._guard = threading.Lock()  # held for a moment only, so tasks can use it as well
        self._beside: Any = None

    def hold(self, leases: Iterable[Lease]) -> None:
        """Extend these from now on."""
        with self._guard:
            self._held.update(leases)
            if self._held and self._beside is None:
                self._beside = begin(self._run)

    def drop(self, leases: Iterable[Lease]) -> None:
        """Do not extend these any more."""
        with self._guard:
            self._held.difference_update(leases)

    def close(self) -> None:
        """Extend nothing any more."""
        with self._guard:
            self._held.clear()
            beside, self._beside = self._beside, None
        if beside is not None:
            end(beside)

    async def _run(self) -> None:
        with self._guard:  # hold() has it until it knows this one
            mine = self._beside
        unused = 0.0
        while True:
            with self._guard:
                held = [lease for lease in self._held if not lease.idle]
                unused = 0.0 if held else unused + _TICK
                if self._beside is not mine or unused > _LINGER:
                    self._beside = None if self._beside is mine else self._beside
                    return
            due = [lease for lease in held if lease.half_over]
            if due:
                await self._prolong(due)
            await sleep(max(_SHORTEST, min([_TICK, *(lease.visibility / 8 for lease in held)])))

    async def _prolong(self, due: list[Lease]) -> None:
        try:
            await self._renew(due)
        except ClientClosed:
            pass
        except CdcbridgeError as error:
            log.warning("%s; what is being handled may come again", error)
        except Exception:
            log.exception("leases could not be prolonged; what is being handled may come again")
