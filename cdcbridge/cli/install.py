"""Commands for the first day and for the last day: init, uninstall."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cdcbridge.cli import starter
from cdcbridge.cli import uninstall as uninstalling
from cdcbridge.cli.context import App, pass_app, say
from cdcbridge.errors import UsageError


@click.command()
@click.argument("file", required=False, metavar="[FILE]")
@click.option("--dsn", help="The database. Default: the environment variable DATABASE_URL.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@pass_app
def init(app: App, file: str | None, dsn: str | None, force: bool) -> None:
    """Write a configuration file for the tables of a database.

    Without FILE it writes the file of `-c`. With `-` it prints the text. Comments explain each part. A table that
    cannot be captured yet is named in a comment, with its fix. The command changes nothing in the database.

    \b
    Examples:
      DATABASE_URL=postgresql://app@db/shop cdcbridge init && cdcbridge run
      cdcbridge init --dsn postgresql://app@db/shop -
    """
    printed = file == "-"
    path = app.path if file is None else Path(file)
    if not printed and path.exists() and not force:
        raise UsageError(
            f"{path} already exists", hint="`--force` replaces it. `cdcbridge init -` prints the text instead."
        )
    given = dsn or os.environ.get(starter.VARIABLE)
    if not given:
        raise UsageError(
            f"no database is named: neither --dsn nor the environment variable {starter.VARIABLE}",
            hint="cdcbridge init --dsn postgresql://user@host/database",
        )
    variable = f"${{{starter.VARIABLE}}}"
    literal = given != os.environ.get(starter.VARIABLE) and "${" not in given
    made = starter.make(given, given if literal else variable)
    if printed:
        click.echo(made.text.encode(), nl=False)
    else:
        _write(path, made.text, private=literal)
        click.echo(f"{path}: {_count(len(made.taken), 'table')}")
        if not literal and dsn and dsn != os.environ.get(starter.VARIABLE):
            say(f"warning: set {starter.VARIABLE} to the connection string: a file cannot have one with ${{")
    _tell(path, made, printed=printed)


def _write(path: Path, text: str, *, private: bool) -> None:
    """Write the file, so that it has its old text or the new one, and never a part of it.

    If `private`, only the owner may read the file, because it may contain a password.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666), "wb") as new:
            new.write(text.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _tell(path: Path, made: starter.Starter, *, printed: bool) -> None:
    for left in made.left:
        say(f"left out: {left.name}: {left.reason}")
    for problem in made.problems:
        say(f"{problem.severity}: {problem.object}: {problem.message}")
        say(f"    fix: {problem.brief}")
    if printed:
        return
    option = "" if path == Path("cdcbridge.yaml") else f" -c {path}"
    errors = any(problem.severity == "error" for problem in made.problems)
    say(f"next: cdcbridge{option} {'check, after the fixes above' if errors else 'run'}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def uninstall(app: App, yes: bool) -> int:
    """Remove cdcbridge from the source and the store.

    It prints what it will remove: the slot, the publications, the event trigger, replica identities that the trigger
    set, and the store's schema with all messages. It refuses while a bridge is running. Objects that others use stay.
    """
    with uninstalling.planned(app.config) as plan:
        for kept in plan.kept:
            say(f"kept: {kept}")
        if not plan.items:
            click.echo("nothing to remove")
            return 0
        for item in plan.items:
            click.echo(f"would be removed: {item.what}")
        if not yes:
            click.confirm("Remove all this for good?", abort=True, err=True)
        failed = uninstalling.remove(plan, lambda what: click.echo(f"removed: {what}"))
    for what, error in failed:
        say(f"not removed: {what}: {error}")
        if error.hint:
            say(f"    hint: {error.hint}")
    if not failed:
        say(f"{app.path} was not removed. Delete it yourself.")
    return 1 if failed else 0


COMMANDS = (init, uninstall)
