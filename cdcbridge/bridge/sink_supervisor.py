"""Start the process of the sinks together with the bridge, and start it again whenever it ends.

The process is `cdcbridge sinks run` with the same configuration file. It ends when its stdin ends, so it also ends if
the bridge is killed. Never delivers a message itself.
"""

from __future__ import annotations

import subprocess
import sys
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
_PATIENCE: Final = 40.0  # seconds for the batches in progress at the end
log = structlog.get_logger()


class SinkSupervisor(Background):
    """The thread that supervises the process of the sinks.

    Args:
        path: The configuration file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("sinks", patience=_PATIENCE)
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """Ask the process to end after the batches in progress."""
        super().stop()
        if (process := self._process) is not None and process.stdin is not None:
            process.stdin.close()

    def _work(self) -> None:
        wait = 0.0
        retry = _LOOK_EVERY
        while not self._stop.wait(wait):
            wait = _LOOK_EVERY
            if not self._has_sinks():
                continue
            began = monotonic()
            code = self._deliver()
            if self._stop.is_set():
                return
            retry = wait = _LOOK_EVERY if monotonic() - began > _LIVED else min(_LONGEST_RETRY, retry * 2)
            log.warning("sinks.ended", exit_code=code, retry_in_seconds=wait)

    def _has_sinks(self) -> bool:
        try:
            return any(consumer.sink is not None for consumer in load(self._path).consumers)
        except (ConfigError, OSError):
            return False  # the bridge reports it

    def _deliver(self) -> int:
        """Run the process until it ends. Return its exit code."""
        command = [sys.executable, "-m", "cdcbridge", "-c", str(self._path), "sinks", "run", "--until-stdin-ends"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            self._process = process
            if self._stop.is_set() and process.stdin is not None:
                process.stdin.close()
            log.info("sinks.process", pid=process.pid)
            return process.wait()
