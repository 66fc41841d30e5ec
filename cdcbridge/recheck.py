"""Looks now and then whether a consumer that could not work can work again, and then lets the bridge start its session
anew. Part of the rim.

It runs only while the leader goes on without something. It changes nothing, and a look that fails is tried again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import psycopg
import structlog

from cdcbridge.background import Background
from cdcbridge.choosing import Choice, choose
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store
from cdcbridge.errors import CdcbridgeError

_LONGEST_INTERVAL: Final = 5.0
log = structlog.get_logger()


class Recheck(Background):
    """Works from entry to exit of its `with` block.

    choice: what the session goes on with.
    reload: gives the file as it is now. A mended file is a mended consumer.
    mended: called once, with the consumers' names.
    """

    def __init__(
        self,
        choice: Choice,
        reload: Callable[[], Config],
        plugin: str,
        mended: Callable[[str], None],
    ) -> None:
        super().__init__("recheck")
        self._choice = choice
        self._reload = reload
        self._plugin = plugin
        self._mended = mended
        self._interval = min(_LONGEST_INTERVAL, max(0.5, choice.config.source.heartbeat_interval))

    def _work(self) -> None:
        while self._choice.faults and not self._stop.wait(self._interval):
            try:
                if self._look_until_mended():
                    return
            except (CdcbridgeError, psycopg.Error) as error:
                log.warning("recheck.failed", error=" ".join(str(error).split()))

    def _look_until_mended(self) -> bool:
        config = self._choice.config
        with (
            connect_source(config.source_dsn, "cdcbridge recheck") as connection,
            connect_store(config.store_dsn, config.store.schema_, "cdcbridge recheck") as store,
        ):
            while not self._stop.wait(self._interval):
                if names := self._mended_now(connection, store):
                    self._mended(f"consumers: {names} can work again; starting again")
                    return True
        return True

    def _mended_now(self, connection: Connection, store: Connection) -> str:
        """The consumers that have a fault less than when the session began; '' for none."""
        now = choose(self._reload(), connection, store, self._plugin)
        return ", ".join(sorted({consumer for consumer, _ in self._choice.troubles - now.troubles}))
