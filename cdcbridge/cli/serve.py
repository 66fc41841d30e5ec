"""`cdcbridge serve`: the HTTP API."""

from __future__ import annotations

from importlib.util import find_spec

import click

from cdcbridge.cli.context import App, pass_app
from cdcbridge.errors import UsageError


def require_web() -> None:
    """Raise UsageError if the extra `web` is not installed. Import none of it."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UsageError(
                f"`serve` needs the Python package {package}, which is not installed",
                hint="pip install 'cdcbridge[web]'",
            )


@click.command()
@click.option("--until-stdin-ends", is_flag=True, hidden=True)
@pass_app
def serve(app: App, until_stdin_ends: bool) -> None:
    """Serve the dashboard, the HTTP API and SQS.

    It listens on `api.listen`, by default on 127.0.0.1:9188. Open this address in a browser for the dashboard. Any
    number of these processes may run, on any machine. None of them can slow the bridge. `cdcbridge run --serve`
    starts one together with the bridge. The extra `web` has the packages that it needs.


    \b
    Example:
      cdcbridge serve &
      curl -X POST -d '{"wait": 20}' http://127.0.0.1:9188/api/consumers/billing/receive
    """
    require_web()
    from cdcbridge.web.serve import serve

    serve(app.config, until_stdin_ends=until_stdin_ends)


COMMANDS = (serve,)
