"""The command line in a forked process: as fast as a call, with streams and an encoding of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.program import TRACEBACK, run_here

CLOSED = "closed"
FULL = "full"
LEFT = "left"  # a pipe whose reader has gone, as after `| head -1`


class Result(NamedTuple):
    """How it ended, and what it wrote."""

    code: int
    out: bytes
    err: bytes


def command(arguments: Sequence[str], *, stdin: bytes | str = b"", stdout: str = "", encoding: str = "utf-8") -> Result:
    """Run the program with these arguments. `stdin`: its bytes, or CLOSED; `stdout`: CLOSED, FULL, LEFT or read."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if isinstance(stdin, bytes):
            given.write(stdin)
            given.seek(0)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(arguments, given.fileno(), out.fileno(), err.fileno(), stdin, stdout, encoding))
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return Result(os.waitstatus_to_exitcode(status), out.read(), err.read())


def _child(
    arguments: Sequence[str], given: int, out: int, err: int, stdin: bytes | str, stdout: str, encoding: str
) -> int:
    if stdout == FULL:
        out = os.open("/dev/full", os.O_WRONLY)
    elif stdout == LEFT:
        reader, out = os.pipe()
        os.close(reader)
    for number, file in ((0, given), (1, out), (2, err)):
        os.dup2(file, number)
    closed = [name for name, how in (("stdin", stdin), ("stdout", stdout)) if how == CLOSED]
    return run_here(arguments, encoding, closed)


def program(
    folder: Path, *arguments: str, stdin: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in this folder, with these variables more, as World.run_program() gives it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        result = command(arguments, stdin=stdin.encode())
    assert result.code != TRACEBACK, result.err.decode()
    return subprocess.CompletedProcess(list(arguments), result.code, result.out.decode(), result.err.decode())
