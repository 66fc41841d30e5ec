"""What stands in examples/ runs."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sql.queue import Queue
from tests.world import PATIENCE, World, clean_environment, eventually

EXAMPLES = Path(__file__).parents[2] / "examples"
CUSTOMERS = ("c0", "c1🛒")
DEFAULTS = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "client_encoding": "latin1",
    "bytea_output": "escape",
    "datestyle": "german",
}


@pytest.fixture(params=["ordinary", "unusual"])
def queue(world18: World, request: pytest.FixtureRequest) -> Iterator[Queue]:
    """Ten published orders of two customers, and their consumer; also in a database with unusual defaults."""
    made = Queue(world18.dsn)
    made.declare("orders", tables=(), topics=("orders",), mode="fifo", key=("customer",))
    for n in range(10):
        data = f'{{"customer": "{CUSTOMERS[n % 2]}", "amount": {n}.5}}'
        made.session.execute("select cdcbridge.publish('orders', null, %s)", (data,))
    for name, value in DEFAULTS.items() if request.param == "unusual" else ():
        world18.execute(f"alter database {world18.database} set {name} = {value}")
    yield made
    made.close()


def run(world: World, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLES / name), world.dsn, "orders"]
    environment = {**clean_environment(), "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_worker(world18: World, queue: Queue) -> None:
    with run(world18, "worker.py") as process:
        assert process.stdout is not None
        eventually(lambda: not queue.all("select from cdcbridge.consumer_messages"), "all are handled")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(PATIENCE) == 0
    assert [output.count(f"orders {customer} message") for customer in CUSTOMERS] == [5, 5]


def test_exactly_once(world18: World, queue: Queue) -> None:
    with run(world18, "exactly_once.py") as process:
        assert process.wait(PATIENCE) == 0
    assert [tuple(row.values()) for row in queue.all("select customer, amount::text from totals order by 1")] == [
        ("c0", "22.5"),
        (CUSTOMERS[1], "27.5"),
    ]


def test_asynchronous(world18: World, queue: Queue) -> None:
    with run(world18, "async_consumer.py") as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert [line.split()[0] for line in output.splitlines()] == [str(n) for n in range(1, 11)]


def test_plain_sql(world18: World, queue: Queue) -> None:
    text = (EXAMPLES / "consumer.sql").read_text().replace(":'consumer'", "'orders'")
    session = queue.open()
    for statement in text.split(";\n"):
        session.execute(statement.encode())
    assert queue.value("select count(*) from seen") == 10
    assert queue.all("select * from cdcbridge.consumer_messages") == []


def test_node(world18: World, queue: Queue, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.fail("Node and npm are not installed: run `make servers`")
    folder = shutil.copytree(EXAMPLES / "node", tmp_path / "node", ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(["npm", "ci", "--silent"], cwd=folder, check=True)
    address = f"postgresql://postgres@/{world18.database}?host={world18.dsn.split()[0][5:]}&port={world18.server.port}"
    with subprocess.Popen(
        ["node", "consumer.mjs", address, "orders"], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        eventually(lambda: not queue.all("select from cdcbridge.consumer_messages"), "all are handled")
        queue.session.execute("select cdcbridge.publish('orders', null, '{\"customer\": \"late\"}')")
        eventually(lambda: not queue.all("select from cdcbridge.consumer_messages"), "it is woken", 5)
        process.send_signal(signal.SIGTERM)
        lines = process.stdout.read().splitlines()
        assert process.wait(PATIENCE) == 0
    assert [line.split()[1] for line in lines if line.split()[1] == "c0"] == ["c0"] * 5
    assert lines[-1] == 'orders late {"customer":"late"}'
    assert len(lines) == 11
