"""Commands about the slot and how far things are: lag, slot."""

from __future__ import annotations

import time
from dataclasses import asdict

import click

from cdcbridge import operate
from cdcbridge.cli.backfill import print_backfills
from cdcbridge.cli.consumers import print_consumers
from cdcbridge.cli.context import App, DurationType, as_json, pass_app, print_json, print_table, say
from cdcbridge.database import connect_source
from cdcbridge.errors import SourceUnavailable, UsageError
from cdcbridge.lag import Lag, measure
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.source import slots
from cdcbridge.units import human_duration, human_size


@click.command()
@as_json
@click.option("--watch", type=DurationType(0.1), help="Look again and again: 5s.")
@pass_app
def lag(app: App, as_json: bool, watch: float | None) -> int:
    """How far the slot and each consumer are behind. Works with the bridge stopped; a lost slot exits with 3."""
    while True:
        try:
            found = measure(app.config)
        except SourceUnavailable as error:
            if not watch:
                raise
            say(f"{error}; looking again")
            time.sleep(watch)
            continue
        if watch and not as_json:
            click.clear()
        _print(found, app.config.source.slot, as_json)
        if not watch:
            return 3 if found.lost else 1 if found.store_error else 0
        time.sleep(watch)


def _print(found: Lag, slot: str, as_json: bool) -> None:
    if as_json:
        print_json(found.as_json())
    else:
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
            empty=f"there is no slot {slot}" + ("" if found.gone or found.other else " yet: `cdcbridge run` makes it"),
        )
        click.echo()
        if not found.store_error:
            print_consumers(found.consumers, feeds=found.feeds)
        if found.backfills:
            click.echo()
            print_backfills(found.backfills)
    if found.store_error:
        say(f"of consumers nothing is known: {found.store_error}")
    for holder in found.holders:
        say(
            f"pid {holder.pid} published seq {holder.seq} and is open for {human_duration(holder.age_seconds)}"
            f" ({holder.state}): streams of published topics wait before it; query: {holder.query}"
        )
    for held in found.horizon:
        who = f"{held.kind} {held.name}" if held.pid is None else f"{held.kind} of pid {held.pid} ({held.name})"
        since = (
            f"open for {human_duration(held.age_seconds)}"
            if held.age_seconds is not None
            else f"{held.age_xids} xids old"
        )
        what = "old row versions and WAL" if held.writes and held.server != "store" else "old row versions"
        doing = ", ".join(text for text in (held.state, f"query: {held.query}" if held.query else None) if text)
        place = "source and store" if held.server == "both" else held.server
        say(f"{place}: the {who}, {since}, keeps {what} ({doing})")
    for name in found.other:
        say(f"the store goes by the slot {name}, not {slot}: set source.slot back, or store.schema to another name")
    for alarm in found.alarms:
        say(f"ALARM {alarm.message}")
    for name in found.gone:
        say(
            f"ALARM the slot {name} does not exist any more: changes that it had yet to send are gone; `cdcbridge slot"
            " recreate` goes on"
        )


@click.group("slot")
def slot_group() -> None:
    """The replication slot: list, create, drop, recreate, skip."""


@slot_group.command("list")
@as_json
@pass_app
def slot_list(app: App, as_json: bool) -> None:
    """The cluster's logical slots; ours is marked."""
    with connect_source(app.config.source_dsn, "cdcbridge cli") as connection:
        rows = slots(connection)
    ours = app.config.source.slot
    if as_json:
        lsns = ("restart_lsn", "confirmed_flush_lsn")
        print_json(
            [
                {k: format_lsn(v) if k in lsns and v is not None else v for k, v in asdict(s).items()}
                | {"ours": s.name == ours}
                for s in rows
            ]
        )
        return
    print_table(
        ("SLOT", "PLUGIN", "DATABASE", "ACTIVE PID", "WAL STATUS", "RESTART", "CONFIRMED"),
        [
            (
                f"{s.name} *" if s.name == ours else s.name,
                s.plugin,
                s.database,
                s.active_pid,
                s.wal_status,
                s.restart_lsn and format_lsn(s.restart_lsn),
                s.confirmed_flush_lsn and format_lsn(s.confirmed_flush_lsn),
            )
            for s in rows
        ],
        empty="the cluster has no logical slots",
    )


@slot_group.command()
@pass_app
def create(app: App) -> None:
    """Create publication and slot before the first `run`: changes from here on are kept for it."""
    lsn, plugin = operate.create_slot(app.config, say)
    click.echo(f"created: slot {app.config.source.slot} ({plugin}) at {format_lsn(lsn)}")


@slot_group.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def drop(app: App, yes: bool) -> None:
    """Drop the slot. Changes that it had yet to send are lost."""
    name = app.config.source.slot
    if not yes:
        click.confirm(f"Drop the slot {name}? What it had yet to send is lost.", abort=True, err=True)
    operate.drop_slot(app.config)
    click.echo(f"dropped: slot {name}")


@slot_group.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def recreate(app: App, yes: bool) -> None:
    """Drop and create the slot; a gap message (from, to) tells every consumer what is missing."""
    if not yes:
        click.confirm(
            f"Recreate the slot {app.config.source.slot}? Changes between the store's end and now are lost, and a gap"
            " message will say so.",
            abort=True,
            err=True,
        )
    start, end = operate.recreate_slot(app.config, say)
    click.echo(f"recreated: slot {app.config.source.slot}; gap from {format_lsn(start)} to {format_lsn(end)}")


@slot_group.command()
@click.option("--to", "to", required=True, metavar="LSN", help="Go on from here.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def skip(app: App, to: str, yes: bool) -> None:
    """Pass over changes that cannot be read; a gap message (from, to) tells every consumer."""
    try:
        target = parse_lsn(to)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not yes:
        click.confirm(f"Skip everything up to {to}? A gap message will say so.", abort=True, err=True)
    start, end = operate.skip(app.config, target)
    click.echo(f"skipped: from {format_lsn(start)} to {format_lsn(end)}")


COMMANDS = (lag, slot_group)
