"""Provide the metrics for Prometheus, with names and units as its conventions require.

There is one registry per program. This module knows prometheus-client and the measurements of `lag`, and never queries
a database. Every metric has the labels `source` and `slot`, so that one Prometheus can distinguish two pairs of
bridges. docs/METRICS.md explains each metric.

If a database cannot be reached, its gauges are removed. A gauge with its last value would look like a healthy one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from cdcbridge.observe.health import Health
from cdcbridge.observe.lag import Lag
from cdcbridge.routing.batch import AppendBatch

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SLOT_GAUGES: Final = {
    "slot_active": ("active", "1 while a session reads the slot"),
    "slot_retained_bytes": ("retained_bytes", "WAL that the slot retains on the server"),
    "slot_lag_bytes": ("lag_bytes", "WAL written after the confirmed LSN"),
    "slot_lag_seconds": ("lag_seconds", "Age of the oldest commit not yet confirmed; 0 when idle"),
    "slot_safe_wal_bytes": ("safe_wal_bytes", "WAL that may be written before max_slot_wal_keep_size is reached"),
    "slot_inactive_seconds": ("inactive_seconds", "Seconds since the slot was last read"),
    "slot_growth_bytes_per_second": ("growth_bytes_per_second", "Growth of the WAL that the slot retains"),
    "slot_limit_in_seconds": ("seconds_to_limit", "Time until max_slot_wal_keep_size is reached at this growth"),
}
_CONSUMER_GAUGES: Final = {
    "consumer_pending_messages": (
        "pending",
        "Messages waiting, delayed ones included. In a stream: messages not read yet",
    ),
    "consumer_in_flight_messages": ("in_flight", "Messages received, and neither acked nor nacked yet"),
    "consumer_dead_messages": ("dead", "Dead letters"),
    "consumer_oldest_message_age_seconds": ("oldest_age_seconds", "Age of the oldest unfinished message"),
    "consumer_delayed_messages": ("delayed", "Waiting messages that are delayed"),
    "consumer_oldest_due_message_age_seconds": (
        "oldest_due_age_seconds",
        "Age of the oldest message that may be delivered now or is in flight",
    ),
    "consumer_held_messages": ("held", "Waiting messages that open transactions of receivers hold"),
    "consumer_paused": ("paused", "1 while the consumer is paused"),
}
_SINK_COUNTERS: Final = {
    "sink_delivered_messages": ("delivered", "Messages that the sink has acknowledged"),
    "sink_failed_messages": ("failed", "Messages of the sink that became dead letters"),
    "sink_retried_messages": ("retried", "Failed attempts at a message that was tried again"),
    "sink_batches": ("batches", "Batches that the sink has acknowledged"),
    "sink_batch_seconds": ("seconds", "Time that these batches took"),
}
_SINK_GAUGES: Final = {
    "sink_behind_messages": ("behind", "Messages that the sink has not acknowledged yet"),
    "sink_behind_seconds": ("oldest_seconds", "How long the oldest of these has waited"),
    "sink_processes": ("processes", "Processes that deliver for the sink"),
}
_MIRROR_COUNTERS: Final = {
    "mirror_transactions": ("transactions", "Transactions of the target that applied changes"),
    "mirror_changes": ("changes", "Changes that the mirror has applied"),
    "mirror_conflicts": ("conflicts", "Conflicts that the mirror has found"),
}
_MIRROR_GAUGES: Final = {
    "mirror_behind_messages": ("behind", "Messages that the mirror has not applied yet"),
    "mirror_behind_seconds": ("lag_seconds", "Age of the oldest of these"),
    "mirror_held_conflicts": ("held", "Conflicts that wait for a decision, at most 1000"),
}
_WAL_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")


class Metrics:
    """The registry, and the methods that write into it.

    Args:
        health: The state of the bridge.
        version: The version of the program.
        source: The name of the source, for example `shop`.
        slot: Its replication slot. Source and slot are labels of every metric.

    Attributes:
        registry: The registry that is shown.
        unlabelled: The registry for further metrics, to which `registry` adds the labels.
    """

    def __init__(self, health: Health, version: str, source: str, slot: str) -> None:
        unlabelled = CollectorRegistry()
        self._messages = Counter("cdcbridge_messages", "Messages appended to the log", registry=unlabelled)
        self._bytes = Counter("cdcbridge_appended_bytes", "Size of the appended batches in memory", registry=unlabelled)
        self._dead = Counter(
            "cdcbridge_dead_letters_appended",
            "Dead letters created while appending: oversized, undecodable, failing in a filter",
            registry=unlabelled,
        )
        self._refused = Counter(
            "cdcbridge_wal_messages_not_delivered",
            "Messages that applications wrote into the WAL: malformed, without a consumer, or not transactional",
            ["kind"],
            registry=unlabelled,
        )
        self._seconds = Histogram(
            "cdcbridge_append_seconds", "Duration of an append", registry=unlabelled, buckets=_SECONDS
        )
        self._state = _BridgeState(health)
        self.measurements = Measurements(version)
        unlabelled.register(self._state)
        unlabelled.register(self.measurements)
        self.unlabelled = unlabelled
        self.registry = labelled(unlabelled, source, slot)
        health.on_append = self._appended

    def _appended(self, batch: AppendBatch, seconds: float) -> None:
        self._messages.inc(len(batch.rows))
        self._bytes.inc(batch.size)
        self._dead.inc(len(batch.dead))
        for (event, _topic, _reason), number in batch.refused.items():
            self._refused.labels(event.removeprefix("published.")).inc(number)
        self._seconds.observe(seconds)
        self._state.last_append = time.time()


def labelled(registry: CollectorRegistry, source: str, slot: str) -> CollectorRegistry:
    """Return a registry with the same metrics, each with the labels `source` and `slot`."""
    made = CollectorRegistry()
    made.register(_Labelled(registry, {"source": source, "slot": slot}))
    return made


class _Labelled(Collector):
    """All metrics of a registry, with additional labels that they share."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry = registry
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [s._replace(labels={**self._labels, **s.labels}) for s in family.samples]
            yield family


class _BridgeState(Collector):
    """The state of the bridge, which is read when Prometheus asks."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self.last_append: float | None = None  # Unix time

    def collect(self) -> Iterator[Metric]:
        health = self._health
        streaming = health.state == "streaming"
        yield GaugeMetricFamily("cdcbridge_leader", "1 while this bridge leads and streams", float(streaming))
        yield GaugeMetricFamily("cdcbridge_alive", "1 if /live answers 200", float(health.alive()[0]))
        yield GaugeMetricFamily("cdcbridge_ready", "1 if /ready answers 200", float(health.ready()[0]))
        yield GaugeMetricFamily("cdcbridge_epoch", "The last epoch in which this bridge led", float(health.epoch))
        yield GaugeMetricFamily(
            "cdcbridge_buffered_rows", "Rows read and not appended yet, with a limit", float(health.rows_waiting)
        )
        yield GaugeMetricFamily(
            "cdcbridge_buffered_bytes",
            "Size of the rows read and not appended yet, with a limit",
            float(health.bytes_waiting),
        )
        yield CounterMetricFamily(
            "cdcbridge_session_failures",
            "Sessions that ended with an error, after which the bridge tried again",
            health.retried,
        )

        if self.last_append is not None:
            yield GaugeMetricFamily(
                "cdcbridge_last_append_timestamp_seconds", "Time of the last append", self.last_append
            )


class Measurements(Collector):
    """The last measurements of slot and consumers.

    Args:
        version: The version of the program.
    """

    def __init__(self, version: str) -> None:
        self._version = version
        self._lag: Lag | None = None
        self._up: dict[str, bool] = {}  # for each database of which it is known, whether it answered

    def measured(self, lag: Lag) -> None:
        """Take over the measurements. Each database answered, unless `lag` has its error."""
        self._lag = lag
        self._up = {"source": not lag.source_error, "store": not lag.store_error}

    def not_measured(self, **up: bool) -> None:
        """Note that there are no measurements.

        Args:
            up: For each database of which it is known, whether it answered. The source is asked first, so if it does
                not answer, the state of the store may be unknown.
        """
        self._lag, self._up = None, up

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("cdcbridge_build", "The program's version", {"version": self._version})
        if self._up:
            family = GaugeMetricFamily("cdcbridge_up", "1 if the database answered the last query", labels=["database"])
            for side, answered in self._up.items():
                family.add_metric([side], float(answered))
            yield family
        lag = self._lag
        if lag is not None:
            yield from self._slots(lag)
            yield from self._consumers(lag)
            yield from self._feeds(lag)
            yield from self._sinks(lag)
            yield from self._mirrors(lag)

    def _slots(self, lag: Lag) -> Iterator[Metric]:
        for name, (field, text) in _SLOT_GAUGES.items():
            family = GaugeMetricFamily(f"cdcbridge_{name}", text, labels=["slot"])
            for slot in lag.slots:
                value = getattr(slot, field)
                if value is not None:
                    family.add_metric([slot.name], float(value))
            yield family
        status = GaugeMetricFamily(
            "cdcbridge_slot_wal_status", "1 for the wal_status in pg_replication_slots", labels=["slot", "status"]
        )
        for slot in lag.slots:
            for one in _WAL_STATUSES:
                status.add_metric([slot.name, one], float(slot.wal_status == one))
        for gone in lag.gone:
            status.add_metric([gone, "lost"], 1.0)
        yield status

    def _consumers(self, lag: Lag) -> Iterator[Metric]:
        for name, (field, text) in _CONSUMER_GAUGES.items():
            family = GaugeMetricFamily(f"cdcbridge_{name}", text, labels=["consumer", "mode"])
            for consumer in lag.consumers:
                value = getattr(consumer, field)
                if value is not None:
                    family.add_metric([consumer.name, consumer.mode], float(value))
            yield family
        # consumer_held_messages counts the messages that receivers hold. Group members hold partitions, and publishers
        # hold seqs.
        held = GaugeMetricFamily(
            "cdcbridge_consumer_holder_seconds",
            "Age of the oldest open transaction that keeps messages from the consumer",
            labels=["consumer", "mode"],
        )
        oldest: dict[tuple[str, str], float] = {}
        for holder in lag.consumer_holders:
            key = (holder.consumer, holder.mode)
            oldest[key] = max(oldest.get(key, 0.0), holder.age_seconds or 0.0)
        for labels, seconds in oldest.items():
            held.add_metric(labels, seconds)
        yield held
        if lag.room.free_bytes is not None:
            yield GaugeMetricFamily("cdcbridge_disk_free_bytes", "Free space for the source's WAL", lag.room.free_bytes)
        others = GaugeMetricFamily(
            "cdcbridge_other_slot_retained_bytes",
            "WAL that another slot retains",
            labels=["other_slot"],
        )
        for slot in lag.room.others:
            if slot.retained_bytes is not None:
                others.add_metric([slot.name], float(slot.retained_bytes))
        yield others

    def _sinks(self, lag: Lag) -> Iterator[Metric]:
        labels = ["consumer", "type"]
        for field, family in _families(_SINK_COUNTERS, _SINK_GAUGES, labels):
            for sink in lag.sinks:
                if (value := getattr(sink, field)) is not None:
                    family.add_metric([sink.name, sink.type], float(value))
            yield family
        failing = GaugeMetricFamily(
            "cdcbridge_sink_failing", "1 if the sink has an error, or a message that it refuses", labels=labels
        )
        for sink in lag.sinks:
            failing.add_metric([sink.name, sink.type], float(sink.state in ("failing", "blocked")))
        yield failing

    def _mirrors(self, lag: Lag) -> Iterator[Metric]:
        for field, family in _families(_MIRROR_COUNTERS, _MIRROR_GAUGES, ["mirror"]):
            for mirror in lag.mirrors:
                if (value := getattr(mirror, field)) is not None:
                    family.add_metric([mirror.name], float(value))
            yield family
        running = GaugeMetricFamily(
            "cdcbridge_mirror_running", "1 while a process applies the mirror", labels=["mirror"]
        )
        stopped = GaugeMetricFamily(
            "cdcbridge_mirror_stopped", "1 if the mirror has stopped until `mirror resume`", labels=["mirror"]
        )
        for mirror in lag.mirrors:
            running.add_metric([mirror.name], float(mirror.state in ("running", "copying")))
            stopped.add_metric([mirror.name], float(mirror.state == "stopped"))
        yield running
        yield stopped

    def _feeds(self, lag: Lag) -> Iterator[Metric]:
        fed = GaugeMetricFamily(
            "cdcbridge_consumer_fed", "1 while the leading bridge feeds the consumer", labels=["consumer"]
        )
        faulty = GaugeMetricFamily(
            "cdcbridge_consumer_faulty",
            "1 while the consumer cannot work with the settings in the leader's file",
            labels=["consumer"],
        )
        if lag.feeds is not None:
            stored = [consumer.name for consumer in lag.consumers]
            for name in dict.fromkeys([*stored, *lag.feeds.consumers]):
                fed.add_metric([name], float(not lag.feeds.silence(name)))
                faulty.add_metric([name], float(bool(lag.feeds.faulty(name))))
        yield fed
        yield faulty


def _families(
    counters: Mapping[str, tuple[str, str]], gauges: Mapping[str, tuple[str, str]], labels: list[str]
) -> list[tuple[str, CounterMetricFamily | GaugeMetricFamily]]:
    """Return an empty family for each metric, with the name of the field that has its values."""
    return [
        *((f, CounterMetricFamily(f"cdcbridge_{name}", text, labels=labels)) for name, (f, text) in counters.items()),
        *((f, GaugeMetricFamily(f"cdcbridge_{name}", text, labels=labels)) for name, (f, text) in gauges.items()),
    ]
