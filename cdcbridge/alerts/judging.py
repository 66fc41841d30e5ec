"""Evaluate the rules periodically, in a thread of the bridge that leads, or of any bridge while none leads.

The facts are those that the bridge measures for its metrics anyway. The thread opens a session on the store for each
evaluation. It never contacts a destination.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import psycopg
import structlog

from cdcbridge.alerts import facts as look
from cdcbridge.alerts import store as queue
from cdcbridge.alerts.courier import Courier
from cdcbridge.alerts.facts import Facts, Measured
from cdcbridge.alerts.metrics import AlertMetrics
from cdcbridge.alerts.notices import write
from cdcbridge.alerts.rules import Key, Limits, judge
from cdcbridge.alerts.tracking import Kind, Open, Step, step
from cdcbridge.background import Background
from cdcbridge.config import Config
from cdcbridge.config.alerts import Alerts, NoLeader, StoreAway
from cdcbridge.database import Connection, connect_store
from cdcbridge.instants import reach
from cdcbridge.observe.health import Health
from cdcbridge.store.migrate import schema_version

_START: Final = 30.0  # seconds that a bridge may take to lead, or to stand by, before the first evaluation
_LOOK_AGAIN: Final = 0.2  # seconds between two looks whether it does
_LAST_TRIES: Final = 5.0  # seconds to evaluate once more after the bridge has ended, of the 10 s that it waits for that
_LEADS: Final = ("preparing", "streaming")  # states of a bridge that leads
log = structlog.get_logger()


class Judge(Background):
    """The thread.

    Args:
        config: The configuration, with `alerts`.
        source: The name of the source, for the titles.
        measured: The thread that measures.
        health: The state of the bridge.
        couriers: The threads that deliver.
        metrics: The metrics of the alerts.
    """

    def __init__(
        self,
        config: Config,
        alerts: Alerts,
        source: str,
        measured: Measured,
        health: Health,
        couriers: Sequence[Courier],
        metrics: AlertMetrics,
    ) -> None:
        super().__init__("alerts")
        self._config = config
        self._alerts = alerts
        self._source = source
        self._measured = measured
        self._health = health
        self._couriers = couriers
        self._metrics = metrics
        self._limits = Limits(config.source.max_retained_wal, config.source.max_slot_inactive)
        # Two evaluations of one measurement are not two.
        self._apart = dt.timedelta(seconds=max(alerts.every, measured.interval))
        self._here = f"{socket.gethostname()} pid {os.getpid()}"  # as in `leaders`
        self._began = time.monotonic()
        self._woken = threading.Event()
        self._ended = ""  # the error with which the bridge ended; `main` writes it once, before it wakes the thread
        self._own_until = 0.0  # until when the own session may still seem to lead after the bridge has ended
        self._silences: dict[str, dt.datetime] = {}
        self._failures = 0
        self._away: Open | None = None  # the condition store_away, which the store cannot keep

    def finish(self, error: str) -> None:
        """Evaluate the rules once more, let everything be delivered, and end, because the bridge has ended."""
        self._ended = error
        self._woken.set()

    def stop(self) -> None:
        super().stop()
        self._woken.set()

    def _work(self) -> None:
        while self._starting():
            self._woken.wait(_LOOK_AGAIN)
        while not self._stop.is_set():
            last = bool(self._ended)
            if last:
                self._judge_last()
            else:
                self._judge()
            if last:
                for courier in self._couriers:
                    courier.finish()
                return
            self._woken.wait(self._alerts.every)

    def _starting(self) -> bool:
        """Return whether to leave the bridge more time, because it does not lead yet, and nothing is measured yet."""
        ready = self._measured.looked.is_set() and self._health.state in ("streaming", "standby")
        return not (ready or self._woken.is_set() or time.monotonic() - self._began > _START)

    def _judge_last(self) -> None:
        """Evaluate once more, also if another bridge does so just now, or if the own session still seems to lead."""
        deadline = time.monotonic() + _LAST_TRIES
        self._own_until = time.monotonic() + _LAST_TRIES / 2
        while not self._judge() and not self._stop.is_set() and time.monotonic() < deadline:
            self._stop.wait(_LOOK_AGAIN)

    def _judge(self) -> bool:
        """Evaluate the rules, and return False if that could not be done yet."""
        schema = self._config.store.schema_
        try:
            with connect_store(self._config.store_dsn, schema, "cdcbridge alerts", {"lock_timeout": "1s"}) as store:
                judged = schema_version(store) == 0 or self._judge_with(store)
        except psycopg.errors.LockNotAvailable:
            return False  # another bridge evaluates
        except Exception as error:  # noqa: BLE001 - otherwise nobody would be told that alerts have ended
            self._failed(" ".join(str(error).split()))
            return True
        self._succeeded()
        return judged

    def _judge_with(self, store: Connection) -> bool:
        leader = look.leader(store)
        if self._ended and leader is not None and leader.holder == self._here:
            if time.monotonic() < self._own_until:
                return False  # the server has not noticed yet that this bridge's own session has ended
            leader = None
        led = leader is not None
        if led and (self._ended or self._health.state not in _LEADS):
            self._metrics.not_judged()  # another bridge leads, and evaluates
            return True
        lag = look.measured_now(self._config) if self._ended else look.usable_lag(self._config, self._measured)
        users = look.users(store, lag)
        why, stalled = look.why_not(self._health), look.stalled(self._health)
        with store.transaction():
            turn = queue.take_turn(store, led=led)
            facts = Facts(lag, led, turn.leaderless, why, stalled, self._ended, users)
            judgement = judge(facts, self._alerts.rules, self._limits)
            result = step(turn.before, judgement, turn.silences, turn.now, self._apart)
            queue.write(store, result.open, write(result.notices, self._alerts.to, self._source, turn.now))
        reach("alert queued")
        self._silences = turn.silences
        self._report(store, result)
        return True

    def _report(self, store: Connection, result: Step) -> None:
        """Log the changes, give up old notifications, and wake the threads that have something to deliver."""
        for one in result.began:
            log.warning("alert.began", rule=one.key.rule, subject=one.key.subject, severity=one.severity, text=one.text)
        for one in result.ended:
            log.info("alert.ended", rule=one.key.rule, subject=one.key.subject)
        for destination, title, error in queue.give_up(store):
            log.error("alert.gave_up", destination=destination, title=title, error=error)
        waiting = queue.waiting_destinations(store)
        self._metrics.judged(result.open, waiting)
        for courier in self._couriers:
            if courier.destination in waiting:
                courier.wake()

    # the store is away

    def _failed(self, error: str) -> None:
        """Note that nothing could be evaluated, and tell people if that lasts.

        The store cannot keep that notification.
        """
        log.warning("alert.judging_failed", error=error)
        self._metrics.not_judged()
        self._failures += 1
        now = dt.datetime.now(dt.UTC)
        if self._ended:
            no_leader = self._alerts.rules.no_leader
            if isinstance(no_leader, NoLeader) and not self._is_silent("no_leader", now):
                text = f"The bridge {self._here} has ended: {self._ended} The store does not answer: {error}."
                self._tell("begins", Open(Key("no_leader", "bridge"), no_leader.severity, text, now))
            return
        rule = self._alerts.rules.store_away
        if not isinstance(rule, StoreAway) or self._is_silent("store_away", now):
            return
        text = (
            f"The bridge {self._here} cannot evaluate the rules of the alerts: {error}. Until it can, it tells of"
            " nothing else. `cdcbridge status` says more."
        )
        if self._away is None:
            self._away = Open(Key("store_away", "store"), rule.severity, text, now)
        lasted = (now - self._away.since).total_seconds()
        if self._away.notified_at is None and self._failures > 1 and lasted > rule.above:
            begins = replace(self._away, text=text)
            self._away = replace(begins, notified_at=now, told=rule.severity)
            log.warning("alert.began", rule="store_away", subject="store", severity=rule.severity, text=text)
            self._tell("begins", begins)

    def _is_silent(self, rule: str, now: dt.datetime) -> bool:
        return self._silences.get(rule, now) > now

    def _succeeded(self) -> None:
        away, self._away, self._failures = self._away, None, 0
        if away is not None and away.notified_at is not None:
            log.info("alert.ended", rule="store_away", subject="store")
            self._tell("ends", away)

    def _tell(self, kind: Kind, condition: Open) -> None:
        """Hand a notification to the couriers directly."""
        for notice in write({kind: [condition]}, self._alerts.to, self._source, dt.datetime.now(dt.UTC)):
            for courier in self._couriers:
                if courier.destination == notice.destination:
                    courier.tell(notice)
