"""Run the threads of the alerts beside a bridge: one that evaluates the rules, and one for each URL that delivers.

Never keeps the bridge waiting, except for a few seconds when the bridge has ended with an error.
"""

from __future__ import annotations

import time
from typing import Final, Self

from cdcbridge.alerts.courier import Courier
from cdcbridge.alerts.delivery import urls
from cdcbridge.alerts.facts import Measured
from cdcbridge.alerts.judging import Judge
from cdcbridge.alerts.metrics import AlertMetrics
from cdcbridge.config import Config
from cdcbridge.config.alerts import Alerts
from cdcbridge.errors import CdcbridgeError
from cdcbridge.observe.health import Health
from cdcbridge.observe.metrics import Metrics

_LAST: Final = 10.0  # seconds to evaluate and deliver once more when the bridge has ended with an error
_PATIENCE: Final = 5.0  # seconds for the end of all threads


class Alerting:
    """The threads, which work from entry to exit of its `with` block.

    Args:
        config: The configuration.
        alerts: Its section `alerts`.
        source: The name of the source, for the titles.
        measured: The thread that measures for the metrics.
        health: The state of the bridge.
        metrics: The metrics of the bridge.

    Raises:
        UsageError: Apprise does not accept a URL.
    """

    def __init__(
        self, config: Config, alerts: Alerts, source: str, measured: Measured, health: Health, metrics: Metrics
    ) -> None:
        counted = AlertMetrics(metrics.unlabelled, (one.name for one in alerts.to))
        found = urls(alerts)
        ids = {one.name: [url.id for url in found if url.destination == one.name] for one in alerts.to}
        self._couriers = [Courier(config, url, ids[url.destination], counted) for url in found]
        self._patience = _PATIENCE
        self._judge = Judge(config, alerts, source, measured, health, self._couriers, counted)

    def __enter__(self) -> Self:
        for thread in (*self._couriers, self._judge):
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        threads = (self._judge, *self._couriers)
        for thread in threads:
            thread.stop()
        deadline = time.monotonic() + self._patience
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def bridge_ended(self, error: Exception) -> None:
        """Evaluate and deliver once more, for a few seconds at most, because the bridge has ended with an error.

        Notifications that are not delivered by then stay in the store, and the next bridge delivers them.
        """
        hint = f" {error.hint}" if isinstance(error, CdcbridgeError) and error.hint else ""
        deadline = time.monotonic() + _LAST
        self._judge.finish(f"{' '.join(str(error).split())}{hint}")
        for thread in (self._judge, *self._couriers):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._patience = 0.0
