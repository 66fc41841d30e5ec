"""Find the alarms of a slot, and estimate when a limit is reached.

`lag`, the log and the person on call get the same text: the problem, its age, its consequence, and the fix. This module
never reads a database or a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from cdcbridge.problem import Alarm
from cdcbridge.units import human_duration, human_size

FORECAST_WITHIN: Final = 3600.0  # seconds; a limit that will be reached sooner is an alarm
NOTHING: Final = 1024  # bytes between two looks that a server writes by itself, for example at a checkpoint
_NEAR: Final = 10  # a slot has little room left if it is less than a tenth of the limit
_RATE_OVER: Final = 10.0  # seconds that an average must cover to mean something


@dataclass(slots=True, frozen=True)
class SlotState:
    """The state of a slot, from which alarms are derived.

    Sizes are in bytes and times in seconds. None means unknown.

    Attributes:
        growth: Growth of the retained WAL in bytes per second, for a slot that does not advance.
        free_bytes: Free space on the disk, if no limit keeps the slot from filling it.
        basis: The period in which `growth` was measured, for example "in the last 0.5 s".
        limit_bytes: The server's max_slot_wal_keep_size.
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
    """The growth of the WAL that a slot retains.

    Attributes:
        rate: Bytes per second, or None if unknown.
        basis: The period in which the rate was measured, for example "in the last 0.5 s".
        quiet: A sentence about a slot that waits while nothing is written, otherwise ''.
    """

    rate: float | None
    basis: str = ""
    quiet: str = ""


def wants_second_look(average: float | None, safe_wal_bytes: int | None) -> bool:
    """Return whether an average would become a forecast.

    Then one more look must show whether anything is written now.
    """
    if not average:
        return False
    left = seconds_to(safe_wal_bytes, average)
    return left is None or left < FORECAST_WITHIN


def growth_now(sizes: Sequence[int], seconds: float, written: int, since: str) -> Growth:
    """Judge the growth by a few looks at the end of the WAL.

    An average since some time ago does not describe the present: after a burst it only falls.

    Args:
        sizes: Bytes that were written between each two successive looks.
        seconds: Seconds between the first and the last look.
        written: Bytes that were written since the slot began to wait.
        since: The time at which that was, for example "09:30 UTC".
    """
    basis, total = f"in the last {seconds:.1f} s", sum(sizes)
    if total < NOTHING:
        return Growth(0.0, basis, f"WAL: {human_size(written)} written since {since}, none {basis}")
    if min(sizes) < NOTHING:  # for example a checkpoint
        return Growth(0.0, basis, f"WAL: {human_size(written)} written since {since}, {human_size(total)} {basis}")
    return Growth(total / seconds, basis)


def latest_growth(looks: Sequence[tuple[float, int]]) -> Growth:
    """Return the growth between the three latest looks at a slot without a reader.

    The rate is the smaller one of the two between these looks, because a checkpoint or a single burst is no basis for a
    forecast.

    Args:
        looks: For each look, its moment in seconds and the retained bytes.
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
    """Return the average growth, in bytes per second, of a slot that has not advanced for so many seconds.

    Return None if that time is too short for an average, or if a value is unknown.
    """
    if retained_bytes is None or seconds is None or seconds < _RATE_OVER:
        return None
    return retained_bytes / seconds


def observed_growth(looks: Sequence[tuple[float, int]]) -> float | None:
    """Return the growth in bytes per second over a series of looks, or None if there are too few.

    The growth is measured from the smallest size in the first half to the smallest size in the second half. The reason
    is that a slot's restart_lsn advances in steps: the retained size rises and falls even if it does not grow.

    Args:
        looks: For each look, its moment in seconds and the retained bytes. No look may be missing.
    """
    half = len(looks) // 2
    if half < 2:
        return None
    (began, before), (ended, after) = (min(part, key=lambda look: look[1]) for part in (looks[:half], looks[-half:]))
    return max(0.0, (after - before) / (ended - began))


def seconds_to(limit: float | None, growth: float | None) -> float | None:
    """Return in how many seconds so many more bytes are reached, or None if that is not in sight."""
    if limit is None or growth is None or growth <= 0:
        return None
    return max(0.0, limit / growth)


def alarms(slot: SlotState, *, max_retained: int, max_inactive: float, within: float = FORECAST_WITHIN) -> list[Alarm]:
    """Return the alarms of a slot, the worst first.

    A lost slot has one alarm, because nothing else matters any more.

    Args:
        slot: The state of the slot.
        max_retained: Bytes of WAL that the slot may retain without an alarm.
        max_inactive: Seconds that the slot may be without a reader before that is an alarm.
        within: A limit that is reached in fewer seconds is an alarm.
    """
    if slot.wal_status == "lost":
        why = f" ({slot.reason})" if slot.reason else ""
        text = (
            f"the slot {slot.name} is lost{why}: the changes that it had not sent yet are lost. `cdcbridge slot"
            " recreate` continues after a gap message"
        )
        return [Alarm("slot_lost", slot.name, text)]
    act = (
        "end the transaction that holds it back (`cdcbridge lag` names it), or find out why the bridge is slow"
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
    forecasts = _forecasts(slot, act, within)
    found += forecasts or _near(slot, act)
    if slot.retained_bytes is not None and slot.retained_bytes > max_retained:
        text = (
            f"the slot {slot.name} retains {human_size(slot.retained_bytes)} of WAL, more than max_retained_wal"
            f" ({human_size(max_retained)}): {act}"
        )
        found.append(Alarm("slot_retains_too_much", slot.name, text))
    if not slot.active and slot.inactive_seconds is not None and slot.inactive_seconds > max_inactive:
        text = (
            f"no bridge has read the slot {slot.name} for {human_duration(slot.inactive_seconds)}, longer than"
            f" max_slot_inactive ({human_duration(max_inactive)}): {act}"
        )
        found.append(Alarm("slot_inactive", slot.name, text))
    return found


def _near(slot: SlotState, act: str) -> list[Alarm]:
    """Return an alarm if little room is left, whether or not anything is written at this moment."""
    left, limit = slot.safe_wal_bytes, slot.limit_bytes
    if slot.active or slot.wal_status == "unreserved" or left is None or limit is None or left * _NEAR >= limit:
        return []
    text = (
        f"the slot {slot.name} is lost after {human_size(max(0, left))} more of WAL (max_slot_wal_keep_size is"
        f" {human_size(limit)}): {act}, or raise max_slot_wal_keep_size"
    )
    return [Alarm("slot_limit_near", slot.name, text)]


def _forecasts(slot: SlotState, act: str, within: float) -> list[Alarm]:
    """Return an alarm for each limit that will be reached in less than `within` seconds.

    The limit is max_slot_wal_keep_size. Without such a limit it is the end of the disk.
    """
    found = []
    rate = f"{human_size(slot.growth or 0)}/s" + (f" {slot.basis}" if slot.basis else "")
    left = seconds_to(slot.safe_wal_bytes, slot.growth)
    if left is not None and left < within:
        text = (
            f"at this rate ({rate}) max_slot_wal_keep_size is reached in {human_duration(left)},"
            f" and the slot {slot.name} is lost: {act}, or raise max_slot_wal_keep_size"
        )
        found.append(Alarm("slot_limit_in_sight", slot.name, text))
    left = seconds_to(slot.free_bytes, slot.growth)
    if left is not None and left < within:
        text = (
            f"at this rate ({rate}) the slot {slot.name} fills the disk in {human_duration(left)}, and the"
            f" server stops: {act}, or set a limit: "
            " `alter system set max_slot_wal_keep_size = '50GB'; select pg_reload_conf();`"
        )
        found.append(Alarm("disk_full_in_sight", slot.name, text))
    return found
