"""The guides of the API and the dashboard are followed literally, on another port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.acceptance.test_docs import BLOCK, ROOT
from tests.harness.world import World, clean_environment, eventually

DEFAULT = "127.0.0.1:9188"


@contextmanager
def followed(world: World, page: str) -> Iterator[tuple[str, str]]:
    """Follow a guide, and keep its `serve` until the end of the block: the address, and what the commands wrote."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **clean_environment(),
        "DATABASE_URL": world.dsn,
        "CDCBRIDGE_API__LISTEN": address,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    written, log, server = "", world.folder / "serve.log", None
    try:
        for _, kind, text in BLOCK.findall(page):
            if kind == "yaml":
                (world.folder / "cdcbridge.yaml").write_text(text)
                continue
            for line in text.replace(DEFAULT, address).splitlines():
                if line == "cdcbridge serve":
                    with log.open("w") as err:
                        server = subprocess.Popen(line.split(), cwd=world.folder, env=environment, stderr=err)
                    eventually(lambda: address in log.read_text(), "the API listens")
                    continue
                done = subprocess.run(
                    ["sh", "-c", line], cwd=world.folder, env=environment, capture_output=True, text=True, check=True
                )
                written += done.stdout
        yield address, written
    finally:
        if server is not None:
            server.terminate()
            assert server.wait(30) == 0


def test_the_dashboard_of_the_guide_opens(world18: World) -> None:
    page = (ROOT / "docs" / "DASHBOARD.md").read_text()
    with followed(world18, page) as (address, _):
        answer = httpx.get(f"http://{address}/consumers/billing", trust_env=False, timeout=30)
        assert answer.status_code == 200 and "<h1>billing</h1>" in answer.text


def test_the_guide_ends_with_an_acked_message(world18: World) -> None:
    with followed(world18, (ROOT / "docs" / "API.md").read_text()) as (_, written):
        assert '"duplicate":false' in written and "12.50" in written and '"receipt":"1-1"' in written
        assert '{"acked":1}' in written
        assert '"key":"42"' in written.rpartition("acked")[2] and written.endswith('"next":null}')
