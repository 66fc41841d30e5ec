"""`cdcbridge mirror verify`: compare the tables of a mirror on both sides, and repair the rows that differ."""

from __future__ import annotations

from typing import Any, Final

import click
import orjson

from cdcbridge.cli.context import DURATION, App, TextType, as_json, name_argument, pass_app, print_json, say
from cdcbridge.mirrors.compare import Compared, RowDifference
from cdcbridge.mirrors.process import mirrors_of
from cdcbridge.mirrors.repair import Side
from cdcbridge.mirrors.verify import verify as compare
from cdcbridge.words import one_line

_NAMED: Final = 20  # keys of a table that are listed for people
_WORDS: Final = {"missing": "not in the target", "extra": "not in the source", "different": "different"}


@click.command()
@name_argument
@click.option("--table", type=TextType(), help="Only this table of the source.")
@click.option(
    "--repair",
    type=click.Choice(["source", "target"]),
    help="Make the other side equal to this one: insert, update and delete rows there.",
)
@click.option(
    "--wait",
    type=DURATION,
    default="30s",
    show_default=True,
    help="The longest time to wait until the mirror has applied everything.",
)
@click.option(
    "--pause", type=DURATION, default="2s", show_default=True, help="The shortest time between the two looks at a row."
)
@as_json
@pass_app
def verify(
    app: App, name: str, table: str | None, repair: Side | None, wait: float, pause: float, as_json: bool
) -> int:
    """Compare the tables of both sides, and list keys that differ.

    Both sides may be written to meanwhile. A row is listed if it differs at two looks, and nobody wrote it in between.


    `--repair source` changes the target: rows that only the target has are deleted. `--repair target` changes the
    source in the same way. Run without `--repair` first. Rows with a conflict on hold are left alone: `mirror conflicts
    flip` decides about them. Exits with 2 if a row differs at the end.

    \b
    Examples:
      cdcbridge mirror verify to_b
      cdcbridge mirror verify to_b --table public.orders --repair source
    """
    mirror = mirrors_of(app.config, (name,))[name]
    found = compare(app.config, mirror, table, wait=wait, pause=pause, right=repair)
    if as_json:
        tables = [_document(one) for one in found.tables]
        print_json({"mirror": name, "ok": found.ok, "notes": found.notes, "tables": tables})
    else:
        for note in found.notes:
            say(note)
        for one in found.tables:
            _print(one, repaired=repair is not None)
        if not found.tables:
            say(f"the source has no table that {name} takes")
    return 0 if found.ok else 2


def _document(one: Compared) -> dict[str, Any]:
    kinds = {kind: [d.key for d in one.differences if d.kind == kind] for kind in ("missing", "extra", "different")}
    details = [
        {
            "key": d.key,
            "kind": d.kind,
            "columns": d.columns,
            "held": d.held,
            "source": None if d.seen.source is None else orjson.Fragment(d.seen.source),
            "target": None if d.seen.target is None else orjson.Fragment(d.seen.target),
        }
        for d in one.differences
    ]
    counts = {"rows": one.rows, "moving": one.moving, "repaired": one.fixed}
    said = {"notes": one.notes, "fault": one.fault, "ok": one.ok}
    return {"table": one.table, "target": one.target, **counts, **kinds, "differences": details, **said}


def _print(one: Compared, *, repaired: bool) -> None:
    name = one.table if one.table == one.target else f"{one.table} and {one.target}"
    for note in one.notes:
        say(f"{one.table}: {note}")
    if one.fault is not None:
        click.echo(f"{name}: {one.fault}")
        return
    if not one.differences and not (one.notes and not one.rows):
        click.echo(f"{name}: all {one.rows} rows match")
    for kind, words in _WORDS.items():
        found = [d for d in one.differences if d.kind == kind]
        if found:
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            click.echo(f"{name}: {words}: {len(found)}: {', '.join(map(_named, found[:_NAMED]))}{more}")
    if repaired and one.differences:
        click.echo(f"{name}: {one.fixed} of {len(one.differences)} rows repaired")
    if one.moving:
        say(f"{one.table}: {one.moving} rows differed and are being written, so they are not listed")


def _named(one: RowDifference) -> str:
    """Return the key of a row, with the columns that differ, for example `5 (name, price)`."""
    said = [*one.columns, *(["on hold"] if one.held else [])]
    return f"{one_line(one.key)} ({', '.join(said)})" if said else one_line(one.key)
