"""The Python client and the command line behind a real PgBouncer in transaction mode: no notifications, and another session for each transaction."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from cdcbridge import Message
from cdcbridge import Queue as Client
from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.forked import Result, command
from tests.harness.world import eventually, store_database
from tests.sql.queue import StoreQueue


@pytest.fixture
def pooled(pg15: EmbeddedServer, tmp_path: Path) -> Iterator[tuple[StoreQueue, str]]:
    """A queue, and the DSN of its database through PgBouncer."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.fail("PgBouncer is not installed: run `make servers`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tmp_path.chmod(0o755)
    file = tmp_path / "pgbouncer.ini"
    file.write_text(
        f"[databases]\n* = host=127.0.0.1 port={pg15.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 3\n"
    )
    command = [program, str(file)]
    if os.geteuid() == 0:
        command = [program, "-u", "nobody", str(file)]
        for folder in (tmp_path, *tmp_path.parents):
            if folder.owner() == "root" and folder != folder.parent and not folder.stat().st_mode & 1:
                folder.chmod(0o711)
    with store_database(pg15) as database:
        queue = StoreQueue(pg15.dsn(database))
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            dsn = f"host=127.0.0.1 port={port} user=postgres dbname={database}"

            def answers() -> bool:
                try:
                    psycopg.connect(dsn, connect_timeout=1).close()
                except psycopg.OperationalError:
                    return False
                return True

            eventually(answers, "PgBouncer answers")
            yield queue, dsn
            process.kill()
        queue.close()


def test_a_client_polls_and_acks_through_it(pooled: tuple[StoreQueue, str]) -> None:
    queue, dsn = pooled
    queue.declare()
    queue.append(30)
    with Client.connect(dsn, consumer="c") as client:
        got = 0
        timer = threading.Timer(1.5, queue.append, (1,))
        timer.start()
        started = time.monotonic()
        for message in client.messages(wait=10):
            with message:
                got += 1
            if got == 31:
                break
        assert 1.4 < time.monotonic() - started < 6, "looked for, without a notification"
        timer.join()
    assert queue.states() == {"pending": 0, "in_flight": 0, "dead": 0}


def test_a_worker_handles_all_through_it(pooled: tuple[StoreQueue, str]) -> None:
    queue, dsn = pooled
    queue.declare(mode="fifo")
    queue.append_keys(*(f"k{n % 5}" for n in range(200)))
    handled: list[int] = []
    with Client.connect(dsn, consumer="c") as client:

        @client.worker(concurrency=4)
        def handle(message: Message) -> None:
            handled.append(message.seq)

        thread = threading.Thread(target=handle.run)
        thread.start()
        eventually(lambda: not queue.all("select from cdcbridge.consumer_messages"), "all are acked")
        client.stop()
        thread.join()
    assert sorted(handled) == list(range(1, 201))


@pytest.fixture
def shop(pooled: tuple[StoreQueue, str], tmp_path: Path) -> Callable[..., Result]:
    """The command line with the store behind PgBouncer; the source is reached directly, or not."""
    queue, dsn = pooled
    queue.declare()
    queue.declare("s", mode="stream", topics=("news",))

    def run(line: str, *, source: str = queue.dsn, stdin: bytes = b"") -> Result:
        config: dict[str, Any] = {"source": {"dsn": source}, "store": {"dsn": dsn}, "http": None}
        config["consumers"] = [{"name": "c", "topics": ["news"]}]
        file = tmp_path / "cdcbridge.yaml"
        file.write_text(yaml.safe_dump(config))
        return command(["-c", str(file), *line.split()], stdin=stdin)

    return run


def test_commands_that_call_functions_work_through_it(
    pooled: tuple[StoreQueue, str], shop: Callable[..., Result]
) -> None:
    queue, dsn = pooled
    queue.append(6)

    def good(line: str, stdin: bytes = b"") -> list[Any]:
        result = shop(line, stdin=stdin)
        assert (result.code, result.err) == (0, b""), (line, result)
        return [json.loads(one) for one in result.out.splitlines()]

    database = queue.value("select current_database() as name")
    settings = ("search_path = pg_temp", "client_encoding = LATIN1", "default_transaction_isolation = serializable",
                "default_transaction_read_only = on", "datestyle = German")  # fmt: skip
    for setting in settings:
        queue.session.execute(f"alter database {database} set {setting}".encode())
    with psycopg.connect(queue.dsn, autocommit=True) as direct:  # PgBouncer makes new sessions
        direct.execute("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
                       " and datname = current_database() and client_port > 0")  # fmt: skip
    rows = good("receive c -n 5 --wait 1s")
    receipts = [row["receipt"] for row in rows]
    assert len(good("peek c")) == 1 and len(receipts) == 5
    assert good(f"extend c {receipts[0]} --by 1m") == [{"extended": 1}]
    assert good(f"nack c {receipts[0]} --dead --reason poison") == [{"nacked": 1}]
    assert good("ack c -", stdin=b"\n".join(json.dumps(row).encode() for row in rows[1:])) == [{"acked": 4}]
    (dead,) = good("dead list c --json")[0]
    assert good(f"dead show c {dead['id']}")[0]["history"]
    assert good(f"dead redrive c {dead['id']}") == [{"redriven": 1}]
    assert [row["data"]["record"] for row in good("receive c --ack") if row["topic"] == "news"] == []
    assert good("publish news", stdin='"🦀"\n2\n'.encode()) == [{"seq": 7}, {"seq": 8}]
    assert good("offsets show s --json")[0][0]["partition"] == 0
    assert json.loads(shop("offsets seek s latest").out)["partitions"] == 16
    assert good("dead purge c --yes") == [{"purged": 0}]
    assert shop("consumers pause c").out == b"paused: c\n" and shop("consumers resume c").out == b"resumed: c\n"
    assert {row["name"] for row in good("consumers list --json")[0]} == {"c", "s"}
    assert good("consumers show c --json")[0]["name"] == "c"
    assert {row["name"] for row in good("lag --json")[0]["consumers"]} == {"c", "s"}
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as session:
        for _ in range(3):
            found = session.execute("select current_setting('search_path'), array(select pg_listening_channels())")
            assert found.fetchone() == ("pg_temp", []), "nothing is left in the server's session"


def test_a_waiting_command_looks_now_and_then(pooled: tuple[StoreQueue, str], shop: Callable[..., Result]) -> None:
    queue, _ = pooled
    timer = threading.Timer(1.0, queue.append, (1,))
    timer.start()
    started = time.monotonic()
    result = shop("receive c --wait 20s")
    assert len(result.out.splitlines()) == 1 and 0.9 < time.monotonic() - started < 10
    timer.join()


@pytest.mark.usefixtures("impatient")
def test_a_command_names_the_session_that_it_waits_for(
    pooled: tuple[StoreQueue, str], shop: Callable[..., Result]
) -> None:
    """PgBouncer tells a process of its own, and the server's session is another one for each attempt."""
    queue, _ = pooled
    idle = queue.open(autocommit=False)
    idle.execute("select cdcbridge.publish('news', null, '1', dedup_id => 'once')")
    result = shop("publish news 1 --dedup-id once")
    assert result.code == 1 and f"nothing was changed: pid {idle.info.backend_pid} (".encode() in result.err, result
    idle.rollback()
    assert shop("publish news 1 --dedup-id once").code == 0


def test_other_commands_name_the_setting_that_has_to_change(
    pooled: tuple[StoreQueue, str], shop: Callable[..., Result]
) -> None:
    _, dsn = pooled
    for line in ("migrate", "consumers apply", "consumers remove c --yes", "consumers replay c --from earliest",
                 "backfill list", "backfill pause c", "run --no-wait"):  # fmt: skip
        result = shop(line)
        assert result.code == 2 and b"host and port into store.dsn" in result.err, (line, result)
    for line in ("lag", "slot list", "slot create", "verify public.t"):
        result = shop(line, source=dsn)
        assert result.code == 2 and b"host and port into source.dsn" in result.err, (line, result)
