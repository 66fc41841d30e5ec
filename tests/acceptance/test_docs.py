"""The documents are true: README's blocks are run, the command reference is the program's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cli_reference import reference
from tests.world import World, clean_environment, eventually

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- tested: (.+?) -->\n```(\w+)\n(.*?)```", re.DOTALL)


def test_the_blocks_of_the_readme_run_in_order(world18: World) -> None:
    world18.execute("create table orders (id int primary key, status text, amount numeric)")
    config = world18.folder / "cdcbridge.yaml"
    environment = {
        **clean_environment(),
        "DATABASE_URL": world18.dsn,
        "CDCBRIDGE_SOURCE__SLOT": world18.slot,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert [kind for _, kind, _ in blocks] == ["yaml", "sh", "sql", "sh", "sql"]
    bridges: list[subprocess.Popen[bytes]] = []
    output = ""
    try:
        for _, kind, text in blocks:
            if kind == "yaml":
                config.write_text(text)
            elif kind == "sql":
                for statement in text.split(";\n"):
                    world18.execute(statement)
            else:
                for line in text.splitlines():
                    if line == "cdcbridge run":
                        bridges.append(
                            subprocess.Popen(
                                line.split(), cwd=world18.folder, env=environment, stderr=subprocess.DEVNULL
                            )
                        )
                        eventually(world18.active, "the bridge streams")
                        continue
                    result = subprocess.run(
                        line,
                        shell=True,
                        cwd=world18.folder,
                        env=environment,
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    assert result.returncode == 0, (line, result.stderr)
                    output += result.stdout
    finally:
        for bridge in bridges:
            bridge.terminate()
            bridge.wait()
    assert '"status":"paid","amount":12.50' in output and "RETAINED" in output


def test_the_command_reference_is_the_programs_own_help() -> None:
    assert (ROOT / "docs" / "CLI.md").read_text() == reference(), "run `make docs`"


def test_every_file_that_the_documents_name_is_there() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"\b((?:docs|config|docker|benchmarks|sql|tests)/[\w./-]*\w)", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
