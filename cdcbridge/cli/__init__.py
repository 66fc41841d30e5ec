"""The command line: options, output and exit codes. What the commands do is in the modules below."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Final

import click

from cdcbridge import __version__
from cdcbridge.cli import backfill, bridge, consumers, dead, offsets, queue, slot
from cdcbridge.cli.context import App, say
from cdcbridge.errors import CdcbridgeError

_CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_CONTEXT)
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="CDCBRIDGE_CONFIG",
    default="cdcbridge.yaml",
    show_default=True,
    help="The configuration file; also CDCBRIDGE_CONFIG.",
)
@click.version_option(__version__, prog_name="cdcbridge")
@click.pass_context
def cli(context: click.Context, path: Path) -> None:
    """Turn PostgreSQL's own WAL into durable queues and streams, with PostgreSQL alone.

    \b
    First steps:
      cdcbridge demo                       see it work, no database needed
      cdcbridge -c cdcbridge.yaml check    what is missing, each with its fix
      cdcbridge -c cdcbridge.yaml run      the bridge
      cdcbridge receive billing --wait 20  read a consumer's queue

    Exit codes: 0 ok; 1 failed, a retry may help; 2 usage, configuration or a failed check; 3 an operator is needed.
    """
    context.obj = App(path)


for group in (bridge, consumers, queue, dead, offsets, backfill, slot):
    for command in group.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Entry point: errors become a message on stderr and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what people read, in a locale that lacks a character
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        say("aborted")
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CdcbridgeError as error:
        say(f"error: {error}")
        if error.hint:
            say(f"hint: {error.hint}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output left; nothing can be told to it any more.
        sys.stderr.close()
        sys.exit(1)
