"""Capture tests/golden/scenario.sql as both plugins send it: python -m tests.golden.capture.

Writes one message per line, pgoutput's in base64. What the messages must mean stands in expected.txt, which is
written by hand and never by this program.
"""

from __future__ import annotations

import base64
from pathlib import Path

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.source.plugins import plugin_options
from cdcbridge.source.replication import ReplicationStream, UnknownOption
from tests.conftest import DEBIAN_15

FOLDER = Path(__file__).parent


def main() -> None:
    """Both captures, of the same WAL."""
    before, _, after = (FOLDER / "scenario.sql").read_text().partition("-- slots\n")
    with EmbeddedServer(DEBIAN_15) as server, psycopg.connect(server.dsn(), autocommit=True) as session:
        _run(session, before)
        for plugin in ("wal2json", "pgoutput"):
            session.execute("select pg_create_logical_replication_slot(%s, %s)", (plugin, plugin))
        _run(session, after)
        row = session.execute("select pg_current_wal_lsn() - '0/0'").fetchone()
        for plugin in ("wal2json", "pgoutput"):
            messages = _capture(server.dsn(), plugin, int(row[0]) if row else 0)
            encode = base64.b64encode if plugin == "pgoutput" else bytes
            (FOLDER / f"{plugin}.txt").write_bytes(b"".join(encode(message) + b"\n" for message in messages))


def _run(session: psycopg.Connection[tuple[object, ...]], script: str) -> None:
    for line in script.splitlines():
        if line and not line.startswith("--"):
            session.execute(line.encode())


def _capture(dsn: str, plugin: str, end: int) -> list[bytes]:
    options = plugin_options(plugin, ["golden"], "cdcbridge")
    stream = ReplicationStream(dsn)
    try:
        stream.start(plugin, 0, options)
    except UnknownOption:
        del options["numeric-data-types-as-string"]
        stream.start(plugin, 0, options)
    messages: list[bytes] = []
    while stream.wal_end < end:
        stream.confirm(0, 0)  # asks for a keepalive, which tells how far the server is
        messages += stream.messages(1 << 20)
    stream.close()
    return messages


if __name__ == "__main__":
    main()
