"""Commands about the slot and about the lag of slot and consumers: lag, slot."""

from __future__ import annotations

import datetime as dt
import time
from collections import deque
from dataclasses import asdict

import click

from cdcbridge.bridge import slot_repair as operate
from cdcbridge.cli.backfill import print_backfills
from cdcbridge.cli.consumers import print_consumers
from cdcbridge.cli.context import App, DurationType, as_json, pass_app, print_json, print_table, say
from cdcbridge.cli.lag_words import headline, print_other_slots, say_alarms, say_rest
from cdcbridge.cli.mirror_words import print_mirrors
from cdcbridge.cli.sink_words import print_sinks
from cdcbridge.config import Config
from cdcbridge.database import connect_source
from cdcbridge.errors import SourceUnavailable, StoreUnavailable, UsageError
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.observe.lag import LOOKS, Lag, measure, measure_store
from cdcbridge.source.slots import Slot, current_lsn, slots
from cdcbridge.units import format_duration, human_duration, human_size


@click.command()
@as_json
@click.option("--watch", type=DurationType(0.1), help="Repeat at this interval, for example 5s.")
@pass_app
def lag(app: App, as_json: bool, watch: float | None) -> int:
    """Show how far the slot and each consumer lag.

    It works while the bridge is stopped. If one of the two databases cannot be reached, it shows the half of the other
    one with the reason, and exits with 1. If the slot is lost, it exits with 3.

    \b
    RETAINED    WAL that the slot keeps on the source's disk
    LEFT        WAL that it may keep in addition before the server invalidates
                the slot (-: no limit, max_slot_wal_keep_size is -1)
    LAG         WAL that the bridge has not confirmed yet
    BEHIND      age of the oldest commit that is not confirmed, at most
    OTHER SLOT  slot of another program, whose WAL is on the same disk
    PENDING     messages that wait, with DELAYED and HELD ones, or that the
                group of a stream has not read
    DELAYED     those of PENDING that become visible later
    HELD        those of PENDING that open transactions of receivers hold, at least
    IN FLIGHT   messages that are delivered, and neither acked nor nacked nor expired
    DEAD        dead letters
    OLDEST      how long the oldest message that is due has waited
    """
    looks: deque[Lag] = deque(maxlen=LOOKS - 1)
    while True:
        try:
            found = _measure(app.config, list(looks) if watch else None)
        except SourceUnavailable as error:
            if not watch:
                raise
            say(f"{error}. Trying again")
            looks.clear()
            time.sleep(watch)
            continue
        if watch and not as_json:
            _begin_screen(watch)
        _print(found, app.config, as_json)
        if not watch:
            return 3 if found.lost else 1 if found.store_error or found.source_error else 0
        if not found.source_error:
            looks.append(found)
        time.sleep(watch)


def _measure(config: Config, before: list[Lag] | None) -> Lag:
    """Measure source and store, or the store alone if the source cannot be reached.

    `before` contains the earlier looks of --watch. Raise SourceUnavailable if neither can be reached.
    """
    try:
        return measure(config, before)
    except SourceUnavailable as error:
        try:
            return measure_store(config, error)
        except StoreUnavailable as other:
            raise SourceUnavailable(f"{error}; {other}", hint=error.hint) from error


def _begin_screen(every: float) -> None:
    """Print the time and the interval before the next look.

    On a terminal the last look is cleared first. In a pipe the next one follows it.
    """
    click.clear()
    now = dt.datetime.now(dt.UTC)
    click.echo(f"{now:%Y-%m-%d %H:%M:%S} UTC, every {format_duration(every)}, until Ctrl-C\n")


def _print(found: Lag, config: Config, as_json: bool) -> None:
    slot = config.source.slot
    if as_json:
        print_json(found.as_json())
    else:
        if first := headline(found):
            click.echo(first)
        say_alarms(found)
        if not found.source_error:
            _print_slots(found, slot)
            print_other_slots(found)
            click.echo()
        if not found.store_error:
            print_consumers(found.consumers, feeds=found.feeds)
        _print_below(found)
    if found.source_error:
        say(f"the state of the slot is unknown: {found.source_error}")
    if found.store_error:
        say(f"the state of the consumers is unknown: {found.store_error}")
    say_rest(found, config)
    for name in found.other:
        say(f"the store uses the slot {name}, not {slot}: set source.slot back (a second slot needs a second store)")
    if as_json:
        say_alarms(found)


def _print_below(found: Lag) -> None:
    """Print the sinks, the mirrors and the backfills, if there are any."""
    if found.sinks:
        click.echo()
        print_sinks(found.sinks)
    if found.mirrors:
        click.echo()
        print_mirrors(found.mirrors)
    if found.backfills:
        click.echo()
        print_backfills(found.backfills)


def _print_slots(found: Lag, slot: str) -> None:
    print_table(
        ("SLOT", "PLUGIN", "ACTIVE", "WAL STATUS", "RETAINED", "LEFT", "LAG", "BEHIND"),
        [
            (
                s.name,
                s.plugin,
                "yes" if s.active else "no",
                s.wal_status,
                None if s.retained_bytes is None else human_size(s.retained_bytes),
                None if s.safe_wal_bytes is None else human_size(max(0, s.safe_wal_bytes)),
                None if s.lag_bytes is None else human_size(s.lag_bytes),
                None if s.lag_seconds is None else human_duration(s.lag_seconds),
            )
            for s in found.slots
        ],
        empty=f"there is no slot {slot}" + ("" if found.gone or found.other else " yet: `cdcbridge run` creates it"),
    )


@click.group("slot")
def slot_group() -> None:
    """List, create, drop and repair the replication slot."""


@slot_group.command("list")
@as_json
@pass_app
def slot_list(app: App, as_json: bool) -> None:
    """List the logical slots of the server, and mark ours."""
    with connect_source(app.config.source_dsn, "cdcbridge cli") as connection:
        rows = slots(connection)
        current = current_lsn(connection)
    ours = app.config.source.slot
    if as_json:
        lsns = ("restart_lsn", "confirmed_flush_lsn")
        print_json(
            [
                {k: format_lsn(v) if k in lsns and v is not None else v for k, v in asdict(s).items()}
                | {"retained_bytes": _retained(s, current), "ours": s.name == ours}
                for s in rows
            ]
        )
        return
    print_table(
        ("SLOT", "PLUGIN", "DATABASE", "ACTIVE PID", "WAL STATUS", "RETAINED", "RESTART", "CONFIRMED"),
        [
            (
                f"{s.name} *" if s.name == ours else s.name,
                s.plugin,
                s.database,
                s.active_pid,
                s.wal_status,
                None if (retained := _retained(s, current)) is None else human_size(retained),
                s.restart_lsn and format_lsn(s.restart_lsn),
                s.confirmed_flush_lsn and format_lsn(s.confirmed_flush_lsn),
            )
            for s in rows
        ],
        empty="the cluster has no logical slots",
    )


def _retained(slot: Slot, current: int) -> int | None:
    """Return the bytes of WAL that the slot retains on the server, or None for a lost slot."""
    return None if slot.restart_lsn is None else max(0, current - slot.restart_lsn)


@slot_group.command()
@pass_app
def create(app: App) -> None:
    """Create the publication and the slot before the first `run`.

    The slot keeps all changes from now on for the bridge.
    """
    lsn, plugin = operate.create_slot(app.config, say)
    click.echo(f"created: slot {app.config.source.slot} ({plugin}) at {format_lsn(lsn)}")


@slot_group.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def drop(app: App, yes: bool) -> None:
    """Drop the slot, and lose the changes that it still keeps."""
    name = app.config.source.slot
    if not yes:
        click.confirm(f"Drop the slot {name}? The changes that it has not sent yet are lost.", abort=True, err=True)
    operate.drop_slot(app.config)
    click.echo(f"dropped: slot {name}")


@slot_group.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def recreate(app: App, yes: bool) -> None:
    """Drop the slot and create it again.

    Every consumer receives a gap message with the range (from, to) that is missing.
    """
    if not yes:
        click.confirm(
            f"Recreate the slot {app.config.source.slot}? Changes between the store's end and now are lost. A gap"
            " message will report that.",
            abort=True,
            err=True,
        )
    start, end = operate.recreate_slot(app.config, say)
    click.echo(f"recreated: slot {app.config.source.slot}, gap from {format_lsn(start)} to {format_lsn(end)}")


@slot_group.command()
@click.option("--to", "to", required=True, metavar="LSN", help="The LSN at which the bridge continues.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def skip(app: App, to: str, yes: bool) -> None:
    """Skip changes that cannot be read.

    Every consumer receives a gap message with the range (from, to) that was skipped.
    """
    try:
        target = parse_lsn(to)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not yes:
        click.confirm(f"Skip everything up to {to}? A gap message will report that.", abort=True, err=True)
    start, end = operate.skip(app.config, target)
    click.echo(f"skipped: from {format_lsn(start)} to {format_lsn(end)}")


COMMANDS = (lag, slot_group)
