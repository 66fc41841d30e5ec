"""Run `cdcbridge demo`: the whole path of a change on a temporary PostgreSQL server, in a few seconds.

The demo shows real output only. It never shows a message that it has not received.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click

from cdcbridge.database import Connection, connect_source
from cdcbridge.demo.embedded import EmbeddedServer, wheel_binaries
from cdcbridge.errors import CdcbridgeError

_CONFIG = """\
source:
  dsn: {dsn}
api:
  listen: 127.0.0.1:{port}
consumers:
  - name: billing
    tables: [public.orders]
    filter: "op != 'insert' || record.status == 'paid'"
  - name: audit
    tables: ["public.*"]
"""
_CHANGES = (
    "insert into orders values (1, 'Ada', 'paid', 120.00), (2, 'Grace', 'open', 80.50)",
    "update orders set status = 'paid' where id = 2",
    "delete from orders where id = 1",
)
_PATIENCE = 30.0  # seconds
_WEB: Final = ("starlette", "uvicorn", "jinja2")  # the packages of the extra `web`


def demo() -> None:
    """Start a server and a bridge, write changes, receive and ack them, and show the lag.

    Raises:
        CdcbridgeError: A step fails, or takes too long.
    """
    started = time.monotonic()
    with EmbeddedServer(wheel_binaries()) as server, tempfile.TemporaryDirectory(prefix="cdcbridge-demo-") as folder:
        config = Path(folder) / "cdcbridge.yaml"
        port = _free_port()
        config.write_text(_CONFIG.format(dsn=server.dsn(), port=port))
        with connect_source(server.dsn(), "cdcbridge demo") as connection:
            version = connection.execute("show server_version").fetchone()
            _step(f"an embedded PostgreSQL {version[0] if version else '?'} is up ({time.monotonic() - started:.1f} s)")
            connection.execute(
                "create table orders (id int primary key, customer text, status text, amount numeric(10, 2))"
            )
            _step("the configuration")
            click.echo(_indent("consumers:" + _CONFIG.split("consumers:", 1)[1]))
            bridge = _program(config, "run", background=True)
            try:
                _wait_for_stream(connection, bridge, config)
                _step("the bridge runs, and the application writes")
                for statement in _CHANGES:
                    connection.execute(statement.encode())
                    click.echo(_indent(statement))
                for name, count in (("billing", 3), ("audit", 4)):
                    _receive(config, name, count)
                _step("cdcbridge lag")
                click.echo(_indent(_program(config, "lag").stdout))
                _show_dashboard(config, port)
            finally:
                bridge.terminate()
                bridge.wait(timeout=20)
    click.echo(f"done in {time.monotonic() - started:.1f} s. Everything was removed")


def _show_dashboard(config: Path, port: int) -> None:
    """Print the address of the dashboard. In a terminal, open it in the browser, and wait for a key."""
    if not all(find_spec(package) for package in _WEB):
        _step("the dashboard is in the extra `web`: pip install 'cdcbridge[web]'")
        return
    url = f"http://127.0.0.1:{port}/"
    with _serving(config, port):
        _step(f"the dashboard: {url}")
        if sys.stdin.isatty() and sys.stdout.isatty():
            click.launch(url)
            click.pause("Press a key to end the demo, and everything is removed")


@contextmanager
def _serving(config: Path, port: int) -> Iterator[None]:
    """Run `cdcbridge serve` for the duration of a `with` block."""
    serve = _program(config, "serve", background=True)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _answers(port):
            if serve.poll() is not None or time.monotonic() > deadline:
                raise CdcbridgeError(f"the dashboard did not start: {_log(config, 'serve')}")
            time.sleep(0.05)
        yield
    finally:
        serve.terminate()
        serve.wait(timeout=20)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        number: int = found.getsockname()[1]
        return number


def _receive(config: Path, name: str, expected: int) -> None:
    """Receive the expected number of messages, ack them, and show them."""
    _step(f"cdcbridge receive {name}, then ack")
    lines: list[str] = []
    deadline = time.monotonic() + _PATIENCE
    while len(lines) < expected and time.monotonic() < deadline:
        output = _program(config, "receive", name, "-n", "100", "--wait", "5").stdout
        lines += output.splitlines()
    if len(lines) != expected:
        raise CdcbridgeError(f"{name} received {len(lines)} messages, but expected {expected}")
    for line in lines:
        message = json.loads(line)
        record = line.partition('"record":')[2].partition(',"old":')[0]  # unparsed, so that no digit is lost
        click.echo(_indent(f"{message['seq']}  {message['data']['op']:<7} {record}"))
    acked = _program(config, "ack", name, "-", stdin="\n".join(lines)).stdout
    click.echo(_indent(f"ack → {acked.strip()}"))


def _wait_for_stream(connection: Connection, bridge: subprocess.Popen[str], config: Path) -> None:
    """Wait until the bridge streams.

    The existence of the slot is not enough. The slot is listed, and active, while the server still creates it. A change
    that commits before the first position of the slot is never decoded.
    """
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and bridge.poll() is None:
        streams = "select from pg_stat_replication where state in ('catchup', 'streaming')"
        if connection.execute(streams).fetchone() is not None:
            return
        time.sleep(0.05)
    raise CdcbridgeError(f"the bridge did not start: {_log(config, 'run')}")


def _program(config: Path, *arguments: str, background: bool = False, stdin: str | None = None) -> Any:
    """Run cdcbridge as a process of its own, with the demo's configuration."""
    command = [sys.executable, "-m", "cdcbridge", "-c", str(config), *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CDCBRIDGE_")}
    if background:
        with _log_file(config, arguments[0]).open("w") as log:  # a pipe that nobody reads would fill, and stop it
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, text=True
            )
    result = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CdcbridgeError(f"cdcbridge {' '.join(arguments)} failed: {result.stderr.strip()}")
    return result


def _log_file(config: Path, command: str) -> Path:
    return config.with_name(f"{command}.log")


def _log(config: Path, command: str) -> str:
    return _log_file(config, command).read_text()


def _step(text: str) -> None:
    click.secho(f"→ {text}", bold=True)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
