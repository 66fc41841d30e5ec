"""Collect the facts of the rules: the lag, the bridges, and the state of this bridge.

This module only reads.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Final, Protocol

from cdcbridge.config import Config
from cdcbridge.database import Connection
from cdcbridge.errors import CdcbridgeError, SourceUnavailable
from cdcbridge.observe.health import Health
from cdcbridge.observe.lag import Lag, measure, measure_store
from cdcbridge.store.presence import Process, running

OLD: Final = 60.0  # seconds after which a measurement no longer counts
_USERS: Final = "select pid, usename::text from pg_stat_activity where pid = any (%s) and usename is not null"


@dataclass(slots=True, frozen=True)
class Facts:
    """What is known at one moment. None means unknown, so that conditions neither begin nor end.

    Attributes:
        lag: The measurement of the source and the store. Its `source_error` says that the source is unknown.
        led: Whether a bridge leads.
        leaderless: Seconds since a bridge led last.
        why: Why this bridge does not lead, or ''.
        stalled: Why the leading bridge does not do its work, or ''.
        ended: The error with which this bridge has ended for good, or ''.
        users: The users of sessions on the store, by process id.
    """

    lag: Lag | None = None
    led: bool = True
    leaderless: float = 0.0
    why: str = ""
    stalled: str = ""
    ended: str = ""
    users: dict[int, str] = field(default_factory=dict)


class Measured(Protocol):
    """The source of the latest measurement: the thread that measures for the metrics anyway."""

    interval: float
    latest: Lag | None
    failure: Exception | None
    looked: threading.Event


def leader(store: Connection) -> Process | None:
    """Return the bridge that leads."""
    return next((process for process in running(store) if process.leads), None)


def usable_lag(config: Config, measured: Measured) -> Lag | None:
    """Return the latest measurement of another thread, or None before the first one.

    If the source is away, the store is measured here. Then the conditions of consumers are known nevertheless.

    Raises:
        CdcbridgeError: The measurement fails or hangs. Without this error, nobody would know that alerts are blind.
    """
    failure, lag = measured.failure, measured.latest
    if isinstance(failure, SourceUnavailable):
        return measure_store(config, failure)
    if failure is not None:
        raise CdcbridgeError(f"the lag cannot be measured: {failure}") from failure
    if lag is not None and time.monotonic() - lag.measured_at > OLD:
        raise CdcbridgeError(f"the lag has not been measured for {time.monotonic() - lag.measured_at:.0f} s")
    return lag


def measured_now(config: Config) -> Lag | None:
    """Measure both sides now. If the source is away, measure the store alone."""
    try:
        return measure(config)
    except SourceUnavailable as error:
        return measure_store(config, error)
    except CdcbridgeError:
        return None


def why_not(health: Health) -> str:
    """Return the error for which a bridge does not lead, or ''."""
    return health.reason if health.state == "retrying" else ""


def stalled(health: Health) -> str:
    """Return why a bridge that streams does not do its work, or ''."""
    if health.state != "streaming":
        return ""
    ready, what = health.ready()
    return "" if ready else what


def users(store: Connection, lag: Lag | None) -> dict[int, str]:
    """Return the users of the sessions on the store that hold something."""
    if lag is None:
        return {}
    pids = [*(one.pid for one in lag.holders), *(one.pid for one in lag.consumer_holders)]
    wanted = [pid for pid in pids if pid is not None]
    return dict(store.execute(_USERS, (wanted,)).fetchall()) if wanted else {}
