"""`cdcbridge serve`: the HTTP API."""

from __future__ import annotations

import importlib
from typing import Any

import click

from cdcbridge.cli.context import App, pass_app
from cdcbridge.errors import UsageError


def require_web() -> Any:
    """Import the module of the API.

    Raises:
        UsageError: The extra `web` is not installed.
    """
    try:
        return importlib.import_module("cdcbridge.web.serve")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cdcbridge"):
            raise
        raise UsageError(
            f"`serve` needs the Python package {error.name}, which is not installed",
            hint="pip install 'cdcbridge[web]'",
        ) from error


@click.command()
@click.option("--until-stdin-ends", is_flag=True, hidden=True)
@pass_app
def serve(app: App, until_stdin_ends: bool) -> None:
    """Answer the HTTP API.

    It listens on `api.listen`, by default on 127.0.0.1:9188. Any number of these processes may run, on any machine.
    None of them can slow the bridge. `cdcbridge run --serve` starts one together with the bridge.


    \b
    Example:
      cdcbridge serve &
      curl -X POST -d '{"wait": 20}' http://127.0.0.1:9188/api/consumers/billing/receive
    """
    require_web().serve(app.config, until_stdin_ends=until_stdin_ends)


COMMANDS = (serve,)
