"""A server as a process that a test starts, kills, pauses and restarts on the same ports and data.

Never listens on any address but 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from tests.harness.world import eventually

PATIENCE = 100.0  # seconds that a start may take where both cores are busy
_numbers = itertools.count()


def free_port() -> int:
    """Return a port that nobody listens on, and that the kernel gives to no outgoing connection.

    A client that keeps calling a stopped server on an ephemeral port would sooner or later connect to itself.
    """
    first = 10_000 + os.getpid() % 220 * 100
    while True:
        port = first + next(_numbers) % 100
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def listening(port: int) -> bool:
    """Return whether a connection to a port of this machine succeeds."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Server(ABC):
    """A server from start() to stop(). In a `with` block it starts at entry, and is removed at exit."""

    name: ClassVar[str]
    # A signal that ends the server in good order.
    ending: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"cdcbridge-{self.name}-"))
        self.log = self.folder / "log"
        self.host = "127.0.0.1"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Write the configuration, and return the command that runs the server in the foreground."""

    @abstractmethod
    def ask(self) -> None:
        """Do what a client does first. Raises any Exception while the server is not ready."""

    def environment(self) -> Mapping[str, str]:
        """Return the variables that the server gets in addition to those of the tests."""
        return {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process knows addresses and users, and cannot stop the server."""
        return {**self.__dict__, "_process": None}

    @property
    def address(self) -> str:
        """For example 127.0.0.1:4222."""
        return f"{self.host}:{self.port}"

    @property
    def running(self) -> subprocess.Popen[bytes]:
        """The process. Raises AssertionError where this object did not start it."""
        assert self._process is not None, f"{self.name} was not started by this object"
        return self._process

    @property
    def megabytes(self) -> int:
        """The resident memory of the server and its children."""
        listed = subprocess.run(["ps", "-o", "rss=", "-g", str(self.running.pid)], capture_output=True, check=False)
        return sum(map(int, listed.stdout.split())) // 1024

    def start(self) -> None:
        """Start the server, and return when it answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start the process without waiting for it."""
        assert self._process is None, f"{self.name} is running"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **self.environment()},
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until a client's first request succeeds."""
        eventually(self._answers, f"{self.name} answers, see {self.log}", PATIENCE)

    def _answers(self) -> bool:
        if self.running.poll() is not None:
            last = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.name} ended with {self.running.returncode}: {last}")
        # Client libraries wait, retry and complain where nobody listens yet.
        if listening(self.port):
            with contextlib.suppress(Exception):
                self.ask()
                return True
        return False

    def stop(self) -> None:
        """Let the server end in good order."""
        self._end(self.ending)

    def kill(self) -> None:
        """End the server with SIGKILL, in the middle of its work."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start the server again on the same ports and data. Stops it first where it runs."""
        if self._process is not None:
            self.stop()
        self.start()

    def pause(self) -> None:
        """Stop the clock of the server: connections stay, and nothing answers."""
        os.killpg(self.running.pid, signal.SIGSTOP)
        eventually(lambda: _stopped(self.running.pid), f"all threads of {self.name} stop")

    def resume(self) -> None:
        """End a pause."""
        os.killpg(self.running.pid, signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        self._signal(how)
        self._signal(signal.SIGCONT)
        try:
            self.running.wait(PATIENCE)
        finally:
            self._signal(signal.SIGKILL)  # children that outlive the first process
            self.running.wait()
            self._process = None
        eventually(lambda: not listening(self.port), f"{self.name} gives its port back")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running.pid, number)

    def remove(self) -> None:
        """Kill the server in any state, and delete its folder."""
        if self._process is not None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


Node = TypeVar("Node", bound=Server)


class Cluster(ABC, Generic[Node]):
    """Servers that know each other. A test kills and pauses single ones by `cluster.nodes[0].kill()`."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)

    @abstractmethod
    def ask(self) -> None:
        """Do what needs a majority. Raises any Exception while the cluster is not ready."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def start(self) -> None:
        """Start all nodes, and return when a majority works together."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait()
        self.wait()

    def wait(self) -> None:
        """Wait until the cluster is whole, for example after a node has come back."""
        eventually(self._answers, f"the nodes work together, see {[str(node.log) for node in self.nodes]}", PATIENCE)

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            self.ask()
            return True
        return False

    def stop(self) -> None:
        """Let all nodes end in good order."""
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        """End all nodes with SIGKILL."""
        for node in self.nodes:
            node.kill()

    def restart(self) -> None:
        """Start all nodes again, those that run and those that were killed."""
        for node in self.nodes:
            if node._process is not None:
                node.stop()
        self.start()

    @property
    def megabytes(self) -> int:
        """The resident memory of all nodes."""
        return sum(node.megabytes for node in self.nodes)

    def remove(self) -> None:
        """Kill all nodes, and delete their folders."""
        for node in self.nodes:
            node.remove()


def _stopped(pid: int) -> bool:
    """Return whether each thread of a process is stopped."""
    try:
        tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False  # a thread ended meanwhile
    return all(task.rpartition(") ")[2].startswith("T") for task in tasks)
