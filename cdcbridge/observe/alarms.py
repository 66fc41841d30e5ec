"""What about a slot should wake somebody up, and what is left of time. Pure.

One text for `lag`, the log and whoever is paged: what is the matter, since when, what will happen, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from cdcbridge.problem import Alarm
from cdcbridge.units import human_duration, human_size

FORECAST_WITHIN: Final = 3600.0  # seconds to a limit that are an alarm
NOTHING: Final = 1024  # bytes between two looks: what a server writes by itself, for example at a checkpoint
_NEAR: Final = 10  # a slot has little left below the tenth part of its limit
_RATE_OVER: Final = 10.0  # seconds that the average needs to mean something


@dataclass(slots=True, frozen=True)
class SlotState:
    """What alarms go by: sizes in bytes, times in seconds, None where unknown.

    growth: retained bytes per second, of a slot that does not move.
    free_bytes: of the disk, where no limit keeps the slot from filling it.
    basis: the time that the growth is of, for example "in the last 0.5 s".
    limit_bytes: max_slot_wal_keep_size.
    """

    name: str
    active: bool
    wal_status: str
    reason: str | None
    retained_bytes: int | None
    safe_wal_bytes: int | None
    inactive_seconds: float | None
    growth: float | None
    free_bytes: int | None = None
    basis: str = ""
    limit_bytes: int | None = None


class Growth(NamedTuple):
    """How fast the WAL that a slot keeps grows: bytes per second, and the time that this is of.

    quiet: a sentence for a slot that waits while nothing is written; '' for others.
    """

    rate: float | None
    basis: str = ""
    quiet: str = ""


def wants_second_look(average: float | None, safe_wal_bytes: int | None) -> bool:
    """Whether an average would become a forecast, so that one more look must say whether anything is written now."""
    if not average:
        return False
    left = seconds_to(safe_wal_bytes, average)
    return left is None or left < FORECAST_WITHIN


def growth_now(sizes: Sequence[int], seconds: float, written: int, since: str) -> Growth:
    """Judge by a few looks at the end of the WAL. An average says nothing about now: after a burst it only falls.

    sizes: bytes between each two looks.
    seconds: between the first and the last look.
    written: bytes that the slot has waited with since then.
    """
    basis, total = f"in the last {seconds:.1f} s", sum(sizes)
    if total < NOTHING:
        return Growth(0.0, basis, f"WAL: {human_size(written)} written since {since}, none {basis}")
    if min(sizes) < NOTHING:  # for example a checkpoint
        return Growth(0.0, basis, f"WAL: {human_size(written)} written since {since}, {human_size(total)} {basis}")
    return Growth(total / seconds, basis)


def latest_growth(looks: Sequence[tuple[float, int]]) -> Growth:
    """Bytes per second, from the three latest looks (moment, bytes) at a slot that nobody reads.

    The smaller of the two rates between them: a checkpoint or one burst is no forecast.
    """
    if len(looks) < 3:
        return Growth(None)
    latest = looks[-3:]
    grown = [(after - before, then - at) for (at, before), (then, after) in pairwise(latest)]
    basis = f"in the last {human_duration(latest[-1][0] - latest[0][0])}"
    if min(size for size, _ in grown) < NOTHING:
        return Growth(0.0, basis)
    return Growth(min(size / seconds for size, seconds in grown), basis)


def average_growth(retained_bytes: int | None, seconds: float | None) -> float | None:
    """Bytes per second that a slot keeps which has not moved for so long; None where that is too short to say."""
    if retained_bytes is None or seconds is None or seconds < _RATE_OVER:
        return None
    return retained_bytes / seconds


def observed_growth(looks: Sequence[tuple[float, int]]) -> float | None:
    """Bytes per second, from looks (moment, retained bytes) of which none is missing; None while they are too few.

    From the least that was retained in the first half of them to the least in the second: a slot's restart_lsn moves in
    steps, so what it keeps goes up and down although it grows by nothing.
    """
    half = len(looks) // 2
    if half < 2:
        return None
    (began, before), (ended, after) = (min(part, key=lambda look: look[1]) for part in (looks[:half], looks[-half:]))
    return max(0.0, (after - before) / (ended - began))


def seconds_to(limit: float | None, growth: float | None) -> float | None:
    """When so many bytes more are reached; None where they are not in sight."""
    if limit is None or growth is None or growth <= 0:
        return None
    return max(0.0, limit / growth)


def alarms(slot: SlotState, *, max_retained: int, max_inactive: float) -> list[Alarm]:
    """The worst first. A lost slot has one alarm: nothing else matters any more."""
    if slot.wal_status == "lost":
        why = f" ({slot.reason})" if slot.reason else ""
        text = f"the slot {slot.name} is lost{why}: what it had yet to send is gone; `cdcbridge slot recreate` goes on"
        return [Alarm("slot_lost", slot.name, text)]
    act = (
        "end the transaction that holds it (`cdcbridge lag` names it), or see why the bridge is slow"
        if slot.active
        else "start the bridge (`cdcbridge run`)"
    )
    found = []
    if slot.wal_status == "unreserved":
        text = (
            f"the slot {slot.name} needs WAL that the next checkpoint may remove (wal_status unreserved): {act}, or"
            " raise max_slot_wal_keep_size"
        )
        found.append(Alarm("slot_unreserved", slot.name, text))
    forecasts = _forecasts(slot, act)
    found += forecasts or _near(slot, act)
    if slot.retained_bytes is not None and slot.retained_bytes > max_retained:
        text = (
            f"the slot {slot.name} retains {human_size(slot.retained_bytes)} of WAL, more than max_retained_wal"
            f" ({human_size(max_retained)}): {act}"
        )
        found.append(Alarm("slot_retains_too_much", slot.name, text))
    if not slot.active and slot.inactive_seconds is not None and slot.inactive_seconds > max_inactive:
        text = (
            f"nobody has read the slot {slot.name} for {human_duration(slot.inactive_seconds)}, longer than"
            f" max_slot_inactive ({human_duration(max_inactive)}): {act}"
        )
        found.append(Alarm("slot_inactive", slot.name, text))
    return found


def _near(slot: SlotState, act: str) -> list[Alarm]:
    """Little is left, whether or not anything is written at this moment."""
    left, limit = slot.safe_wal_bytes, slot.limit_bytes
    if slot.active or slot.wal_status == "unreserved" or left is None or limit is None or left * _NEAR >= limit:
        return []
    text = (
        f"the slot {slot.name} is lost after {human_size(max(0, left))} more of WAL (max_slot_wal_keep_size is"
        f" {human_size(limit)}): {act}, or raise max_slot_wal_keep_size"
    )
    return [Alarm("slot_limit_near", slot.name, text)]


def _forecasts(slot: SlotState, act: str) -> list[Alarm]:
    """What is reached within FORECAST_WITHIN: the limit, and where there is none the end of the disk."""
    found = []
    rate = f"{human_size(slot.growth or 0)}/s" + (f" {slot.basis}" if slot.basis else "")
    left = seconds_to(slot.safe_wal_bytes, slot.growth)
    if left is not None and left < FORECAST_WITHIN:
        text = (
            f"at this rate ({rate}) max_slot_wal_keep_size is reached in {human_duration(left)},"
            f" and the slot {slot.name} is lost: {act}, or raise max_slot_wal_keep_size"
        )
        found.append(Alarm("slot_limit_in_sight", slot.name, text))
    left = seconds_to(slot.free_bytes, slot.growth)
    if left is not None and left < FORECAST_WITHIN:
        text = (
            f"at this rate ({rate}) the slot {slot.name} fills the disk in {human_duration(left)}, and the"
            f" server stops: {act}, or set a limit: "
            " `alter system set max_slot_wal_keep_size = '50GB'; select pg_reload_conf();`"
        )
        found.append(Alarm("disk_full_in_sight", slot.name, text))
    return found
