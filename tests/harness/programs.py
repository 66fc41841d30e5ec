"""`cdcbridge` in processes forked from a server that has loaded it: each saves the half second of a start of Python.

They are processes of their own in all else: arguments, environment, folder, streams, signals, exit codes. The server has
one thread, unlike the process of the tests, whose threads may hold a lock at the moment of a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from cdcbridge.instants import AnyInstant
from tests.harness.program import run

_server: Final = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.harness.program"])


class Program:
    """A running command, with the names of subprocess.Popen.

    crash: the instant to die at, and the how manieth time. See tests.harness.crash.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdin: str = os.devnull,
        stdout: str = os.devnull,
        stderr: str,
        crash: tuple[AnyInstant, int] | None = None,
    ) -> None:
        given = (list(arguments), dict(environment), str(Path.cwd()), (stdin, stdout, stderr), crash)
        self._process = _server.Process(target=run, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return how it ended, negative after a signal, or None."""
        if self.returncode is None and self._process.exitcode is not None:
            self.returncode = self._process.exitcode
            self._process.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return how it ended. Raises TimeoutExpired."""
        if self.returncode is None:
            self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("cdcbridge", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def complete(
    arguments: Sequence[str], environment: Mapping[str, str], *, stdin: bytes = b"", timeout: float
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, as subprocess.run() does. Raises TimeoutExpired."""
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.NamedTemporaryFile()) for _ in range(3))
        given.write(stdin)
        given.flush()
        program = Program(arguments, environment, stdin=given.name, stdout=out.name, stderr=err.name)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())
