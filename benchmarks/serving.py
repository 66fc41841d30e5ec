"""Run `cdcbridge serve` for the benchmarks of the web."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.common import workspace
from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.brokers.server import free_port, listening

PATIENCE: Final = 60.0  # seconds


@contextmanager
def serving(server: EmbeddedServer, name: str, consumers: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Migrate a store, run `serve` on it, and return the port.

    Args:
        server: The PostgreSQL server.
        name: The name of the store's database.
        consumers: The consumers as in a configuration file.
    """
    port = free_port()
    with workspace() as folder:
        path = Path(folder) / "cdcbridge.yaml"
        document = {
            "source": {"dsn": server.dsn(name, tcp=True), "slot": name},
            "log": {"level": "warning"},
            "consumers": consumers,
            "api": {
                "listen": f"127.0.0.1:{port}",
                "tokens": [{"name": "t", "token": "t", "role": "admin"}],
                "sqs": {"access_keys": [{"id": "testing", "secret": "testing", "token": "t"}]},
            },
        }
        path.write_text(yaml.safe_dump(document))
        command = [sys.executable, "-m", "cdcbridge", "-c", str(path)]
        for part in ("migrate", "consumers apply"):
            subprocess.run([*command, *part.split()], check=True, capture_output=True)
        process = subprocess.Popen([*command, "serve"])
        try:
            deadline = time.monotonic() + PATIENCE
            while not listening(port):
                if time.monotonic() > deadline:
                    raise TimeoutError("`serve` does not listen")
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            process.wait()
