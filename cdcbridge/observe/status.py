"""Judge whether everything is well, and collect the reasons if it is not, for `cdcbridge status`.

The judgement depends on the answers of both servers, so it works on any machine and with the bridge stopped. This
module only reads, and never needs a bridge.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from cdcbridge.config import Config
from cdcbridge.database import Connection, store_errors
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.database.rights import Guest, guest
from cdcbridge.errors import CdcbridgeError, SourceUnavailable, UsageError
from cdcbridge.observe.lag import Lag, measure, measure_store
from cdcbridge.observe.recent_gaps import recent_gaps
from cdcbridge.store.feed_watch import PATIENCE
from cdcbridge.store.feeds import feed_of
from cdcbridge.store.migrate import schema_version
from cdcbridge.store.presence import Process, running
from cdcbridge.units import human_duration

RETRYING: Final = 30.0  # seconds; a bridge that cannot work tries again at least every 10 s, and stores its error
OLD: Final = 300.0  # seconds that the oldest message of a consumer may wait before it deserves a note


@dataclass(slots=True, frozen=True)
class LastError:
    """The last error of a bridge.

    Attributes:
        seconds: Its age.
        mended: When the bridge that streams now took the lead, if that was after the error. None while the error may
            last.
    """

    message: str
    hint: str | None
    holder: str
    at: str
    seconds: float
    mended: str | None = None


@dataclass(slots=True)
class Status:
    """The state of bridges, slot and consumers, and the judgement.

    Attributes:
        version: The version of the store's schema: 0 if there is no schema yet, None if unknown.
        unknown: Why nothing is known of the store and its bridges, or ''.
        guest: A consumer's role, which sees only the bridges and its own consumers.
        reasons: Why the state is not healthy.
        notes: Observations that deserve a look, although the bridge does its work.
    """

    lag: Lag | None = None
    bridges: list[Process] = field(default_factory=list)
    version: int | None = None
    unknown: str = ""
    guest: Guest | None = None
    last_error: LastError | None = None
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not self.reasons

    @property
    def exit_code(self) -> int:
        """Return 0 if healthy, 1 if not, and 3 for a lost slot, which needs an operator."""
        return 3 if self.lag is not None and self.lag.lost else 0 if self.healthy else 1

    def as_json(self) -> dict[str, Any]:
        lag = {} if self.lag is None else self.lag.as_json()
        return {
            "healthy": self.healthy,
            "reasons": self.reasons,
            "notes": self.notes,
            "bridges": [asdict(bridge) for bridge in self.bridges],
            "store_version": self.version,
            "last_error": None if self.last_error is None else asdict(self.last_error),
            "slots": lag.get("slots", []),
            "consumers": [] if self.lag is None else _fed(self.lag),
            "alarms": lag.get("alarms", []),
        }


def _fed(lag: Lag) -> list[dict[str, Any]]:
    return [{**asdict(row), **feed_of(lag.feeds, row.name)} for row in lag.consumers]


def look(config: Config) -> Status:
    """Look at both sides once.

    A server that is out of reach is a reason in the result, not an error.
    """
    status = Status()
    try:
        with connect_for_calls(config.store_dsn, config.store.schema_, "cdcbridge status") as store:
            _store(store, status)
    except UsageError:
        raise
    except CdcbridgeError as error:
        status.unknown = str(error)
        status.reasons.append(str(error))
    away = ""
    try:
        status.lag = measure(config)
    except UsageError:
        raise
    except CdcbridgeError as error:
        away = str(error)
        if away not in status.reasons:
            status.reasons.insert(0, away)
        if isinstance(error, SourceUnavailable) and not status.unknown:
            with suppress(CdcbridgeError):  # the store may have become unreachable meanwhile
                status.lag = measure_store(config, error)
    if not status.unknown:
        status.reasons += _of_bridges(status, away)
    if status.lag is not None:
        status.reasons += () if away else _of_slot(config, status, status.lag)
        _judge_feeds(status, status.lag)
        status.notes += _of_consumers(status.lag)
        _judge_last_error(status, status.lag)
    return status


def _judge_feeds(status: Status, lag: Lag) -> None:
    """Add a reason for each consumer that the bridge does not feed.

    For a consumer that was applied just now there is only a note, because the bridge takes it up within seconds.
    """
    feeds, leader = lag.feeds, next((bridge for bridge in status.bridges if bridge.leads), None)
    if feeds is None or leader is None:
        return
    # `consumers apply` takes the lead for a moment, so the leader is no older than the newest change of consumers.
    fresh = leader.seconds is not None and leader.seconds < PATIENCE
    for row in lag.consumers:
        (line,) = feeds.warnings([row.name]) or [""]
        if line and fresh and feeds.of(row.name) is None:
            status.notes.append(line)
        elif line:
            status.reasons.append(line)


def _judge_last_error(status: Status, lag: Lag) -> None:
    """Mark the last error as mended if a bridge has streamed since.

    An error ends a bridge's streaming session, and the next one takes the lead again. Therefore a leader that is
    younger than the error and streams has recovered from it.
    """
    error, leader = status.last_error, next((bridge for bridge in status.bridges if bridge.leads), None)
    if error is None or leader is None or leader.seconds is None or not any(slot.active for slot in lag.slots):
        return
    if status.healthy and leader.seconds < error.seconds:
        status.last_error = replace(error, mended=leader.since)


def _store(store: Connection, status: Status) -> None:
    with store_errors():
        status.guest = guest(store)
    if status.guest is not None:
        status.bridges = running(store)
        return
    status.version = schema_version(store)
    if not status.version:
        return
    status.bridges = running(store)
    with store_errors():
        if store.execute("select to_regclass('last_error')").fetchone() != (None,):
            row = store.execute(
                "select message, hint, holder, to_char(at, 'YYYY-MM-DD HH24:MI:SS TZ'),"
                " extract(epoch from clock_timestamp() - at)::float8 from last_error"
            ).fetchone()
            status.last_error = LastError(*row) if row else None
    status.notes += recent_gaps(store)


def _of_bridges(status: Status, away: str) -> Iterator[str]:
    """Yield the reason why no bridge works.

    If the source cannot be reached, `away` is the reason, otherwise ''. A bridge that cannot reach the source has no
    session in the store while it waits for its next attempt.
    """
    error = status.last_error
    if error is not None and (error.seconds > RETRYING or _ended(error.holder)):
        error = None
    if status.version == 0:
        yield "the store does not exist yet: `cdcbridge run` creates it"
    elif not status.bridges and error is not None:
        ago = human_duration(max(0.0, error.seconds))
        yield (
            f"no bridge streams: {error.holder} had an error {ago} ago. It tries again by itself, unless its process"
            " has ended"
        )
    elif not status.bridges and away:
        yield "no bridge is connected to the store: none runs, or it cannot reach the source either"
    elif not status.bridges:
        yield "no bridge is running: `cdcbridge run` starts one"
    elif not any(bridge.leads for bridge in status.bridges):
        yield "no bridge leads, but a standby runs: it takes over within five seconds"


def _ended(holder: str) -> bool:
    """Return whether the process ran on this machine and has ended. An example of `holder` is `db1 pid 4181`."""
    host, _, pid = holder.rpartition(" pid ")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _of_slot(config: Config, status: Status, lag: Lag) -> Iterator[str]:
    name = config.source.slot
    for gone in lag.gone:
        yield f"the slot {gone} no longer exists: `cdcbridge slot recreate` continues after a gap message"
    for other in lag.other:
        yield f"the store belongs to the slot {other}, and source.slot is {name}"
    if not (lag.slots or lag.gone or lag.other):
        yield f"there is no slot {name} yet: `cdcbridge run` creates it"
    for alarm in lag.alarms:
        yield alarm.message
    leads = any(bridge.leads for bridge in status.bridges)
    for slot in lag.slots:
        if leads and not slot.active and slot.wal_status != "lost":
            yield f"the bridge that leads does not read the slot {slot.name}: it is starting, or has an error"
    for backfill in lag.backfills:
        if backfill.get("state") == "failed":
            yield f"the backfill of {backfill['table_name']} for {backfill['consumer']} failed: {backfill['note']}"
    if lag.store_error and not any(lag.store_error in reason for reason in status.reasons):
        yield lag.store_error


def _of_consumers(lag: Lag) -> Iterator[str]:
    for row in lag.consumers:
        if row.paused:
            yield f"consumer {row.name}: paused: `cdcbridge consumers resume {row.name}`"
        if row.dead:
            yield f"consumer {row.name}: {row.dead} dead: `cdcbridge dead list {row.name}`"
        if row.oldest_due_age_seconds is not None and row.oldest_due_age_seconds > OLD:
            yield f"consumer {row.name}: its oldest due message waits for {human_duration(row.oldest_due_age_seconds)}"
