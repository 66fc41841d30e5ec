"""The guide of the API is followed literally, on another port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.acceptance.test_docs import BLOCK, ROOT
from tests.harness.world import World, clean_environment, eventually

DEFAULT = "127.0.0.1:9188"


def test_the_guide_ends_with_an_acked_message(world18: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **clean_environment(),
        "DATABASE_URL": world18.dsn,
        "CDCBRIDGE_API__LISTEN": address,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    written, log, server = "", world18.folder / "serve.log", None
    try:
        for _, kind, text in BLOCK.findall((ROOT / "docs" / "API.md").read_text()):
            if kind == "yaml":
                (world18.folder / "cdcbridge.yaml").write_text(text)
                continue
            for line in text.replace(DEFAULT, address).splitlines():
                if line == "cdcbridge serve":
                    with log.open("w") as err:
                        server = subprocess.Popen(line.split(), cwd=world18.folder, env=environment, stderr=err)
                    eventually(lambda: address in log.read_text(), "the API listens")
                    continue
                done = subprocess.run(
                    ["sh", "-c", line], cwd=world18.folder, env=environment, capture_output=True, text=True, check=True
                )
                written += done.stdout
        assert '"duplicate":false' in written and "12.50" in written and '"receipt":"1-1"' in written
        assert '{"acked":1}' in written
        assert '"key":"42"' in written.rpartition("acked")[2] and written.endswith('"next":null}')
    finally:
        if server is not None:
            server.terminate()
            assert server.wait(30) == 0
