"""The Python client behind a real PgBouncer in transaction mode: no notifications, and another session for each transaction."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdcbridge import Message
from cdcbridge import Queue as Client
from cdcbridge.embedded import EmbeddedServer
from tests.sql.queue import Queue
from tests.world import eventually, fresh_database


@pytest.fixture
def pooled(pg15: EmbeddedServer, tmp_path: Path) -> Iterator[tuple[Queue, str]]:
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
    with fresh_database(pg15) as database:
        queue = Queue(pg15.dsn(database))
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


def test_a_client_polls_and_acks_through_it(pooled: tuple[Queue, str]) -> None:
    queue, dsn = pooled
    queue.declare()
    queue.append(30)
    with Client.connect(dsn, consumer="c") as client:
        got = 0
        threading.Timer(1.5, queue.append, (1,)).start()
        started = time.monotonic()
        for message in client.messages(wait=10):
            with message:
                got += 1
            if got == 31:
                break
        assert 1.4 < time.monotonic() - started < 6, "looked for, without a notification"
    assert queue.states() == {"pending": 0, "in_flight": 0, "dead": 0}


def test_a_worker_handles_all_through_it(pooled: tuple[Queue, str]) -> None:
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
