"""The bridge: from the slot to the store, and back the LSN that PostgreSQL may forget. Read top to bottom.

A session takes the lead, compares histories, and streams. Whatever breaks ends the session; the next one starts from
what the store holds. A bridge that does not reach the source does not take the lead, or keep it.
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

# The appender mostly waits for the server, and after each wait it needs the interpreter lock, which the decoding thread
# gives up only this often. At Python's 5 ms every round trip of an append would cost 5 ms.
SWITCH_INTERVAL: Final = 0.0001
_STANDBY_INTERVAL: Final = 0.5
_LONGEST_RETRY: Final = 10.0
_BUSY_RETRY: Final = 0.2  # the slot is free as soon as the server has noticed that the one before is gone
_BUSY_RETRIES: Final = 25
log = structlog.get_logger()


class Bridge:
    """run() until stop(); `wait` False gives up at once where another bridge leads. `consistent`: see prepare().

    `reload` gives the configuration anew before each session. `health` tells others how it is.
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
        # Not when run() ends, since another thread may call stop() after that. Nor at exit: a signal may still come.
        weakref.finalize(self, _close, *ends).atexit = False
        self._streamed = False
        self._learned = Learned()

    def stop(self) -> None:
        """End after the append that is under way. Safe in a signal handler and from another thread."""
        self._stopping.set()
        os.write(self._stop_write, b"x")

    def run(self) -> None:
        """Stream until stopped. Servers that go away are waited for; what needs an operator is raised."""
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
        """Exponential with jitter, from 0.1 s to 10 s; anew after each session that streamed."""
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
            # Before the lead: who cannot reach the source, or means another one, leaves the lead to those who can.
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
        """Take the file as it is now, which a stand-by read long ago; whether it means other databases since."""
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
        """Whether this bridge leads now; as stand-by it waits for the lead, False when stopped meanwhile."""
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
        """Prepare both sides, then stream until stopped, or until a transaction begun under older options is done."""
        self._health.prepares()
        learned = self._learned
        stream = open_stream(self._config, patient=learned.stuck)
        try:
            # The epoch before anything is read: an older bridge that still hangs can append nothing after that.
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
                    # Others need not wait until everything here has ended: what is still under way is fenced.
                    stream.close()
                    lead.release()
        finally:
            stream.close()


def _catalog(connection: Connection, ready: Ready, store: BridgeStore) -> SourceCatalog:
    """What is known of the source's tables, with every table that is captured now, and remembered in the store."""
    catalog = SourceCatalog(connection, ready.router, store.catalog())
    catalog.meet_all()
    if (known := catalog.remember()) is not None:
        store.set_catalog(known)
    return catalog


def _close(*files: int) -> None:
    for file in files:
        os.close(file)
