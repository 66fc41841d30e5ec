"""One server of a kind for all processes of a test run.

The first process that asks starts a keeper. The keeper starts the server, writes a copy of the object that describes it,
and removes the server when the run ends, however it ends. Never stops a server that a test uses.

python -m tests.harness.brokers.shared NAME FOLDER PROCESS: keep a server until a process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from tests.harness.brokers.kafka import Kafka, KafkaCluster
from tests.harness.brokers.mosquitto import Mosquitto
from tests.harness.brokers.nats import Nats, NatsCluster
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.harness.brokers.redis import Redis
from tests.harness.brokers.server import Cluster, Server
from tests.harness.brokers.sqs import Ministack, Moto
from tests.harness.world import eventually

AnyServer: TypeAlias = Server | Cluster[Any]
KINDS: Final[Mapping[str, Callable[[], AnyServer]]] = {
    "mosquitto": Mosquitto,
    "nats": Nats,
    "nats_cluster": NatsCluster,
    "redis": Redis,
    "rabbitmq": RabbitMQ,
    "kafka": Kafka,
    "kafka_cluster": KafkaCluster,
    "moto": Moto,
    "ministack": Ministack,
}
PATIENCE = 110.0  # seconds until the server of another process answers


def run_process() -> int:
    """Return the process that lives as long as the run: pytest, or the one that started this worker of pytest-xdist."""
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


def shared(name: str) -> Any:
    """Return the run's server of a kind. It cannot be stopped, and other tests use it at the same time."""
    run = run_process()
    folder = Path(tempfile.gettempdir()) / f"cdcbridge-run-{run}-{_started(run)}"
    folder.mkdir(exist_ok=True)
    described = folder / f"{name}.pickle"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not described.exists():
            _start_keeper(name, folder, run)
        loaded: AnyServer = pickle.loads(described.read_bytes())
    return loaded


def _started(process: int) -> str:
    """Return when a process started, in ticks: with its number it names the process for ever."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


def _start_keeper(name: str, folder: Path, run: int) -> None:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.brokers.shared", name, str(folder), str(run)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=Path(__file__).parents[3],
            start_new_session=True,
        )
    eventually(
        lambda: (folder / f"{name}.pickle").exists() or keeper.poll() is not None, f"{name}, see {log}", PATIENCE
    )
    assert keeper.poll() is None, log.read_text()
    keeper.returncode = 0  # it outlives this process, and that is no mistake to warn of


def keep(name: str, folder: Path, run: int) -> None:
    """Run a server until a process has ended."""
    ended = os.pidfd_open(run)
    described = folder / f"{name}.pickle"
    with KINDS[name]() as server:
        unfinished = described.with_suffix(".part")
        unfinished.write_bytes(pickle.dumps(server))
        unfinished.rename(described)
        select.select([ended], [], [])
    for file in (described, folder / f"{name}.lock", folder / f"{name}.log"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another keeper is not ready yet, and removes it
        folder.rmdir()


if __name__ == "__main__":
    keep(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
