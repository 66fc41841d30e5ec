"""`cdcbridge serve`: the HTTP API."""

from __future__ import annotations

import click

from cdcbridge.cli.context import App, pass_app
from cdcbridge.errors import UsageError


@click.command()
@pass_app
def serve(app: App) -> None:
    """Answer the HTTP API.

    It listens on `api.listen`, by default on 127.0.0.1:9188. Any number of these processes may run, on any machine.
    None of them can slow the bridge.


    \b
    Example:
      cdcbridge serve &
      curl -X POST -d '{"wait": 20}' http://127.0.0.1:9188/api/consumers/billing/receive
    """
    try:
        from cdcbridge.web.serve import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cdcbridge"):
            raise
        raise UsageError(
            f"`serve` needs the Python package {error.name}, which is not installed",
            hint="pip install 'cdcbridge[web]'",
        ) from error
    serve(app.config)


COMMANDS = (serve,)
