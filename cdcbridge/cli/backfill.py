"""`cdcbridge backfill …` and `verify`: read the existing rows of a table, and compare a table with the log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from psycopg.rows import dict_row

from cdcbridge.backfill import verify as verifying
from cdcbridge.backfill.requests import refuse_order
from cdcbridge.cli.context import (
    DURATION,
    App,
    as_json,
    name_argument,
    pass_app,
    print_json,
    print_line,
    print_table,
    say,
)
from cdcbridge.database import Connection, connect_source
from cdcbridge.database.patience import patiently
from cdcbridge.errors import CdcbridgeError
from cdcbridge.units import human_duration

_UNFINISHED = ("waiting", "running", "paused")


@click.group()
def backfill() -> None:
    """Give a consumer the rows that a table already contains."""


@backfill.command()
@name_argument
@click.argument("table")
@click.option("--where", "condition", metavar="SQL", help="Read only rows that meet this condition.")
@click.option("--columns", metavar="A,B,…", help="Read only these columns, and list the others in `unchanged`.")
@click.option("--rate", type=click.IntRange(1), metavar="N", help="Read at most this many rows a second.")
@click.option("--follow", is_flag=True, help="Wait until the backfill ends, and show the progress.")
@pass_app
def start(
    app: App, name: str, table: str, condition: str | None, columns: str | None, rate: int | None, follow: bool
) -> None:
    """Start a backfill of TABLE for a consumer.

    The consumer receives the rows that TABLE contains now, as messages with op `read`.


    The running bridge reads them in chunks while it streams changes, and continues there after any interruption. A
    row that changes meanwhile arrives as its change. If TABLE has a key, the consumer never receives a row older than
    one that it has. Without a key, a row that changed meanwhile can arrive once more in its former state.

    \b
    Examples:
      cdcbridge backfill start billing public.orders --follow
      cdcbridge backfill start billing public.orders --where "created_at > now() - interval '30 days'"
    """
    wanted = None if columns is None else [column.strip() for column in columns.split(",")]
    with app.store() as store:
        with connect_source(app.config.source_dsn, "cdcbridge cli") as source:
            refuse_order(app.config, source, store, name, table, condition, wanted)
        row = patiently(
            store,
            lambda: store.execute(
                "select start_backfill(%s, %s, %s, %s, %s::int)", (name, table, condition, wanted, rate)
            ).fetchone(),
            what=f"backfill start {name}",
        )
        made = row[0] if row else 0
        if follow:
            _follow(store, name, made)
        else:
            print_line({"backfill": made})


@backfill.command("list")
@click.argument("name", required=False)
@as_json
@pass_app
def list_command(app: App, name: str | None, as_json: bool) -> None:
    """List backfills and how far each one is.

    Without NAME it lists the backfills of all consumers. A backfill that waits or failed is shown with the reason.
    """
    with app.store() as store:
        rows = status(store, name)
    if as_json:
        print_json(rows)
    else:
        print_backfills(rows)


def status(store: Connection, name: str | None = None) -> list[dict[str, Any]]:
    """Return the backfills of one consumer, or all of them, with the columns of backfill_status() in SQL."""
    with store.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("select * from backfill_status(%s)", (name,)).fetchall()


def print_backfills(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of backfills that `backfill list` and `lag` show."""
    print_table(
        ("BACKFILL", "CONSUMER", "TABLE", "STATE", "ROWS", "OF ABOUT", "%", "ROWS/S", "LEFT", "NOTE"),
        [
            (
                r["id"],
                r["consumer"],
                r["table_name"],
                r["state"],
                r["rows"],
                r["total"],
                None if r["percent"] is None else round(r["percent"]),
                None if r["rows_per_second"] is None else round(r["rows_per_second"]),
                None if r["seconds_left"] is None else human_duration(r["seconds_left"]),
                r["note"],
            )
            for r in rows
        ],
        empty="no backfills",
    )


@backfill.command()
@name_argument
@click.argument("table", required=False)
@pass_app
def pause(app: App, name: str, table: str | None) -> None:
    """Pause a backfill, until `resume` continues it."""
    _change(app, name, table, ("waiting", "running"), "paused")


@backfill.command()
@name_argument
@click.argument("table", required=False)
@pass_app
def resume(app: App, name: str, table: str | None) -> None:
    """Resume a paused or failed backfill.

    It continues after the last row that it has read.
    """
    _change(app, name, table, ("paused", "failed"), "waiting")


@backfill.command()
@name_argument
@click.argument("table", required=False)
@pass_app
def cancel(app: App, name: str, table: str | None) -> None:
    """Cancel a backfill for good.

    Messages that it has already put into the consumer's queue stay there.
    """
    _change(app, name, table, _UNFINISHED, "cancelled")


def _change(app: App, name: str, table: str | None, states: tuple[str, ...], state: str) -> None:
    with app.store() as store:
        row = patiently(
            store,
            lambda: store.execute(
                "select change_backfills(%s, %s, %s, %s)", (name, table, list(states), state)
            ).fetchone(),
            what=f"the change of {name}'s backfills",
        )
    print_line({state if state != "waiting" else "resumed": row[0] if row else 0})


def _follow(store: Connection, name: str, made: int) -> None:
    """Show a progress bar until the backfill ends.

    Raise CdcbridgeError if it ends in any other way than done, for example because it was cancelled.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("waiting", total=None)
        while True:
            (one,) = [row for row in status(store, name) if row["id"] == made]
            total = max(one["total"], one["rows"]) if one["total"] else None
            progress.update(task, completed=one["rows"], total=total, description=one["note"] or one["state"])
            if one["state"] not in _UNFINISHED:
                break
            time.sleep(0.2)
    if one["state"] != "done":
        raise CdcbridgeError(f"the backfill {one['state']}: {one['note'] or 'another session ended it'}")
    print_line({"backfill": made, "rows": one["rows"], "messages": one["messages"]})


@click.command()
@click.argument("table")
@click.option(
    "--wait",
    type=DURATION,
    default="30s",
    show_default=True,
    help="The longest time to wait until the log has all changes.",
)
@as_json
@pass_app
def verify(app: App, table: str, wait: float, as_json: bool) -> int:
    """Compare the log with TABLE, and list keys that differ.

    The latest message of each key in the log gives the row as the log knows it.

    It holds a snapshot of the source while it reads. It exits with 2 if anything differs.
    """
    found = verifying.verify(app.config, table, wait)
    if as_json:
        fields = asdict(found)
        del fields["whole"]
        if not found.notes:
            del fields["notes"]
        print_json({**fields, "ok": found.ok})
        return 0 if found.ok else 2
    for note in found.notes:
        say(f"{table}: {note}")
    if found.ok:
        click.echo(f"{table}: all {found.rows} rows match the log")
        return 0
    for what, keys in (
        ("not in the log", found.missing),
        ("in the log, not in the table", found.extra),
        ("different", found.different),
    ):
        if keys:
            more = f" and {len(keys) - verifying.NAMED} more" if len(keys) > verifying.NAMED else ""
            click.echo(f"{what}: {len(keys)}: {', '.join(keys[: verifying.NAMED])}{more}")
    say(f"{table}: {found.rows} rows")
    if found.missing or found.different:
        say(
            f"To get rows that are older than the log, or that changed in a gap, run"
            f" `cdcbridge backfill start {found.whole} {table}`. A consumer with a filter does not get all of them."
        )
    if found.extra:
        _say_extra(found)
    return 2


def _say_extra(found: verifying.Verified) -> None:
    """Explain keys that are in the log but not in the table.

    Their rows were deleted while no slot kept the WAL. No message reports these deletes, and a backfill does not repair
    them, because it reads only rows that exist.
    """
    say(
        "Rows that are in the log but not in the table were deleted in a gap, and copies still have them. A backfill"
        " does not repair that."
    )
    say(f"This statement deletes them from a copy of the table:\n    {found.deletion}")
    if len(found.extra) > verifying.NAMED:
        say(f"These are the first {verifying.NAMED}. `cdcbridge verify {found.table} --json` lists all as `extra`.")
    say(
        'docs/OPERATIONS.md, "Deletes in a gap", explains how to inform every consumer, and how to fix one copy by'
        " hand."
    )


COMMANDS = (backfill, verify)
