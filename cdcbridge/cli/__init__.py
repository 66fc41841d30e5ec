"""The command line: options, output and exit codes.

Each command has its module in this folder. The work itself is done by the other folders, such as `bridge` and `store`.
Errors never end in a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Final

import click

from cdcbridge import __version__
from cdcbridge.cli.complaints import complain, complain_of_usage
from cdcbridge.cli.context import TEXT, App, say
from cdcbridge.database import server_errors
from cdcbridge.errors import CdcbridgeError, UsageError

_CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# The commands of each module. A module is loaded when one of its commands runs, or when all commands are listed.
_MODULES: Final = {
    "install": ("init", "uninstall"),
    "status": ("status",),
    "bridge": ("demo", "check", "migrate", "run", "decode", "config", "completion"),
    "consumers": ("consumers",),
    "filters": ("filter",),
    "queue": ("receive", "peek", "ack", "nack", "extend", "publish"),
    "stream": ("read", "tail"),
    "dead": ("dead",),
    "offsets": ("offsets",),
    "backfill": ("backfill", "verify"),
    "revert": ("revert",),
    "slot": ("lag", "slot"),
    "sinks": ("sinks",),
    "mirror": ("mirror",),
    "serve": ("serve",),
    "alerts": ("alerts",),
}
# The order in which `cdcbridge --help` lists the commands.
_SECTIONS: Final = {
    "Bridge": (
        "demo",
        "init",
        "check",
        "run",
        "status",
        "lag",
        "consumers",
        "sinks",
        "mirror",
        "alerts",
        "serve",
        "config",
        "migrate",
        "uninstall",
        "completion",
    ),
    "Queues": ("publish", "receive", "ack", "nack", "extend", "peek", "dead"),
    "Streams": ("read", "tail", "offsets"),
    "Repair": ("backfill", "verify", "revert", "filter", "slot", "decode"),
}


class _Commands(click.Group):
    """The group of all commands, each of which is loaded only when it is needed.

    Loading the code of the bridge takes longer than a whole `receive`.
    """

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(name for names in _MODULES.values() for name in names)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = next((module for module, names in _MODULES.items() if cmd_name in names), None)
        if module is not None and cmd_name not in self.commands:
            for command in importlib.import_module(f"cdcbridge.cli.{module}").COMMANDS:
                _take_text(command)
                self.add_command(command)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        limit = formatter.width - 6 - max(len(name) for name in self.list_commands(ctx))
        for section, names in _SECTIONS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(section):
                formatter.write_dl([(name, one.get_short_help_str(limit)) for name, one in found if one], col_max=12)


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="CDCBRIDGE_CONFIG",
    default="cdcbridge.yaml",
    show_default=True,
    help="The configuration file, also set by CDCBRIDGE_CONFIG.",
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


def _take_text(command: click.Command) -> None:
    """Give the text arguments and options of a command, and of its subcommands, the type TEXT.

    That type refuses text that no server accepts.
    """
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = TEXT
    if isinstance(command, click.Group):
        for child in command.commands.values():
            _take_text(child)


_take_text(cli)


class _NoInput(io.RawIOBase):
    """Replacement for a stdin that the shell has closed. Reading from it raises UsageError."""

    def readable(self) -> bool:
        return True

    def readinto(self, _buffer: object) -> int:
        raise UsageError("stdin is closed", hint="Give the values as arguments, or redirect stdin from a file.")


class _Closed(io.TextIOBase):
    """Replacement for a stdout that the shell has closed. Each write raises OSError.

    Therefore a command fails, and does not ack messages that it could not print.
    """

    def write(self, _text: str) -> int:
        raise OSError(errno.EBADF, "stdout is closed")


def _repair_streams() -> None:
    """Replace standard streams that are closed, and print characters that the locale lacks as escapes.

    /dev/null takes the file number of each closed stream. Otherwise the next file to be opened would get that number.
    """
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_NoInput()))
    if sys.stdout is None:
        os.open(os.devnull, os.O_WRONLY)
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the program runs
    for standard in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(standard, io.TextIOWrapper):
            standard.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Redirect stdout to /dev/null after a write has failed.

    Python flushes stdout when it ends, and that would fail again, for example on a full disk.
    """
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the command line. Errors become a message on stderr and an exit code, never a traceback."""
    _repair_streams()
    try:
        with server_errors():
            code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            sys.exit(130)  # the usual exit code of a program that was ended by Ctrl-C
        say("aborted")
        sys.exit(1)
    except click.ClickException as error:
        complain_of_usage(error)
        sys.exit(error.exit_code)
    except CdcbridgeError as error:
        complain(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The process that reads our output has ended, so nothing more can be printed for it.
        sys.stderr.close()
        sys.exit(1)
    except UnicodeError as error:
        say(f"error: a text cannot be read or written: {error}")
        say("hint: cdcbridge reads and writes UTF-8: look at the input, and at LANG and PYTHONIOENCODING.")
        sys.exit(2)
    except OSError as error:
        say(f"error: {error}")
        _give_up_output()
        sys.exit(1)
