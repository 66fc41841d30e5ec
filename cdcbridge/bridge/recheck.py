"""Look every few seconds whether each consumer can still work, and whether a faulty one can work again.

In both cases the bridge starts its session anew, which reports the fault and goes on without it. For example,
`alter table orders drop constraint orders_pkey` is logged within 5 s. This module changes nothing. While nothing is
wrong and no table was altered, a look is one query of the catalogue. Part of the rim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import psycopg
import structlog

from cdcbridge.background import Background
from cdcbridge.bridge.choosing import Choice, choose
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store
from cdcbridge.errors import CdcbridgeError
from cdcbridge.routing.patterns import whole
from cdcbridge.source.definitions import mark

_LONGEST_INTERVAL: Final = 5.0  # seconds
log = structlog.get_logger()


class Recheck(Background):
    """Works from entry to exit of its `with` block.

    choice: what the session goes on with.
    reload: gives the file as it is now. A mended file is a mended consumer.
    again: called once, with the reason to start the session anew.
    """

    def __init__(
        self,
        choice: Choice,
        reload: Callable[[], Config],
        plugin: str,
        again: Callable[[str], None],
    ) -> None:
        super().__init__("recheck")
        self._choice = choice
        self._reload = reload
        self._plugin = plugin
        self._again = again
        self._interval = min(_LONGEST_INTERVAL, max(0.5, choice.config.source.heartbeat_interval))
        self._patterns = [pattern for consumer in choice.config.consumers for pattern in whole(consumer.tables)]
        self._mark = ""  # of the tables' definitions at the last look

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                if self._look_on():
                    return
            except (CdcbridgeError, psycopg.Error) as error:
                log.warning("recheck.failed", error=" ".join(str(error).split()))
                self._stop.wait(self._interval)

    def _look_on(self) -> bool:
        """Look until the session is to start anew, or has ended; whether that is so."""
        config = self._choice.config
        with connect_source(config.source_dsn, "cdcbridge recheck") as connection:
            while not self._stop.wait(self._interval):
                if reason := self._reason(connection):
                    self._again(reason)
                    return True
        return True

    def _reason(self, connection: Connection) -> str:
        """Why the session is to start anew; '' for no reason."""
        now = mark(connection, self._patterns, self._choice.config.store.schema_)
        if now == self._mark and not self._choice.faults:
            return ""
        with connect_store(
            self._choice.config.store_dsn, self._choice.config.store.schema_, "cdcbridge recheck"
        ) as store:
            if now != self._mark and (names := self._faulty_now(connection, store)):
                return f"consumers: {names} cannot work as before; starting again without what is unusable"
            self._mark = now
            if self._choice.faults and (names := self._mended_now(connection, store)):
                return f"consumers: {names} can work again; starting again"
        return ""

    def _faulty_now(self, connection: Connection, store: Connection) -> str:
        """The consumers that have a fault more than when the session began; '' for none."""
        now = choose(self._choice.config, connection, store, self._plugin)
        return _names(now.troubles - self._choice.troubles)

    def _mended_now(self, connection: Connection, store: Connection) -> str:
        """The consumers that have a fault less than when the session began; '' for none."""
        now = choose(self._reload(), connection, store, self._plugin)
        return _names(self._choice.troubles - now.troubles)


def _names(troubles: frozenset[tuple[str, str, str]]) -> str:
    return ", ".join(sorted({consumer for consumer, *_ in troubles}))
