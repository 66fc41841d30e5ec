"""The guide of the SQS endpoint is followed literally, in its three languages and on another port."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from tests.acceptance.test_docs import BLOCK, ROOT
from tests.harness.world import World, clean_environment, eventually

DEFAULT = "127.0.0.1:9188"
NODE = Path(__file__).parent / "node" / "node_modules"
AWS = Path(sys.prefix) / "aws-cli"


def test_the_guide_ends_with_deleted_messages_in_three_languages(world18: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = world18.folder
    aws = folder / "aws"
    aws.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(AWS))} exec {shlex.quote(sys.executable)} -m awscli "$@"\n')
    aws.chmod(0o755)
    (folder / "node_modules").symlink_to(NODE)
    environment = {
        **clean_environment(),
        "DATABASE_URL": world18.dsn,
        "BILLING_TOKEN": "a-consumers-token",
        "SQS_SECRET": "a secret of the guide",
        "CDCBRIDGE_API__LISTEN": address,
        "AWS_PAGER": "",
        "HOME": str(folder),
        "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    log, server, exports, written = folder / "serve.log", None, "", []

    def run(command: str) -> None:
        done = subprocess.run(
            ["sh", "-c", exports + command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        written.append(done.stdout)

    try:
        for _, kind, block in BLOCK.findall((ROOT / "docs" / "SQS.md").read_text()):
            text = block.replace(DEFAULT, address)
            if kind == "yaml":
                (folder / "cdcbridge.yaml").write_text(text)
            elif kind == "python":
                (folder / "guide.py").write_text(text)
                run(f"{shlex.quote(sys.executable)} guide.py")
            elif kind == "js":
                (folder / "guide.mjs").write_text(text)
                run("node guide.mjs")
            elif text.startswith("export AWS_ACCESS_KEY_ID"):
                exports = text
            elif text.startswith("sqs()"):
                run(text)
            else:
                for line in text.splitlines():
                    if line != "cdcbridge serve":
                        run(line)
                        continue
                    with log.open("w") as err:
                        server = subprocess.Popen(line.split(), cwd=folder, env=environment, stderr=err)
                    eventually(lambda: address in log.read_text(), "the API listens")
        found = "".join(written)
        assert '{"total": 12.50}' in found and "hello\n" in found and "hello from Node" in found
    finally:
        if server is not None:
            server.terminate()
            assert server.wait(30) == 0
