"""`cdcbridge offsets …`: where a stream consumer's group stands in the log, and moving it."""

from __future__ import annotations

import shlex

import click

from cdcbridge.cli.context import App, as_json, name_argument, pass_app, print_json, print_line, print_table
from cdcbridge.patience import patiently
from cdcbridge.units import human_duration


@click.group()
def offsets() -> None:
    """A stream's offsets: show, seek."""


@offsets.command()
@name_argument
@as_json
@pass_app
def show(app: App, name: str, as_json: bool) -> None:
    """Where the group stands in each partition, and how far behind in messages and time.

    OFFSET: all up to this seq is done. LOST: dropped by retention before the group had read it; until somebody seeks,
    the partition is not read.
    """
    with app.store(pooled=True) as store:
        cursor = store.execute("select * from group_lag(%s)", (name,))
        headings = [column.name for column in cursor.description or ()]
        rows = cursor.fetchall()
    if as_json:
        print_json([dict(zip(headings, row, strict=True)) for row in rows])
        return
    print_table(
        ("PARTITION", "OFFSET", "BEHIND", "OLDEST", "LEASED UNTIL", "LOST"),
        [
            (
                partition,
                seq,
                messages,
                None if seconds is None else human_duration(seconds),
                None if leased_until is None else f"{leased_until:%H:%M:%S}",
                lost,
            )
            for partition, seq, messages, seconds, leased_until, lost, _updated_at in rows
        ],
    )


@offsets.command()
@name_argument
@click.argument("target")
@click.option("--partition", type=click.IntRange(0), help="Only this one; else all.")
@pass_app
def seek(app: App, name: str, target: str, partition: int | None) -> None:
    """Go on from elsewhere: TARGET is earliest, latest, a seq (the next to be read), or a time.

    Leases end: what members read and have not committed is theirs no more. Where a member reads in a transaction that
    stays open, this tries for 30 s, then names the session and exits with 1.

    \b
    Examples:
      cdcbridge offsets seek audit earliest
      cdcbridge offsets seek audit "2026-05-01 12:00+02" --partition 3
    """
    with app.store(pooled=True) as store:
        row = patiently(
            store,
            lambda: store.execute("select seek(%s, %s, %s::int)", (name, target, partition)).fetchone(),
            what=f"offsets seek {name}",
            again=f"cdcbridge offsets seek {name} {shlex.quote(target)}",
        )
    print_line({"partitions": row[0] if row else 0})


COMMANDS = (offsets,)
