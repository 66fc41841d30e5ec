"""Start another command of cdcbridge together with the bridge, and start it again whenever it ends.

The child has the same configuration file. It ends when its stdin ends, so it also ends if the bridge is killed. Its
work, its memory and its crashes never touch the bridge.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Final

import structlog

from cdcbridge.background import Background
from cdcbridge.config import load
from cdcbridge.errors import ConfigError

_LOOK_EVERY: Final = 1.0  # seconds between two looks at the file while it has no sinks
_LONGEST_RETRY: Final = 10.0  # seconds
_LIVED: Final = 30.0  # seconds after which the waiting times begin anew
_PATIENCE: Final = 40.0  # seconds for the work in progress at the end
log = structlog.get_logger()


class ChildProcess(Background):
    """The thread that supervises the child.

    Args:
        path: The configuration file.
        name: The name of the thread.
        command: The command, for example ["sinks", "run"].
    """

    def __init__(self, path: Path, name: str, command: Sequence[str]) -> None:
        super().__init__(name, patience=_PATIENCE)
        self._path = path
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """Ask the child to end after the work in progress."""
        super().stop()
        if (process := self._process) is not None and process.stdin is not None:
            process.stdin.close()

    def is_wanted(self) -> bool:
        """Return whether there is work for the child."""
        return True

    def _work(self) -> None:
        wait = 0.0
        retry = _LOOK_EVERY
        while not self._stop.wait(wait):
            wait = _LOOK_EVERY
            if not self.is_wanted():
                continue
            began = monotonic()
            code = self._run_child()
            if self._stop.is_set():
                return
            retry = wait = _LOOK_EVERY if monotonic() - began > _LIVED else min(_LONGEST_RETRY, retry * 2)
            log.warning("child.ended", command=" ".join(self._command), exit_code=code, retry_in_seconds=wait)

    def _run_child(self) -> int:
        """Run the child until it ends. Return its exit code."""
        command = [sys.executable, "-m", "cdcbridge", "-c", str(self._path), *self._command, "--until-stdin-ends"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            self._process = process
            if self._stop.is_set() and process.stdin is not None:
                process.stdin.close()
            log.info("child.started", command=" ".join(self._command), pid=process.pid)
            return process.wait()


class MirrorSupervisor(ChildProcess):
    """The thread that supervises the process of the mirrors, as long as the file has any.

    Args:
        path: The configuration file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "mirrors", ["mirror", "run"])

    def is_wanted(self) -> bool:
        try:
            return bool(load(self._path).mirrors)
        except (ConfigError, OSError):
            return False  # the bridge reports it


class SinkSupervisor(ChildProcess):
    """The thread that supervises the process of the sinks, as long as the file has any.

    Args:
        path: The configuration file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "sinks", ["sinks", "run"])

    def is_wanted(self) -> bool:
        try:
            return any(consumer.sink is not None for consumer in load(self._path).consumers)
        except (ConfigError, OSError):
            return False  # the bridge reports it
