"""Check every few seconds whether each consumer can still work, and whether a faulty one can work again.

In both cases the bridge starts its streaming session again. The new one logs a fault and continues without the unusable
consumer or table, or takes it up again. For example, `alter table orders drop constraint orders_pkey` is logged within
5 s. While nothing is wrong and no table was altered, a look is one query of the catalog. This module reads both
databases, and never changes anything.
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
    """The thread that checks, from entry to exit of its `with` block.

    Args:
        choice: The consumers that the streaming session continues with.
        reload: Returns the configuration as the file has it now, because a correction there can make a consumer work
            again.
        plugin: The output plugin of the streaming session.
        again: Called once, with the reason to start the streaming session again.
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
        self._mark = ""  # of the tables' definitions at the last look, see source/definitions.py

    def _work(self) -> None:
        # The start of the session has just checked everything, so the first look is one interval later.
        while not self._stop.wait(self._interval):
            try:
                self._look_on()
                return
            except (CdcbridgeError, psycopg.Error) as error:
                log.warning("recheck.failed", error=" ".join(str(error).split()))

    def _look_on(self) -> None:
        """Look until a new streaming session is needed, or the thread must stop."""
        config = self._choice.config
        with connect_source(config.source_dsn, "cdcbridge recheck") as connection:
            while not (reason := self._reason(connection)):
                if self._stop.wait(self._interval):
                    return
            self._again(reason)

    def _reason(self, connection: Connection) -> str:
        """Return the reason to start the streaming session again, or ''."""
        now = mark(connection, self._patterns, self._choice.config.store.schema_)
        if now == self._mark and not self._choice.faults:
            return ""
        with connect_store(
            self._choice.config.store_dsn, self._choice.config.store.schema_, "cdcbridge recheck"
        ) as store:
            if now != self._mark and (names := self._faulty_now(connection, store)):
                return f"consumers: {names} cannot work as before. The bridge starts again without them"
            self._mark = now
            if self._choice.faults and (names := self._mended_now(connection, store)):
                return f"consumers: {names} can work again. The bridge starts again"
        return ""

    def _faulty_now(self, connection: Connection, store: Connection) -> str:
        """Return the names of consumers with a fault that they did not have at the beginning, or ''."""
        now = choose(self._choice.config, connection, store, self._plugin)
        return _names(now.troubles - self._choice.troubles)

    def _mended_now(self, connection: Connection, store: Connection) -> str:
        """Return the names of consumers without a fault that they had at the beginning, or ''."""
        now = choose(self._reload(), connection, store, self._plugin)
        return _names(self._choice.troubles - now.troubles)


def _names(troubles: frozenset[tuple[str, str, str]]) -> str:
    return ", ".join(sorted({consumer for consumer, *_ in troubles}))
