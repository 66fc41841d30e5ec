"""The guides of mirrors are followed literally, on two databases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import psycopg.conninfo
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.acceptance.test_docs import BLOCK, ROOT
from tests.harness.world import clean_environment, eventually, fresh_database


class Reader:
    """A person who follows a page in a folder, with a shell whose variables name two databases."""

    def __init__(self, page: str, folder: Path, dsns: dict[str, str]) -> None:
        text = (ROOT / "docs" / page).read_text()
        self.blocks = BLOCK.findall(text)
        self.outputs = [one.partition("```")[0] for one in text.split("```text\n")[1:]]
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **clean_environment(),
            **dsns,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def write(self, mark: str, name: str) -> None:
        """Save the block with this mark as a file. The slots of a server have one name space, so each has its own."""
        (text,) = (text for found, _, text in self.blocks if found == mark)
        (self.folder / name).write_text(text)

    def type(self, mark: str) -> str:
        """Run the commands of the blocks with this mark, and return the output."""
        lines = [line for found, _, text in self.blocks if found == mark for line in text.splitlines()]
        return "".join(self._shell(line) for line in lines)

    def _shell(self, line: str) -> str:
        done = subprocess.run(
            ["sh", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout

    def leave_running(self, mark: str) -> None:
        """Start each command of the block in a terminal of its own."""
        (text,) = (text for found, _, text in self.blocks if found == mark)
        for number, line in enumerate(text.splitlines()):
            with (self.folder / f"terminal{number}.log").open("wb") as log:
                self.running.append(
                    subprocess.Popen(["sh", "-c", f"exec {line}"], cwd=self.folder, env=self.environment, stderr=log)
                )

    def leave(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(timeout=60)


def uri(server: EmbeddedServer, database: str) -> str:
    """The DSN in a form that psql takes as an argument."""
    return server.dsn(database)


def test_the_guide_mirrors_a_database(pg18: EmbeddedServer, tmp_path: Path) -> None:
    with fresh_database(pg18) as shop, fresh_database(pg18) as warehouse:
        reader = Reader(
            "MIRRORS.md", tmp_path, {"DATABASE_URL": uri(pg18, shop), "WAREHOUSE_URL": uri(pg18, warehouse)}
        )
        reader.type("commands")
        reader.write("the configuration", "cdcbridge.yaml")
        reader.leave_running("a bridge")
        try:
            eventually(lambda: count(pg18, warehouse) == 1000, "the copy")
            wanted = reader.outputs[1].strip()
            mark = "commands, until the target has them"
            eventually(lambda: wanted in without_spaces(reader.type(mark)), "the update")
        finally:
            reader.leave()
            forget_origins(pg18)


def count(server: EmbeddedServer, database: str) -> int:
    with psycopg.connect(server.dsn(database)) as session:
        if session.execute("select to_regclass('public.orders')").fetchone() == (None,):
            return 0
        row = session.execute("select count(*) from orders").fetchone()
        return row[0] if row else 0


def without_spaces(output: str) -> str:
    """The output of psql, without the spaces at the ends of lines."""
    return "\n".join(line.rstrip() for line in output.splitlines())


def test_the_guide_joins_two_databases(pg18: EmbeddedServer, tmp_path: Path) -> None:
    with fresh_database(pg18) as a, fresh_database(pg18) as b:
        reader = Reader("TWO_WAY.md", tmp_path, {"A_DSN": uri(pg18, a), "B_DSN": uri(pg18, b)})
        reader.write("a.yaml", "a.yaml")
        reader.write("b.yaml", "b.yaml")
        for side in ("a", "b"):  # the endpoint of /metrics has one address on this machine
            with (tmp_path / f"{side}.yaml").open("a") as file:
                file.write("http: null\n")
        reader.type("commands")
        reader.leave_running("two bridges")
        try:
            wanted = reader.outputs[1] * 2
            eventually(lambda: reader.type("commands, until both sides are equal") == wanted, "both sides", 60.0)
        finally:
            reader.leave()
            forget_origins(pg18)


def forget_origins(server: EmbeddedServer) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as session:
        for (name,) in session.execute("select roname from pg_replication_origin").fetchall():
            session.execute("select pg_replication_origin_drop(%s)", (name,))


@pytest.mark.parametrize("page", ["MIRRORS.md", "TWO_WAY.md"])
def test_no_block_is_forgotten(page: str) -> None:
    marks = {mark for mark, _, _ in BLOCK.findall((ROOT / "docs" / page).read_text())}
    known = {"commands", "the configuration", "a bridge", "commands, until the target has them", "a.yaml", "b.yaml",
             "two bridges", "commands, until both sides are equal"}  # fmt: skip
    assert marks <= known
