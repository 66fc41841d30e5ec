"""The metrics of the alerts. docs/METRICS.md explains them.

This module never queries a database.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from cdcbridge.alerts.tracking import Open


class AlertMetrics:
    """The counters and gauges, which any thread may change.

    Args:
        registry: The registry in which they are shown.
        destinations: The names of the destinations. Their counters begin with 0.
    """

    def __init__(self, registry: CollectorRegistry, destinations: Iterable[str]) -> None:
        self._open = Gauge(
            "cdcbridge_alerts_open", "Conditions that have begun and are not over", ["rule", "severity"],
            registry=registry,
        )  # fmt: skip
        self._waiting = Gauge(
            "cdcbridge_alert_notifications_waiting", "Notifications that are not delivered yet", ["destination"],
            registry=registry,
        )  # fmt: skip
        self._sent = Counter(
            "cdcbridge_alert_notifications_sent", "Notifications that a URL has accepted", ["destination"],
            registry=registry,
        )  # fmt: skip
        self._failed = Counter(
            "cdcbridge_alert_attempts_failed", "Failed attempts at a notification", ["destination"], registry=registry
        )
        self._destinations = tuple(destinations)
        for name in self._destinations:
            self._sent.labels(name)
            self._failed.labels(name)

    def sent(self, destination: str) -> None:
        self._sent.labels(destination).inc()

    def failed(self, destination: str) -> None:
        self._failed.labels(destination).inc()

    def judged(self, conditions: Iterable[Open], waiting: Mapping[str, int]) -> None:
        """Show the result of an evaluation by this bridge."""
        counts = Counts((one.key.rule, one.severity) for one in conditions if one.began_at is not None)
        self._open.clear()
        for labels, number in counts.items():
            self._open.labels(*labels).set(number)
        for name in self._destinations:
            self._waiting.labels(name).set(waiting.get(name, 0))

    def not_judged(self) -> None:
        """Show nothing: another bridge evaluates, or nothing is known. Old values would look like new ones."""
        self._open.clear()
        self._waiting.clear()
