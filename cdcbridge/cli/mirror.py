"""`cdcbridge mirror …`: apply changes to other databases, and look at these mirrors."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from cdcbridge.cli.context import App, as_json, name_argument, pass_app, print_json, print_line
from cdcbridge.cli.mirror_conflicts import conflicts
from cdcbridge.cli.mirror_verify import verify
from cdcbridge.cli.mirror_words import mirror_facts, print_mirrors
from cdcbridge.cli.screen import facts
from cdcbridge.config import Mirror, load
from cdcbridge.errors import CdcbridgeError, UsageError
from cdcbridge.mirrors.process import MirrorProcess, mirrors_of
from cdcbridge.mirrors.stored_conflicts import open_target, stored_place
from cdcbridge.observe.consumer_lag import consumer_lags
from cdcbridge.observe.mirrors import mirror_lags


@click.group()
def mirror() -> None:
    """Apply changes to other PostgreSQL databases."""


@mirror.command()
@click.argument("names", nargs=-1)
@click.option("--until-stdin-ends", is_flag=True, hidden=True)
@pass_app
def run(app: App, names: tuple[str, ...], until_stdin_ends: bool) -> None:
    """Apply the mirrors of the file.

    `cdcbridge run` does the same in a process of its own, unless it is started with `--no-mirrors`. A mirror is applied
    by one process at a time. A second one waits until the first one has ended.


    \b
    Examples:
      cdcbridge mirror run             all mirrors
      cdcbridge mirror run to_b        only this one
    """
    mirrors_of(app.config, names)
    MirrorProcess(app.config, lambda: load(app.path), names).run(until_stdin_ends=until_stdin_ends)


@mirror.command("list")
@as_json
@pass_app
def list_command(app: App, as_json: bool) -> None:
    """Show the target, state and counters of each mirror.

    \b
    BEHIND        messages that are not applied yet
    LAG           the age of the oldest of these
    TRANSACTIONS  transactions of the target that applied changes
    CONFLICTS     conflicts since the mirror began
    HELD          conflicts that wait for a decision
    """
    with app.store() as store:
        found = mirror_lags(store, app.config, consumer_lags(store))
    if as_json:
        print_json([one.as_json() for one in found])
        return
    print_mirrors(found, empty=f"{app.path} has no mirrors")


@mirror.command()
@name_argument
@as_json
@pass_app
def show(app: App, name: str, as_json: bool) -> None:
    """Show the state, rules, tables and places of one mirror.

    The target's place is a seq of the source's log. The target has everything up to it.
    """
    settings = mirrors_of(app.config, (name,))[name]
    with app.store() as store:
        (found,) = [one for one in mirror_lags(store, app.config, consumer_lags(store)) if one.name == name]
    document = {**found.as_json(), "settings": _settings(settings), "place": _place(settings)}
    if as_json:
        print_json(document)
    else:
        facts(mirror_facts(found, settings, document["place"]))


def _settings(mirror: Mirror) -> dict[str, Any]:
    """Return the settings as the file has them, with the defaults and without secrets."""
    shown = mirror.model_dump(mode="json", by_alias=True, exclude={"name"})
    shown["target"] = {"schema": mirror.target.schema_}
    return shown


def _place(mirror: Mirror) -> dict[str, Any]:
    """Return the place that the target has, or the reason why it cannot be read."""
    try:
        with closing(open_target(mirror)) as target:
            place = stored_place(target, mirror)
    except CdcbridgeError as error:
        return {"error": str(error)}
    return {} if place is None else {"seq": place[0], "commit_lsn": place[1], "updated_at": place[2].isoformat()}


@mirror.command()
@name_argument
@pass_app
def pause(app: App, name: str) -> None:
    """Apply nothing more to the target, until `resume`.

    The log keeps the messages for the mirror. It stops within about a second.
    """
    _change(app, name, "update consumers set paused = true, updated_at = now() where name = %s returning id")
    print_line({"paused": name})


@mirror.command()
@name_argument
@pass_app
def resume(app: App, name: str) -> None:
    """Apply the messages of a paused or stopped mirror again.

    A mirror that has stopped begins again at the change at which it stopped. If the reason is still there, it stops
    again.
    """
    _change(
        app,
        name,
        "with c as (update consumers set paused = false, updated_at = now() where name = %s returning id),"
        " m as (update mirrors m set stopped = null, hint = null, stopped_at = null, error = null, error_at = null"
        " from c where m.consumer_id = c.id) select id from c",
    )
    print_line({"resumed": name})


def _change(app: App, name: str, statement: str) -> None:
    mirrors_of(app.config, (name,))
    with app.store() as store:
        row = store.execute(statement.encode(), (name,)).fetchone()
    if row is None:
        raise UsageError(f"the store has no mirror {name!r} yet", hint="`cdcbridge run` adds it.")


mirror.add_command(conflicts)
mirror.add_command(verify)
COMMANDS = (mirror,)
