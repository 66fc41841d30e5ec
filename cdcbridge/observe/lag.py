"""Measure the lag of the slot on the source and of the consumers in the store.

This module only reads both databases, and never needs a running bridge.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, source_errors, store_errors
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.database.rights import Guest
from cdcbridge.errors import SourceUnavailable, StoreUnavailable
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.observe.alarms import (
    Growth,
    SlotState,
    alarms,
    average_growth,
    growth_now,
    latest_growth,
    observed_growth,
    seconds_to,
    wants_second_look,
)
from cdcbridge.observe.consumer_lag import ConsumerLag
from cdcbridge.observe.lag_store import OpenPublisher, StoreSide, store_side
from cdcbridge.observe.mirrors import MirrorLag, mirror_alarms
from cdcbridge.observe.sinks import SinkState, sink_alarms
from cdcbridge.observe.wal_growth import look_again
from cdcbridge.observe.xmin_holders import HorizonHolder, horizon_holders
from cdcbridge.problem import Alarm
from cdcbridge.source.facts import look_at_source
from cdcbridge.source.slots import Slot, current_lsn
from cdcbridge.source.wal_room import WalRoom, other_alarms, wal_room
from cdcbridge.store.feeds import Feeds, feed_of
from cdcbridge.store.holders import ConsumerHolder, held_alarms
from cdcbridge.store.migrate import schema_version
from cdcbridge.units import human_duration


@dataclass(slots=True, frozen=True)
class SlotLag:
    """The measurements of one slot, with sizes in bytes and times in seconds.

    Attributes:
        lag_seconds: Age of the oldest commit that is not yet confirmed. None if unknown.
        growth_bytes_per_second: Growth of the retained WAL.
        seconds_to_limit: Time until max_slot_wal_keep_size is reached at that rate. None without a limit, without
            growth, and for a slot that moves.
        failover: Whether standbys keep the slot. None before PostgreSQL 17.
        moves: Whether the slot's positions advanced between the looks, so that the WAL that it retains will be
            released.
        growth_basis: The period in which the growth was measured.
        quiet: A sentence about a slot that waits while nothing is written, otherwise ''.
    """

    name: str
    plugin: str
    active: bool
    wal_status: str
    restart_lsn: str | None
    confirmed_flush_lsn: str | None
    current_lsn: str
    retained_bytes: int | None
    lag_bytes: int | None
    lag_seconds: float | None
    safe_wal_bytes: int | None
    invalidation_reason: str | None
    inactive_seconds: float | None
    growth_bytes_per_second: float | None
    seconds_to_limit: float | None
    failover: bool | None
    moves: bool = False
    growth_basis: str = ""
    quiet: str = ""


@dataclass(slots=True, frozen=True)
class Lag:
    """The measurements that `cdcbridge lag` shows.

    Attributes:
        holders: Open transactions that have published, the oldest first, without those of the last second.
    """

    slots: list[SlotLag]
    consumers: list[ConsumerLag]
    holders: tuple[OpenPublisher, ...] = ()
    backfills: tuple[dict[str, Any], ...] = ()  # unfinished ones, as backfill_status() returns them
    gone: tuple[str, ...] = ()  # slots that the store depends on, and that the source does not have
    other: tuple[str, ...] = ()  # slots that the store depends on, and that are not configured
    horizon: tuple[HorizonHolder, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    measured_at: float = 0.0  # time.monotonic()
    store_error: str | None = None  # why the store could not be measured
    consumer_holders: tuple[ConsumerHolder, ...] = ()
    room: WalRoom = field(default_factory=WalRoom)
    guest: Guest | None = None  # a consumer's role, which sees only its own consumers in the store
    feeds: Feeds | None = None  # which consumers the bridge feeds; None before the first streaming session
    source_error: str | None = None  # why the source could not be measured
    sinks: tuple[SinkState, ...] = ()
    mirrors: tuple[MirrorLag, ...] = ()

    @property
    def lost(self) -> list[str]:
        return [*self.gone, *(slot.name for slot in self.slots if slot.wal_status == "lost")]

    def as_json(self) -> dict[str, Any]:
        return {
            "slots": [{field: value for field, value in asdict(s).items() if field not in _HEALTH} for s in self.slots],
            "slot_health": [{"name": s.name, **{field: getattr(s, field) for field in _HEALTH}} for s in self.slots],
            "consumers": [
                {field: value for field, value in asdict(c).items() if field not in _CONSUMER_HEALTH}
                for c in self.consumers
            ],
            "consumer_health": [
                {"name": c.name, **{field: getattr(c, field) for field in _CONSUMER_HEALTH}} for c in self.consumers
            ],
            "consumer_holders": [h.as_json() for h in self.consumer_holders],
            "wal_limit_bytes": self.room.limit_bytes,
            "disk_free_bytes": self.room.free_bytes,
            "other_slots": [asdict(s) for s in self.room.others],
            "consumer_feeds": [{"name": c.name, **feed_of(self.feeds, c.name)} for c in self.consumers],
            "sinks": [one.as_json() for one in self.sinks],
            "mirrors": [one.as_json() for one in self.mirrors],
            "holders": [asdict(h) for h in self.holders],
            "backfills": list(self.backfills),
            "xmin_holders": [asdict(h) for h in self.horizon],
            "alarms": [asdict(a) for a in self.alarms],
            "store_error": self.store_error,
            "source_error": self.source_error,
        }


# Fields with lists of their own in the JSON, so that `consumers` and `slots` keep the fields that they began with.
_CONSUMER_HEALTH: Final = ("delayed", "oldest_due_age_seconds", "paused", "held")
_HEALTH: Final = (
    "safe_wal_bytes",
    "invalidation_reason",
    "inactive_seconds",
    "growth_bytes_per_second",
    "seconds_to_limit",
    "failover",
    "moves",
    "growth_basis",
    "quiet",
)
LOOKS: Final = 6  # looks that are needed to observe the growth of a slot with a reader
_LONG: Final = 60.0  # seconds after which a slot that moves, or a transaction that holds it, can be judged
_STREAM: Final = """
    select r.sent_lsn::text, r.write_lsn::text,
           (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_flush_lsn() end)::text
    from pg_stat_replication r where r.pid = %s
"""


def measure(config: Config, before: Sequence[Lag] | None = None) -> Lag:
    """Look at both sides once. If the store is out of reach, look at the source alone.

    The growth is derived from the earlier looks in `before`. If that is None, the growth is the average since the
    oldest unconfirmed commit, or since the beginning of the transaction that holds the slot. Raises SourceUnavailable.
    """
    with connect_source(config.source_dsn, "cdcbridge lag") as connection:
        facts = look_at_source(connection, config.source.slot)
        found = [] if facts.slot is None else [facts.slot]
        current = current_lsn(connection)
        idle = {slot.name: _caught_up(connection, slot, current) for slot in found}
        measured_at = time.monotonic()
        with source_errors():
            horizon = horizon_holders(connection, "source")
        room = wal_room(connection, config.source.slot)
    try:
        side = store_side(config)
    except StoreUnavailable as error:
        side = StoreSide(error=str(error))
    server = facts.identity.system_identifier
    if side.server == server:
        horizon = [replace(holder, server="both") for holder in horizon]
    behind, silent = side.behind, side.silent
    made: list[SlotLag] = []
    for slot in found:
        lag = _slot(slot, current, 0.0 if idle[slot.name] else behind)
        if lag.inactive_seconds is None and not lag.active:
            lag = replace(lag, inactive_seconds=silent)  # unknown before PostgreSQL 17, but no longer than that
        growth = _growth(config, lag, horizon, before, measured_at)
        free = room.free_bytes if lag.safe_wal_bytes is None else lag.safe_wal_bytes
        moves = _moves(lag, free, before or (), horizon, measured_at)
        left = None if moves else seconds_to(lag.safe_wal_bytes, growth.rate)
        lag = replace(lag, growth_bytes_per_second=growth.rate, growth_basis=growth.basis, quiet=growth.quiet)
        made.append(replace(lag, seconds_to_limit=left, moves=moves))
    retained, inactive = config.source.max_retained_wal, config.source.max_slot_inactive
    return Lag(
        made,
        side.consumers,
        side.holders,
        side.backfills,
        tuple(name for name in side.slots if not found and name == config.source.slot),
        tuple(name for name in side.slots if name != config.source.slot),
        (*horizon, *(() if side.server == server else side.horizon)),
        (
            *(a for slot in made for a in alarms(slot_state(slot, room), max_retained=retained, max_inactive=inactive)),
            *other_alarms(room.others, retained),
            *_consumer_alarms(config, side),
        ),
        measured_at,
        side.error,
        side.held,
        room,
        side.guest,
        side.feeds,
        sinks=side.sinks,
        mirrors=side.mirrors,
    )


def measure_store(config: Config, error: SourceUnavailable) -> Lag:
    """Look at the store alone, after the source could not be reached because of `error`.

    Raises:
        StoreUnavailable: The store is out of reach, too.
    """
    side = store_side(config)
    return Lag(
        [],
        side.consumers,
        side.holders,
        side.backfills,
        other=tuple(name for name in side.slots if name != config.source.slot),
        horizon=side.horizon,
        alarms=_consumer_alarms(config, side),
        measured_at=time.monotonic(),
        consumer_holders=side.held,
        guest=side.guest,
        feeds=side.feeds,
        source_error=str(error),
        sinks=side.sinks,
        mirrors=side.mirrors,
    )


def _consumer_alarms(config: Config, side: StoreSide) -> tuple[Alarm, ...]:
    timeouts = {consumer.name: consumer.visibility_timeout for consumer in config.consumers}
    fed = side.feeds.alarms() if side.feeds else ()
    return (*held_alarms(side.held, timeouts), *fed, *sink_alarms(side.sinks), *mirror_alarms(side.mirrors))


def stored_slot(config: Config) -> str | None:
    """Return the slot to which the store's position belongs, or None before the first start."""
    with connect_for_calls(config.store_dsn, config.store.schema_, "cdcbridge cli") as store:
        if schema_version(store) == 0:
            return None
        with store_errors():
            row = store.execute("select slot from source").fetchone()
    return row[0] if row else None


def _caught_up(connection: Connection, slot: Slot, current: int) -> bool:
    """Return whether no commit waits to be stored.

    That is so if the server has sent all of its WAL, and the bridge has reported all of it as written. The bridge also
    reports changes as written that no consumer needs.
    """
    if slot.confirmed_flush_lsn is not None and slot.confirmed_flush_lsn >= current:
        return True
    with source_errors():
        row = connection.execute(_STREAM, (slot.active_pid,)).fetchone()
    if row is None or row[0] is None or row[1] is None:
        return False
    sent, written, flushed = (parse_lsn(lsn) for lsn in row)
    return written >= sent >= flushed


def _slot(slot: Slot, current: int, seconds: float | None) -> SlotLag:
    lag = None if slot.confirmed_flush_lsn is None else max(0, current - slot.confirmed_flush_lsn)
    return SlotLag(
        slot.name,
        slot.plugin,
        slot.active_pid is not None,
        slot.wal_status or "unknown",
        None if slot.restart_lsn is None else format_lsn(slot.restart_lsn),
        None if slot.confirmed_flush_lsn is None else format_lsn(slot.confirmed_flush_lsn),
        format_lsn(current),
        None if slot.restart_lsn is None else max(0, current - slot.restart_lsn),
        lag,
        None if slot.wal_status == "lost" else seconds,
        slot.safe_wal_size,
        slot.invalidation,
        slot.inactive_seconds,
        None,
        None,
        slot.failover,
    )


def _growth(
    config: Config, slot: SlotLag, horizon: Sequence[HorizonHolder], before: Sequence[Lag] | None, now: float
) -> Growth:
    """Return the growth of the WAL that the slot retains.

    The retained WAL grows while the slot has no reader, or while a transaction that writes is open. Otherwise it does
    not grow.
    """
    if before is not None:
        return _observed(slot, before, now)
    seconds = _held_for(horizon) if slot.active else slot.lag_seconds
    written = slot.retained_bytes if slot.active else slot.lag_bytes
    average = average_growth(written, seconds)
    if average is None or seconds is None:
        return Growth(0.0 if slot.active else None)
    since = f"{dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds):%H:%M} UTC"
    grown = look_again(config.source_dsn) if wants_second_look(average, slot.safe_wal_bytes) else None
    if grown is None:
        return Growth(average, f"on average since {since}")
    return growth_now(grown.sizes, grown.seconds, written or 0, since)


def _held_for(horizon: Sequence[HorizonHolder]) -> float | None:
    """Return for how many seconds an open transaction that writes has held the slot's WAL.

    Return None if that is too short to matter.
    """
    ages = [holder.age_seconds for holder in horizon if holder.writes and holder.age_seconds is not None]
    return max((age for age in ages if age >= _LONG), default=None)


def _moves(
    slot: SlotLag, free: int | None, before: Sequence[Lag], horizon: Sequence[HorizonHolder], now: float
) -> bool:
    """Return whether the slot's positions advanced since the first look, so that growth in between is no forecast.

    A slot that advances may still be too slow. That is so if it retains more WAL than there is free space, and the
    first look is at least a minute ago. The result is then False.
    """
    looks = [(look.measured_at, s) for look in before for s in look.slots if s.name == slot.name]
    if not slot.active or not looks:
        return False
    since, first = looks[0]
    restarted = first.restart_lsn != slot.restart_lsn
    confirmed = first.confirmed_flush_lsn != slot.confirmed_flush_lsn and _held_for(horizon) is None
    too_slow = now - since >= _LONG and free is not None and (slot.retained_bytes or 0) > free
    return (restarted or confirmed) and not too_slow


def _observed(slot: SlotLag, before: Sequence[Lag], now: float) -> Growth:
    """Return the growth between the earlier looks and now.

    A slot without a reader keeps all WAL that is written, so three looks are enough. A slot with a reader moves, so it
    takes LOOKS of them.
    """
    looks = [(look.measured_at, s) for look in before for s in look.slots if s.name == slot.name]
    sizes = [(at, s.retained_bytes or 0) for at, s in (*looks, (now, slot)) if s.retained_bytes is not None]
    if len(sizes) <= len(looks):
        return Growth(None)
    if not slot.active:
        return latest_growth([size for size, (_, s) in zip(sizes, (*looks, (now, slot)), strict=True) if not s.active])
    if len(sizes) < LOOKS:
        return Growth(None)
    return Growth(observed_growth(sizes), f"in the last {human_duration(now - sizes[0][0])}")


def slot_state(slot: SlotLag, room: WalRoom) -> SlotState:
    """Return the values of a slot from which its alarms are derived."""
    return SlotState(
        slot.name,
        slot.active,
        slot.wal_status,
        slot.invalidation_reason,
        slot.retained_bytes,
        slot.safe_wal_bytes,
        slot.inactive_seconds,
        None if slot.moves else slot.growth_bytes_per_second,
        room.free_bytes if room.limit_bytes is None else None,
        slot.growth_basis,
        room.limit_bytes,
    )
