"""Run `cdcbridge` in the process that calls, which was forked for this and ends with it.

Loads the modules of all commands and sinks when it is imported, so that no forked process has to.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Sequence

import click

import cdcbridge.sinks
from cdcbridge.cli import cli, main
from cdcbridge.database import patience
from cdcbridge.instants import AnyInstant
from tests.harness import crash

PATIENCE = "TEST_PATIENCE"  # a variable: the seconds for which a command tries to get a lock
TRACEBACK = 99  # the exit code where Python would print a traceback
_context = click.Context(cli)
for _name in cli.list_commands(_context):
    cli.get_command(_context, _name)
for _module in pkgutil.walk_packages(cdcbridge.sinks.__path__, "cdcbridge.sinks."):
    importlib.import_module(_module.name)
gc.freeze()  # a forked process shares these objects for as long as nobody touches them


def run(
    arguments: Sequence[str],
    environment: dict[str, str],
    folder: str,
    streams: tuple[str, str, str],
    instant: tuple[AnyInstant, int] | None,
) -> None:
    """Run the program and end the process. streams: the files that become stdin, stdout and stderr."""
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(folder)
    for number, name in enumerate(streams):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if given := os.environ.pop(PATIENCE, None):
        patience.PATIENCE = float(given)  # type: ignore[misc]
    if instant is not None:
        crash.die_at(*instant)
    os._exit(run_here(arguments))


def run_here(arguments: Sequence[str], encoding: str = "utf-8", closed: Sequence[str] = ()) -> int:
    """Run the program on this process's stdin, stdout and stderr, and return its exit code.

    closed: those of "stdin" and "stdout" that a shell has closed.
    """
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding)
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)), encoding, line_buffering=True)
    for number, name in enumerate(("stdin", "stdout")):
        if name in closed:
            os.close(number)
            setattr(sys, name, None)  # as Python does
    sys.argv = ["cdcbridge", *arguments]
    code = TRACEBACK
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    return _flushed(code)


def _flushed(code: int) -> int:
    """As Python does at its end: a stream that cannot be flushed then is told, and another exit code."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        os.write(2, b"Exception ignored: a stream could not be flushed")
        return 120
    return code
