"""What stands in examples/ runs."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdcbridge.store.gap import leave_gap
from cdcbridge.store.log import BridgeStore
from tests.harness.hostile import own_environment
from tests.harness.world import PATIENCE, World, clean_environment, eventually
from tests.sql.queue import StoreQueue

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
def queue(world18: World, request: pytest.FixtureRequest) -> Iterator[StoreQueue]:
    """Ten published orders of two customers, and their consumer; also in a database with unusual defaults."""
    made = StoreQueue(world18.dsn)
    made.declare("orders", tables=(), topics=("orders",), mode="fifo", key=("customer",))
    for n in range(10):
        data = f'{{"customer": "{CUSTOMERS[n % 2]}", "amount": {n}.5}}'
        made.session.execute("select cdcbridge.publish('orders', null, %s)", (data,))
    for name, value in DEFAULTS.items() if request.param == "unusual" else ():
        world18.execute(f"alter database {world18.database} set {name} = {value}")
    yield made
    made.close()


def run(world: World, name: str, consumer: str = "orders", *, stderr: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLES / name), world.dsn, consumer]
    environment = {**clean_environment(), "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


def test_a_worker(world18: World, queue: StoreQueue) -> None:
    with run(world18, "worker.py") as process:
        assert process.stdout is not None
        eventually(lambda: not queue.all("select from cdcbridge.consumer_messages"), "all are handled")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(PATIENCE) == 0
    assert [output.count(f"orders {customer} message") for customer in CUSTOMERS] == [5, 5]


def test_exactly_once(world18: World, queue: StoreQueue) -> None:
    with run(world18, "exactly_once.py") as process:
        assert process.wait(PATIENCE) == 0
    assert [
        tuple(row.values()) for row in queue.all("select customer, amount::text from shop_effects.totals order by 1")
    ] == [
        ("c0", "22.5"),
        (CUSTOMERS[1], "27.5"),
    ]


def test_asynchronous(world18: World, queue: StoreQueue) -> None:
    with run(world18, "async_consumer.py") as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert [line.split()[0] for line in output.splitlines()] == [str(n) for n in range(1, 11)]


def node(world: World, tmp_path: Path) -> tuple[Path, str]:
    """The example with its packages, and the database's address."""
    if shutil.which("npm") is None:
        pytest.fail("Node and npm are not installed: run `make servers`")
    folder = shutil.copytree(EXAMPLES / "node", tmp_path / "node", ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(["npm", "ci", "--silent"], cwd=folder, check=True)
    host = world.dsn.split()[0][5:]
    return folder, f"postgresql://postgres@/{world.database}?host={host}&port={world.server.port}"


def test_node(world18: World, queue: StoreQueue, tmp_path: Path) -> None:
    folder, address = node(world18, tmp_path)
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
    assert lines[-1] == 'orders late message {"customer":"late"}'
    assert len(lines) == 11


# every kind of message

BIG = "9007199254740993.000000001"
NESTED = "[" * 6000 + "]" * 6000


@pytest.fixture(params=["world15", "world18"])
def shop(request: pytest.FixtureRequest) -> World:
    """The shop on either server."""
    return shop_of(request.getfixturevalue(request.param))


def shop_of(world: World) -> World:
    """Orders with a consumer of theirs that gets each kind of message: see change() and empty()."""
    world.execute(
        "create table orders (id int primary key, customer text, amount numeric, note json)",
        "insert into orders values (1, 'ann', 10.10)",
    )
    world.consumer(
        "shop", ("public.*",), topics=["invoices"], mode="fifo", start="snapshot", retry_delay={"initial": "0s"}
    )
    return world


def change(shop: World) -> None:
    """The messages read, insert, update, an update of the key, and delete."""
    with shop.bridge():
        shop.messages(1)
        shop.execute(
            f"insert into orders values (2, 'bob', 0.1), (3, 'bob', 0.2), (4, 'ann', {BIG})",
            "update orders set amount = 11 where id = 1",
            "update orders set id = 5 where id = 3",
            "delete from orders where id = 2",
        )
        shop.messages(7)


def empty(shop: World) -> None:
    """The messages truncate, message and gap, and rows that nobody can handle."""
    with shop.bridge():
        before = shop.value("select max(seq) from messages")
        shop.execute("truncate orders", "insert into orders values (6, 'cid', 1), (7, 'cid', null)")
        shop.execute(f"insert into orders values (8, 'cid', 2, '{NESTED}'), (9, 'cid', 'NaN', '\"\\u0000\"')")
        shop.execute("update orders set amount = 1.5 where id = 6")
        shop.rows('select publish(\'invoices\', \'i\', \'{"id": "i", "customer": "cid", "amount": 9007199254740993}\')')
        eventually(lambda: shop.value("select max(seq) from messages") == before + 7)
    store = BridgeStore(shop.dsn, "cdcbridge")
    store.begin_epoch()
    leave_gap(store, 1, 2, go_on=store.facts().tail.end_lsn)
    store.close()


def handled(shop: World) -> bool:
    return bool(shop.value("select count(*) = 0 from consumer_messages"))


def finish(shop: World, name: str) -> str:
    with run(shop, name, "shop") as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert handled(shop), shop.rows("select * from consumer_messages")
    return output


def dead(shop: World) -> list[tuple[str, str]]:
    return shop.rows("select key, reason from dead_messages order by seq")


def test_exactly_once_with_every_kind_of_message(shop: World) -> None:
    change(shop)
    finish(shop, "exactly_once.py")
    totals = "select customer, amount::text from shop_effects.totals order by 1"
    assert shop.rows(totals) == [("ann", "9007199254741004.000000001"), ("bob", "0.2")]
    empty(shop)
    finish(shop, "exactly_once.py")
    assert shop.rows(totals) == [("cid", "9007199254740994.5")]
    assert [key for key, _ in dead(shop)] == ["7", "8", "9"]
    assert shop.value("select count(*) from messages where topic like 'shop%%'") == 0, "its effects are no changes"


def psql_once(shop: World) -> subprocess.CompletedProcess[str]:
    command = [str(shop.server.binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", "consumer=shop"]
    command += ["-d", shop.dsn, "-f", str(EXAMPLES / "consumer.sql")]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=own_environment())


@pytest.mark.parametrize("columns", ["id int primary key, customer_id int, amount numeric", "id int primary key, customer text",
                                     "order_id int primary key, customer text, amount numeric"])  # fmt: skip
def test_exactly_once_stops_at_a_table_of_another_shape(world18: World, columns: str) -> None:
    """Nothing is buried: the first message is given back, and the others wait."""
    lacks = next(name for name in ("id", "customer", "amount") if f" {name} " not in f" {columns}".replace(",", " "))
    world18.execute(f"create table orders ({columns})", "insert into orders select n from generate_series(1, 73) n")
    world18.consumer("shop", ("public.*",), mode="fifo", start="snapshot")
    with world18.bridge():
        world18.messages(73)
    with run(world18, "exactly_once.py", "shop", stderr=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and output == ""
    assert f"public.orders has no {lacks}" in errors and "Traceback" not in errors, errors
    assert dead(world18) == []
    assert world18.value("select count(*) from consumer_messages") == 73


def test_plain_sql_stops_at_a_table_without_its_column(world18: World) -> None:
    world18.execute("create table orders (order_id int primary key)", "insert into orders values (1), (2)")
    world18.consumer("shop", ("public.*",), mode="fifo", start="snapshot")
    with world18.bridge():
        world18.messages(2)
        world18.execute("delete from orders where order_id = 1")
        world18.messages(3)
    ended = psql_once(world18)
    assert ended.returncode == 3 and "public.orders has no column id" in ended.stderr, ended.stderr
    assert world18.value("select count(*) from consumer_messages where deliver_count = 0") == 3


def test_plain_sql_with_every_kind_of_message(shop: World) -> None:
    def psql() -> None:
        for _ in range(3):  # a truncate comes alone
            ended = psql_once(shop)
            assert ended.returncode == 0, ended.stderr
        assert handled(shop)

    copies = "select id, record ->> 'amount' from shop_effects.copies order by 1"
    change(shop)
    psql()
    assert shop.rows(copies) == [("1", "11"), ("4", BIG), ("5", "0.2")]
    empty(shop)
    psql()
    assert shop.rows(copies) == [("6", "1.5"), ("7", None), ("8", "2"), ("i", "9007199254740993")]
    assert [key for key, _ in dead(shop)] == ["9"]


def test_asynchronous_with_every_kind_of_message(shop: World) -> None:
    change(shop)
    empty(shop)
    output = finish(shop, "async_consumer.py")
    assert all(kind in output for kind in ("read", "insert", "update", "delete", "message", "is empty", "are missing"))
    assert [key for key, _ in dead(shop)] == ["8"]
    assert f"Decimal('{BIG}')" in output


def test_a_worker_with_every_kind_of_message(shop: World) -> None:
    change(shop)
    empty(shop)
    with run(shop, "worker.py", "shop") as process:
        assert process.stdout is not None
        eventually(lambda: handled(shop), "all are handled")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(PATIENCE) == 0
    kinds = (" read ", " insert ", " update ", " delete ", " message ", "is empty", "are missing")
    assert all(kind in output for kind in kinds)
    assert [key for key, _ in dead(shop)] == ["8"]


def test_node_with_every_kind_of_message(world18: World, tmp_path: Path) -> None:
    folder, address = node(world18, tmp_path)
    shop = shop_of(world18)
    change(shop)
    empty(shop)
    with subprocess.Popen(
        ["node", "consumer.mjs", address, "shop"], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        eventually(lambda: handled(shop), "all are handled")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(PATIENCE) == 0
    kinds = (" read ", " insert ", " update ", " delete ", " message ", "is empty", "are missing")
    assert all(kind in output for kind in kinds)
    assert f'"amount":{BIG}' in output
    assert '"amount":9007199254740993}' in output
