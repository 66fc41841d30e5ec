"""Run the bridge: stream changes from the slot into the store, and confirm to PostgreSQL the LSN that it may forget.

Read this file from top to bottom. Each streaming session checks that source and store belong together, takes the lead,
and streams. Any error ends it. The next one starts from the position that the store holds. A bridge that cannot reach
the source never takes or keeps the lead.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Final

import structlog
import tenacity

from cdcbridge.backfill.scheduler import Backfiller
from cdcbridge.backfill.worker import BackfillSession
from cdcbridge.bridge.accepting import tell_stand_by
from cdcbridge.bridge.housekeeping import Housekeeper
from cdcbridge.bridge.pacing import Pacing
from cdcbridge.bridge.preparation import Learned, Ready, prepare, refuse_other_source
from cdcbridge.bridge.recheck import Recheck
from cdcbridge.bridge.session import SessionParts, StreamingSession
from cdcbridge.changes.position import START
from cdcbridge.checks.server import refuse_unwritable
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, server_errors
from cdcbridge.errors import (
    CdcbridgeError,
    ConfigError,
    Fenced,
    NotLeader,
    SlotInUse,
    SourceUnavailable,
    StoreUnavailable,
)
from cdcbridge.lsn import format_lsn
from cdcbridge.observe.health import Health
from cdcbridge.source.capture import Watched
from cdcbridge.source.catalog import SourceCatalog
from cdcbridge.source.sessions import open_stream
from cdcbridge.store.leadership import Lead
from cdcbridge.store.log import BridgeStore

# Seconds between two moments at which a thread releases the interpreter lock. The appender mostly waits for the server,
# and after each wait it needs the lock, which the decoding thread holds. With Python's default of 5 ms, each round trip
# of an append would take 5 ms.
SWITCH_INTERVAL: Final = 0.0001
_STANDBY_INTERVAL: Final = 0.5
_LONGEST_RETRY: Final = 10.0
_BUSY_RETRY: Final = 0.2  # seconds; the server frees the slot once it notices that the previous reader has ended
_BUSY_RETRIES: Final = 25
log = structlog.get_logger()


class Bridge:
    """The bridge process, which works from run() until stop().

    Args:
        config: The configuration to begin with.
        wait: Whether to wait as a standby while another bridge leads. If False, run() raises NotLeader instead.
        reload: Returns the configuration as the file has it now. Called at the start of each streaming session, and
            again when the bridge has the lead.
        consistent: See prepare().
        health: The state of the bridge, which HTTP, the metrics and systemd's watchdog read.
    """

    def __init__(
        self,
        config: Config,
        *,
        wait: bool = True,
        reload: Callable[[], Config] | None = None,
        consistent: bool = False,
        health: Health | None = None,
    ) -> None:
        self._config = config
        self._reload = reload
        self._wait = wait
        self._consistent = consistent
        self._health = health or Health()
        self._stopping = threading.Event()
        self._stop_read, self._stop_write = ends = os.pipe()
        # The pipe stays open after run(), because another thread may call stop() then.
        # It also stays open at exit, because a signal may still arrive.
        weakref.finalize(self, _close, *ends).atexit = False
        self._streamed = False
        self._learned = Learned()

    def stop(self) -> None:
        """End the bridge after the append in progress. Safe in a signal handler and from another thread."""
        self._stopping.set()
        os.write(self._stop_write, b"x")

    def run(self) -> None:
        """Stream until the bridge is stopped.

        After an error that a retry can fix, the bridge waits and starts a new streaming session. An example is a server
        that is out of reach. The method raises every error that needs an operator.

        Raises:
            OperatorNeeded: Nothing that the program may do by itself helps.
            CheckFailed: There are errors, which `cdcbridge check` also reports.
            NotLeader: Another bridge leads, and `wait` is False.
        """
        sys.setswitchinterval(SWITCH_INTERVAL)
        again = (SourceUnavailable, StoreUnavailable, NotLeader if self._wait else Fenced)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(again),
            wait=self._backoff,
            sleep=self._stopping.wait,  # type: ignore[arg-type]
            stop=tenacity.stop_when_event_set(self._stopping),
            before_sleep=self._tell_retry,
            reraise=True,
        )
        try:
            while not self._stopping.is_set():
                self._streamed = False
                try:
                    retrying(self._session)
                except again:
                    if not self._stopping.is_set():
                        raise
        finally:
            self._health.stops()
        log.info("bridge.stopped")

    def _backoff(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds to wait before the next attempt.

        The time is random. Its upper bound doubles with each attempt from 0.1 s to 10 s, and starts anew after a
        session that streamed. While another database session uses the slot, the first 25 attempts follow each other
        every 0.2 s instead.
        """
        if self._streamed:
            state.attempt_number, self._streamed = 1, False
        busy = state.outcome is not None and isinstance(state.outcome.exception(), SlotInUse)
        if busy and state.attempt_number <= _BUSY_RETRIES:
            return _BUSY_RETRY
        return tenacity.wait_random_exponential(multiplier=0.1, max=_LONGEST_RETRY)(state)

    def _tell_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        delay = round(state.next_action.sleep, 2) if state.next_action else 0
        self._health.retries(str(error))
        if isinstance(error, Fenced):
            log.info("bridge.again", reason=str(error))
            return
        hint = {"hint": error.hint} if isinstance(error, CdcbridgeError) and error.hint else {}
        log.warning("bridge.retry", error=str(error), **hint, retry_in_seconds=delay)

    def _session(self) -> None:
        with server_errors():
            self._one_session()

    def _one_session(self) -> None:
        self._read_config()
        store = BridgeStore(self._config.store_dsn, self._config.store.schema_)
        try:
            refuse_unwritable(self._config, store.connection)
            store.migrate()
            # Check this before taking the lead. A bridge that cannot reach the source, or is configured for
            # another one, must leave the lead to the other bridges.
            refuse_other_source(self._config, store)
            lead = Lead(self._config.store_dsn, self._config.store.schema_)
            try:
                if self._take_lead(lead, store) and not self._read_config():
                    self._lead(lead, store)
            finally:
                lead.close()
        except CdcbridgeError as error:
            if not isinstance(error, NotLeader | SlotInUse):
                store.note_error(str(error), error.hint)
            raise
        finally:
            store.close()

    def _read_config(self) -> bool:
        """Read the configuration file again. Return whether its settings of `source` or `store` have changed.

        A standby may have read the file long ago. If the file is invalid, the error is logged and the old configuration
        stays.
        """
        before = self._config
        if self._reload is not None:
            try:
                self._config = self._reload()
            except ConfigError as error:
                log.warning("config.kept", error=str(error))
        return (self._config.source, self._config.store) != (before.source, before.store)

    def _tell_start(self, ready: Ready, epoch: int) -> None:
        log.info(
            "bridge.streaming",
            slot=self._config.source.slot,
            plugin=ready.plugin,
            epoch=epoch,
            start_lsn=format_lsn(ready.tail.end_lsn),
            position=None if ready.tail.position == START else str(ready.tail.position),
            consumers=len(ready.subscriptions),
        )

    def _take_lead(self, lead: Lead, store: BridgeStore) -> bool:
        """Take the lead, or wait for it as a standby first. Return False if the bridge was stopped meanwhile.

        Raises NotLeader if another bridge leads and this one must not wait.
        """
        told = False
        while not lead.try_take():
            leader = store.leader()
            if not self._wait:
                raise NotLeader(f"another bridge leads: {leader}")
            if not told:
                log.info("bridge.standby", leader=leader)
                tell_stand_by(self._config, store)
                told = self._learned.again = True
            self._health.stands_by(leader)
            if self._stopping.wait(_STANDBY_INTERVAL):
                return False
        return True

    def _lead(self, lead: Lead, store: BridgeStore) -> None:
        """Prepare source and store, then stream.

        The method returns when the bridge is stopped, or when the streaming session ends by itself. For example, one
        ends when it has finished a transaction that began under older options.
        """
        self._health.prepares()
        learned = self._learned
        stream = open_stream(self._config, patient=learned.stuck)
        try:
            # Begin the epoch before reading anything. From then on an older bridge that still hangs cannot append.
            epoch = lead.epoch = store.begin_epoch()
            ready = prepare(
                self._config,
                store,
                stream,
                learned,
                consistent=self._consistent,
                stopped=self._stopping.is_set,
            )
            with (
                connect_source(self._config.source_dsn, "cdcbridge catalog") as catalog_session,
                connect_store(self._config.store_dsn, self._config.store.schema_, "cdcbridge blocks") as blocks,
                Housekeeper(self._config),
                Backfiller(BackfillSession(self._config, epoch, ready.router), idle=ready.finishing) as backfiller,
                Recheck(ready.choice, self._reload or (lambda: self._config), ready.plugin, lead.end),
            ):
                store.forget_spilled()
                catalog = _catalog(catalog_session, ready, store)
                ready.watched = None if ready.capture is None else Watched(catalog_session, ready.capture)
                ready.start(stream, catalog_session, self._config.source.slot)
                self._tell_start(ready, epoch)
                self._streamed = True
                self._health.streams(epoch, ready.choice.trouble)
                session = StreamingSession(
                    SessionParts(store, stream, ready, catalog, backfiller.session, lead, self._health, blocks),
                    Pacing(self._config.source.heartbeat_interval, ready.wal_sender_timeout),
                    self._stop_read,
                )
                learned.streams()
                try:
                    session.run(self._stopping)
                except SourceUnavailable as error:
                    learned.failed(error, appended=session.appended)
                    raise
                finally:
                    # Free slot and lead now, so that other bridges need not wait for the end of everything else here.
                    # An append that is still in progress is fenced.
                    stream.close()
                    lead.release()
        finally:
            stream.close()


def _catalog(connection: Connection, ready: Ready, store: BridgeStore) -> SourceCatalog:
    """Return the catalog of the source's tables.

    The catalog contains the definitions that the store remembers, and every table that is captured now. A changed
    result is stored.
    """
    catalog = SourceCatalog(connection, ready.router, store.catalog())
    catalog.meet_all()
    if (known := catalog.remember()) is not None:
        store.set_catalog(known)
    return catalog


def _close(*files: int) -> None:
    for file in files:
        os.close(file)
