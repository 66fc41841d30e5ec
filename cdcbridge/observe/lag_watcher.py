"""Measure slot and consumers periodically, for the metrics, for alarms in the log, and for the dashboard.

The thread runs as long as the program does, whether or not this bridge leads. It opens database sessions of its own for
each look, and writes nothing but the measurement. A failure is logged, and the next look follows after the usual time.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

import structlog

from cdcbridge.background import Background
from cdcbridge.config import Config
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.errors import CdcbridgeError, SourceUnavailable
from cdcbridge.observe.lag import LOOKS, Lag, measure
from cdcbridge.observe.metrics import Metrics
from cdcbridge.problem import Alarm
from cdcbridge.store.measurements import note_measurement
from cdcbridge.store.migrate import schema_version

_LONGEST_INTERVAL: Final = 10.0
_REPEAT: Final = 30  # looks after which an alarm that lasts is logged again
log = structlog.get_logger()


class Watcher(Background):
    """The thread, which works from entry to exit of its `with` block.

    Attributes:
        interval: Seconds between two measurements.
        latest: The last measurement, or None if it failed. Only the thread writes it.
        failure: The error of the last measurement, or None if it succeeded. Only the thread writes it.
        looked: An event that is set after the first measurement.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        super().__init__("watcher")
        self._config = config
        self._metrics = metrics
        self.interval = min(_LONGEST_INTERVAL, max(0.5, config.source.heartbeat_interval))
        self._looks: deque[Lag] = deque(maxlen=LOOKS - 1)
        self._said: dict[tuple[str, str, str | None], int] = {}
        self.latest: Lag | None = None
        self.failure: Exception | None = None
        self.looked = threading.Event()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                found = measure(self._config, list(self._looks))
            except Exception as error:  # noqa: BLE001 - otherwise the metrics would keep their last values
                self._looks.clear()
                self.latest, self.failure = None, error
                self._metrics.measurements.not_measured(source=False)
                if not isinstance(error, SourceUnavailable):  # the bridge logs that itself
                    log.warning("watch.failed", error=" ".join(str(error).split()))
            else:
                self._looks.append(found)
                self.latest, self.failure = found, None
                self._metrics.measurements.measured(found)
                self._alarm(found)
                self._keep(found)
            self.looked.set()
            self._stop.wait(self.interval)

    def _keep(self, found: Lag) -> None:
        """Keep the measurement for the dashboard. Before the store's first migration there is no place for it."""
        if found.store_error is not None or found.guest is not None:
            return
        try:
            with connect_for_calls(self._config.store_dsn, self._config.store.schema_, "cdcbridge lag") as store:
                if schema_version(store):
                    note_measurement(store, found.as_json())
        except CdcbridgeError as error:
            log.warning("watch.failed", error=" ".join(str(error).split()))

    def _alarm(self, found: Lag) -> None:
        """Log each alarm when it begins, from time to time while it lasts, and when it is over."""
        found_by_key = {_key(alarm): alarm for alarm in found.alarms}
        said = {key: self._said.get(key, 0) + 1 for key in found_by_key}
        for key, alarm in found_by_key.items():
            if said[key] % _REPEAT == 1:
                about = {"consumer": alarm.consumer} if alarm.consumer else {"slot": alarm.slot}
                event = "slot.alarm" if alarm.consumer is None else "consumer.alarm"
                log.warning(event, code=alarm.code, message=alarm.message, **about)
        for key in self._said.keys() - said.keys():
            log.info("slot.alarm_over" if key[2] is None else "consumer.alarm_over", code=key[0])
        self._said = said


def _key(alarm: Alarm) -> tuple[str, str, str | None]:
    return alarm.code, alarm.slot, alarm.consumer
