"""The sentences of `cdcbridge lag`: whether a bridge runs, alarms, open transactions, and the room on the disk.

Alarms are printed first. No line is ever broken within a word.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator

import click

from cdcbridge.cli.context import print_table, say
from cdcbridge.config import Config
from cdcbridge.observe.lag import Lag, SlotLag
from cdcbridge.observe.xmin_holders import HorizonHolder
from cdcbridge.store.holders import about, told
from cdcbridge.units import human_duration, human_size


def headline(found: Lag) -> str:
    """Return the first line if no bridge reads the slot, else ''."""
    for slot in found.slots:
        if slot.active or slot.wal_status == "lost":
            continue
        if found.store_error:
            return f"no bridge reads the slot {slot.name}: none is running, or it cannot reach the store either"
        if slot.inactive_seconds is None:
            return "no bridge is running: start it with `cdcbridge run`"
        # Before PostgreSQL 17 the server does not report this time. Then it is the time since the last append, which is
        # the longest that it can be.
        most = " at most" if slot.failover is None else ""
        return f"no bridge has been running for {about(slot.inactive_seconds)}{most}: start it with `cdcbridge run`"
    return ""


def say_alarms(found: Lag) -> None:
    """Print the alarms on stderr. A slot that does not exist any more is the first of them."""
    for name in found.gone:
        say_wrapped(
            f"ALARM the slot {name} no longer exists: the changes that it had not sent yet are lost. `cdcbridge slot"
            " recreate` continues after a gap message"
        )
    for alarm in found.alarms:
        say_wrapped(f"ALARM {alarm.message}")


def say_wrapped(text: str) -> None:
    """Print a text for people. On a terminal it is broken between words, because a terminal would break it anywhere."""
    if sys.stderr.isatty():
        width = max(20, shutil.get_terminal_size().columns)
        text = textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    say(text)


def print_other_slots(found: Lag) -> None:
    """Print the slots that do not belong to the bridge, with the WAL that each retains on the same disk."""
    if found.room.others:
        click.echo()
        print_table(
            ("OTHER SLOT", "PLUGIN", "DATABASE", "ACTIVE", "WAL STATUS", "RETAINED"),
            [
                (
                    slot.name,
                    slot.plugin or slot.slot_type,
                    slot.database,
                    "yes" if slot.active else "no",
                    slot.wal_status,
                    None if slot.retained_bytes is None else human_size(max(0, slot.retained_bytes)),
                )
                for slot in found.room.others
            ],
        )


def say_rest(found: Lag, config: Config) -> None:
    """Print remarks that are not alarms: about hidden consumers, a quiet slot, the disk and open transactions."""
    if found.guest:
        say_wrapped(
            f"the role {found.guest.role} sees only its own consumers. The store's owner, {found.guest.owner}, sees"
            " all consumers, and backfills"
        )
    for slot in found.slots:
        if slot.quiet:
            say_wrapped(slot.quiet)
        for line in _disk(slot, found, config):
            say_wrapped(line)
    alarmed = {alarm.message for alarm in found.alarms}
    for line in told(found.consumer_holders):
        if line not in alarmed:
            say_wrapped(line)
    _say_publishers(found)
    for held in found.horizon:
        say_wrapped(_horizon(held))


def _say_publishers(found: Lag) -> None:
    waited_for = {held.pid for held in found.consumer_holders if held.kind == "publisher"}
    for holder in found.holders:
        if holder.pid not in waited_for:
            say_wrapped(
                f"pid {holder.pid} published seq {holder.seq} and is open for {about(holder.age_seconds)}"
                f" ({holder.state}): no consumer waits for it yet. Query: {holder.query}"
            )


def _horizon(held: HorizonHolder) -> str:
    who = f"{held.kind} {held.name}" if held.pid is None else f"{held.kind} of pid {held.pid} ({held.name})"
    since = (
        f"open for {human_duration(held.age_seconds)}" if held.age_seconds is not None else f"{held.age_xids} xids old"
    )
    what = "old row versions and WAL" if held.writes and held.server != "store" else "old row versions"
    doing = ", ".join(text for text in (held.state, f"query: {held.query}" if held.query else None) if text)
    place = "source and store" if held.server == "both" else held.server
    return f"{place}: the {who}, {since}, keeps {what} ({doing})"


def _disk(slot: SlotLag, found: Lag, config: Config) -> Iterator[str]:
    """Yield a line for a slot whose WAL may fill the disk, because no limit is set.

    The line includes a forecast if the WAL grows.
    """
    if (
        slot.wal_status == "lost"
        or found.room.limit_bytes is not None
        or slot.moves
        or (slot.active and not slot.growth_bytes_per_second)
    ):
        return
    growth = slot.growth_bytes_per_second
    rate = f", and grows by {human_size(growth * 3600)} per hour ({slot.growth_basis})" if growth else ""
    text = f"disk: the slot {slot.name} keeps {human_size(slot.retained_bytes or 0)} of WAL{rate}."
    text += " max_slot_wal_keep_size is -1, so it may fill the disk"
    free = found.room.free_bytes
    if free is None:
        text += ", whose free space this program cannot know"
    elif growth:
        text += f" ({human_size(free)} are free, for {human_duration(free / growth)})"
    else:
        text += f" ({human_size(free)} are free)"
    left = config.source.max_retained_wal - (slot.retained_bytes or 0)
    if growth and left > 0:
        text += (
            f". source.max_retained_wal ({human_size(config.source.max_retained_wal)}) is reached in"
            f" {human_duration(left / growth)}"
        )
    yield text
