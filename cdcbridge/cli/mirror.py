"""`cdcbridge mirror …`: apply changes to other databases, and look at these mirrors."""

from __future__ import annotations

import click

from cdcbridge.cli.context import App, pass_app
from cdcbridge.config import load
from cdcbridge.mirrors.process import MirrorProcess, mirrors_of


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


COMMANDS = (mirror,)
