"""`cdcbridge mirror conflicts …`: list the conflicts that mirrors decided or hold, and choose the other row."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import Any

import click
import orjson

from cdcbridge.cli.context import App, TextType, as_json, pass_app, print_json, print_table, say
from cdcbridge.cli.screen import facts
from cdcbridge.config import Config, Mirror
from cdcbridge.errors import CdcbridgeError, UsageError
from cdcbridge.mirrors.process import mirrors_of
from cdcbridge.mirrors.row_texts import differing
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.stored_conflicts import StoredConflict, flip, open_target, stored_conflict, stored_conflicts
from cdcbridge.routing.logical_messages import members

_WHEN = "%Y-%m-%d %H:%M:%S%z"
mirror_option = click.option("--mirror", "name", type=TextType(), help="The mirror. Needed if the file has several.")


@click.group()
def conflicts() -> None:
    """List conflicts, and choose the row that lost."""


@conflicts.command("list")
@click.option("--mirror", "name", type=TextType(), help="Only the conflicts of this mirror.")
@click.option("--held", is_flag=True, help="Only those that wait for a decision.")
@click.option("--table", type=TextType(), help="Only those of this table.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The most to show of a mirror.")
@as_json
@pass_app
def list_command(app: App, name: str | None, held: bool, table: str | None, limit: int, as_json: bool) -> int:
    """Show the conflicts that mirrors have found, the newest first.

    They are in the targets of the mirrors. A target that cannot be reached is reported, and the exit code is then 1.
    """
    found: list[StoredConflict] = []
    failed = False
    for mirror in mirrors_of(app.config, () if name is None else (name,)).values():
        try:
            with closing(open_target(mirror)) as target:
                found += stored_conflicts(target, mirror, held=held, table=table, limit=limit)
        except CdcbridgeError as error:
            say(f"{mirror.name}: {error}")
            failed = True
    found.sort(key=lambda one: one.at, reverse=True)
    if as_json:
        print_json([_document(one) for one in found])
    else:
        print_table(
            ("ID", "MIRROR", "AT", "TABLE", "KEY", "KIND", "RULE", "WINNER", "STATE"),
            [
                (o.id, o.mirror, o.at.strftime(_WHEN), o.table_name, o.key, o.kind, o.rule, o.winner or "-", o.state)
                for o in found
            ],
            empty="" if failed else "no conflicts",
        )
    return 1 if failed else 0


@conflicts.command()
@click.argument("number", metavar="ID", type=int)
@mirror_option
@as_json
@pass_app
def show(app: App, number: int, name: str | None, as_json: bool) -> None:
    """Show both rows of a conflict, column by column.

    Columns that differ have an asterisk.
    """
    mirror = _one(app.config, name)
    with closing(open_target(mirror)) as target:
        found = stored_conflict(target, mirror, number)
    if as_json:
        print_json(_document(found))
        return
    facts(_facts(found))
    click.echo()
    print_table(("", "COLUMN", "SOURCE", "TARGET"), _diff(found))


@conflicts.command("flip")
@click.argument("number", metavar="ID", type=int)
@mirror_option
@click.option("--force", is_flag=True, help="Also if the row has changed since the conflict.")
@as_json
@pass_app
def flip_command(app: App, number: int, name: str | None, force: bool, as_json: bool) -> None:
    """Write the losing row into the target, as a new change.

    For a conflict on hold, that is the source's row. If the losing side had deleted the row, it is deleted. With
    `two_way`, the change is mirrored to the other side.


    It refuses if the row has changed since the conflict.

    \b
    Examples:
      cdcbridge mirror conflicts flip 17
      cdcbridge mirror conflicts flip 17 --mirror to_b --force
    """
    mirror = _one(app.config, name)
    with closing(open_target(mirror)) as target, closing(SourceTables(app.config.source_dsn)) as source:
        conflict = stored_conflict(target, mirror, number)
        done = flip(target, source, mirror, number, force=force)
    with app.store() as store:
        store.execute(
            "update mirrors m set held = %s from consumers c where c.id = m.consumer_id and c.name = %s",
            (min(done.held, 1000), mirror.name),
        )
    if as_json:
        document = {"flipped": number, "mirror": mirror.name, "table": conflict.table_name, "key": conflict.key}
        print_json({**document, "did": done.did, "before": _parsed(done.before), "row": _parsed(done.row)})
        return
    click.echo(f"{done.did} {conflict.table_name} {conflict.key}: {done.row or 'no row'}")
    say(f"before: {done.before or 'no row'}")
    if mirror.two_way is None:
        say("The mirror has one direction, so the source keeps its row.")


def _one(config: Config, name: str | None) -> Mirror:
    """Return the mirror with this name, or the only one of the file.

    Raises:
        UsageError: The file has several, and no name is given.
    """
    found = mirrors_of(config, () if name is None else (name,))
    if len(found) > 1:
        raise UsageError(f"{config.path} has several mirrors: {', '.join(sorted(found))}", hint="Add --mirror NAME.")
    return next(iter(found.values()))


def _parsed(row: str | None) -> Any:
    return None if row is None else orjson.Fragment(row)


def _document(one: StoredConflict) -> dict[str, Any]:
    rows = {"source_row": _parsed(one.source_row), "target_row": _parsed(one.target_row)}
    return {**asdict(one), **rows, "differing": _differing(one)}


def _differing(one: StoredConflict) -> list[str]:
    if one.source_row is None or one.target_row is None:
        return []
    known = dict(members(one.source_row)).keys() & dict(members(one.target_row)).keys()
    return [name for name in differing(one.source_row, one.target_row) if name in known]


def _facts(one: StoredConflict) -> list[tuple[str, str]]:
    position = one.target_position or "not known"
    rows = [
        ("conflict", f"{one.id} of the mirror {one.mirror}, {one.at:{_WHEN}}"),
        ("row", f"{one.table_name} {one.key}"),
        ("kind", one.kind),
        ("rule", f"{one.rule}, winner: {one.winner or 'nobody yet'}, state: {one.state}"),
        ("source", f"{one.source_position}{'' if one.source_row else ', deleted the row'}"),
        ("target", f"{position}{'' if one.target_row else ', had no row'}"),
    ]
    return [*rows, ("note", one.note)] if one.note else rows


def _diff(one: StoredConflict) -> list[tuple[str, str, str, str]]:
    """Return a row for each column: a mark if its values differ, its name, and both values."""
    source, target = (dict(members(row)) if row else {} for row in (one.source_row, one.target_row))
    marked = set(_differing(one))
    return [
        ("*" if name in marked else "", name, source.get(name, "-"), target.get(name, "-"))
        for name in {**target, **source}
    ]
