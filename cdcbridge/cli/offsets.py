"""`cdcbridge offsets …`: show and move the offsets of a stream consumer's group."""

from __future__ import annotations

import shlex
from typing import Any

import click

from cdcbridge.cli.context import App, as_json, name_argument, pass_app, print_json, print_line, print_table, say
from cdcbridge.cli.where import PLACE, PlaceCommand
from cdcbridge.database.patience import patiently
from cdcbridge.units import human_duration


@click.group()
def offsets() -> None:
    """Show and move the offsets of a stream."""


@offsets.command()
@name_argument
@as_json
@pass_app
def show(app: App, name: str, as_json: bool) -> None:
    """Show the offset and the lag of each partition.

    \b
    OFFSET  the group has finished all messages up to this seq
    LOST    messages that retention dropped before the group had read them;
            the partition is not read until `offsets seek`
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


@offsets.command(cls=PlaceCommand)
@name_argument
@click.argument("target", type=PLACE, metavar="PLACE")
@click.option("--partition", type=click.IntRange(0), help="Move only this partition. Default: all.")
@pass_app
def seek(app: App, name: str, target: str, partition: int | None) -> None:
    """Move the offsets of a stream to PLACE.

    PLACE is earliest, latest, a seq (the next message to read), or a time.

    A time is 2026-05-01 10:00+02, -1h (an hour ago), now, today or yesterday (midnight in UTC). The command prints
    the old and the new offset of each partition, and the time of the message that is read next.

    Leases end: members cannot commit messages that they read before. If a member reads in a transaction that stays
    open, the command retries for 30 s, then names the session and exits with 1.

    \b
    Examples:
      cdcbridge offsets seek audit earliest
      cdcbridge offsets seek audit -1h
      cdcbridge offsets seek audit "2026-05-01 12:00+02" --partition 3
    """
    with app.store(pooled=True) as store:
        rows = patiently(
            store,
            lambda: store.execute(
                "select * from seek_partitions(%s, %s, %s::int)", (name, target, partition)
            ).fetchall(),
            what=f"offsets seek {name}",
            again=f"cdcbridge offsets seek {name} {shlex.quote(target)}",
        )
    for text in _summary(rows):
        say(f"{name}: {text}")
    moved = [dict(zip(("partition", "old_seq", "new_seq", "time"), row, strict=True)) for row in rows]
    print_line({"partitions": len(rows), "moved": moved})


def _summary(rows: list[tuple[Any, ...]]) -> list[str]:
    """Return lines for people about the moved partitions, one for all that continue after the same seq."""
    places: dict[int, list[tuple[Any, ...]]] = {}
    for row in rows:
        places.setdefault(row[2], []).append(row)
    said = []
    for new, group in places.items():
        which = f"partition {group[0][0]} continues" if len(group) == 1 else f"{len(group)} partitions continue"
        first = min((row[3] for row in group if row[3] is not None), default=None)
        what = "no message there yet" if first is None else f"the next message is of {first:%Y-%m-%d %H:%M:%S%z}"
        olds = sorted({row[1] for row in group})
        before = f"{olds[0]}" if len(olds) == 1 else f"{olds[0]} to {olds[-1]}"
        said.append(f"{which} after seq {new} ({what}), before: after seq {before}")
    return said


COMMANDS = (offsets,)
