"""The documents are true: the blocks of GETTING_STARTED.md and README are run, the references are the program's own."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cdcbridge
from scripts import config_reference, error_reference, python_reference, sql_reference
from scripts.cli_reference import reference
from tests.harness.log_events import events
from tests.harness.world import World, clean_environment, eventually

ROOT = Path(__file__).parents[2]
MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"<!-- tested: (.+?) -->\n```(\w+)\n(.*?)```", re.DOTALL)


STATEMENT_END = re.compile(r";[ ]*(?:--[^\n]*)?\n")
READER = """
dsn = {dsn!r}

def handle(record):
    print("handled:", record)
    queue.stop()

"""


class Reader:
    """Follows a page as its reader does: writes the file, starts the bridge, and runs the other blocks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.environment = {
            **clean_environment(),
            "DATABASE_URL": world.dsn,
            "CDCBRIDGE_SOURCE__SLOT": world.slot,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.bridges: list[subprocess.Popen[bytes]] = []

    def follow(self, kind: str, text: str) -> str:
        if kind == "yaml":
            (self.world.folder / "cdcbridge.yaml").write_text(text)
        elif kind == "sql":
            for statement in STATEMENT_END.split(text):
                self.world.execute(statement)
        elif kind == "python":
            return self._run([sys.executable, "-c", READER.format(dsn=self.world.dsn) + text])
        else:
            return "".join(self._line(line) for line in text.splitlines())
        return ""

    def _line(self, line: str) -> str:
        if line != "cdcbridge run":
            return self._run(["sh", "-c", line])
        self.bridges.append(
            subprocess.Popen(line.split(), cwd=self.world.folder, env=self.environment, stderr=subprocess.DEVNULL)
        )
        eventually(self.world.active, "the bridge streams")
        return ""

    def _run(self, command: list[str]) -> str:
        result = subprocess.run(
            command, cwd=self.world.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, (command, result.stderr)
        return result.stdout

    def close(self) -> None:
        for bridge in self.bridges:
            bridge.terminate()
            bridge.wait()


def test_the_blocks_of_the_first_pages_run_in_order(world18: World) -> None:
    world18.execute("create table orders (id int primary key, status text, amount numeric)")
    guide = BLOCK.findall((ROOT / "docs" / "GETTING_STARTED.md").read_text())
    kinds = ["yaml", "sh", "sql", "sh", "sql", "sql", "python", "sql", "sh"]
    assert [kind for _, kind, _ in guide] == kinds
    readme = BLOCK.findall((ROOT / "README.md").read_text())
    assert [kind for _, kind, _ in readme] == ["sql", "python"]
    reader = Reader(world18)
    try:
        output = "".join(reader.follow(kind, text) for _, kind, text in guide)
        published = "select count(*) from consumer_messages w join messages m using (seq) where m.topic = 'invoices'"
        assert world18.value(published) == 1, "audit takes the topic"
        world18.execute("insert into orders values (4, 'paid', 1)")
        of_readme = "".join(reader.follow(kind, text) for _, kind, text in readme)
    finally:
        reader.close()
    assert '"status":"paid","amount":12.50' in output and "RETAINED" in output
    assert "handled: {" in output and "healthy" in output.splitlines()
    assert "handled: {" in of_readme


def test_the_command_reference_is_the_programs_own_help() -> None:
    assert (ROOT / "docs" / "CLI.md").read_text() == reference(), "run `make docs`"


def test_the_configuration_reference_is_the_programs_own_model() -> None:
    assert (ROOT / "docs" / "CONFIGURATION.md").read_text() == config_reference.reference(), "run `make docs`"


def test_the_sql_reference_is_made_from_the_headers() -> None:
    assert (ROOT / "docs" / "SQL.md").read_text() == sql_reference.reference(), "run `make docs`"


def test_the_python_reference_is_made_from_the_docstrings() -> None:
    assert (ROOT / "docs" / "PYTHON.md").read_text() == python_reference.reference(), "run `make docs`"


def test_the_python_reference_shows_exactly_the_public_surface() -> None:
    twins = {name for name in cdcbridge.__all__ if name.startswith("Async")}
    exported = {getattr(cdcbridge, name) for name in cdcbridge.__all__ if not name.startswith("_")}
    assert exported - {getattr(cdcbridge, name) for name in twins} == set(python_reference.MEMBERS)
    for one, listed in python_reference.MEMBERS.items():
        ours = [base for base in one.__mro__ if base.__module__.startswith("cdcbridge.")]
        found = {
            name
            for base in ours
            for name, value in vars(base).items()
            if isinstance(value, (types.FunctionType, property, classmethod))
        }
        assert {name for name in found if not name.startswith("_")} == set(listed), one
        documented = {name for base in ours for name in re.findall(r"^ {4,8}(\w+): ", base.__doc__ or "", re.MULTILINE)}
        made = [inspect.getsource(vars(base)["__init__"]) for base in ours if "__init__" in vars(base)]
        attributes = set(re.findall(r"\bself\.([a-z]\w*)(?:: [^=]+)? = ", "".join(made)))
        assert attributes <= documented, one
    for name in twins:
        one, twin = getattr(cdcbridge, name), getattr(cdcbridge, name.removeprefix("Async"))
        assert {n for n in dir(one) if n[0] != "_"} == {n for n in dir(twin) if n[0] != "_"}


def test_the_error_reference_is_made_from_the_classes_and_the_headers() -> None:
    assert (ROOT / "docs" / "ERRORS.md").read_text() == error_reference.reference(), "run `make docs`"
    code = "".join(path.read_text() for path in (ROOT / "sql").rglob("*.sql"))
    raised = set(re.findall(r"errcode = '(CB\d+)'", code)) - {"CB000"}  # which seek_partitions() catches itself
    assert raised == set(error_reference.MEANINGS)
    assert set(re.findall(r"CB\d{3}", code)) - {"CB000"} == raised, "a header names one that nothing raises"


def test_the_page_of_log_events_has_those_of_the_program() -> None:
    page = (ROOT / "docs" / "LOG_EVENTS.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([a-z, ]+) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert len(rows) == len(dict(rows)) == page.count("\n| `")
    assert {name: set(levels.split(", ")) for name, levels in rows} == events(ROOT / "cdcbridge")


def test_every_page_is_in_the_sites_navigation_and_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r'"(\w+\.md)"', (ROOT / "zensical.toml").read_text())) == pages
    assert set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text())) == pages - {"index.md"}


def test_the_pages_of_the_site_contain_their_pictures(tmp_path: Path) -> None:
    """The build draws a picture, or fails with the arrow or the text that the drawing lacks."""
    makefile = (ROOT / "Makefile").read_text()
    for target in ("docs", "lint"):
        assert re.search(rf"^{target}: .*\$\(PICTURES\)", makefile, re.MULTILINE)
    for name in ("package.json", "package-lock.json", "draw.mjs"):
        shutil.copy(ROOT / "scripts" / "site" / name, tmp_path)
    subprocess.run(["npm", "ci", "--silent", "--ignore-scripts"], cwd=tmp_path, check=True)

    def drawn(picture: str) -> subprocess.CompletedProcess[str]:
        command = ["node", str(tmp_path / "draw.mjs")]
        return subprocess.run(command, input=picture, capture_output=True, text=True, check=False)

    pictures = [picture for page in (ROOT / "docs").rglob("*.md") for picture in MERMAID.findall(page.read_text())]
    assert len(pictures) > 5
    for picture in pictures:
        svg = drawn(picture)
        assert svg.returncode == 0, svg.stderr
        assert svg.stdout.startswith("<svg") and "http" not in svg.stdout.replace("http://www.w3.org/2000/svg", "")
    assert "has 1 of 2 arrows" in drawn("flowchart LR\n  a --> b\n  b -- long ---> c\n").stderr
    assert 'does not show "two"' in drawn('flowchart LR\n  a --> b\n  b["two"] --> c\n').stderr


def test_every_file_that_the_documents_name_is_there() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(
            r"(?<![\w/])((?:cdcbridge|docs|config|docker|benchmarks|sql|tests)/[\w./-]*\w)", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_guide_for_changing_consumers_with_two_bridges(world18: World, tmp_path: Path) -> None:
    """Two hosts are two folders, and scp copies from one to the other."""
    world = world18
    second = World(world.server, world.database, world.plugin, tmp_path / "bridge2")
    (second.folder / "bin").mkdir(parents=True)
    scp = second.folder / "bin" / "scp"
    scp.write_text(f'#!/bin/sh\ncase "$2" in bridge2:/etc/cdcbridge/cdcbridge.yaml) cp "$1" "{second.folder}";; esac\n')
    scp.chmod(0o755)
    world.execute("create table t (id int primary key)", "create table u (id int primary key)")
    world.consumer("billing")
    second.consumers = list(world.consumers)
    leader = world.start_process()
    eventually(world.active)
    stand_by = second.start_process()
    eventually(lambda: "bridge.standby" in second.log())

    world.consumer("audit", ("public.u",))
    world.write_config()
    path = [str(scp.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**clean_environment(), "PATH": os.pathsep.join(path)}
    blocks = BLOCK.findall((ROOT / "docs" / "OPERATIONS.md").read_text())
    (guide,) = [text for what, _, text in blocks if what == "changing consumers with two bridges"]
    output = ""
    for line in guide.splitlines():
        done = subprocess.run(
            line, shell=True, cwd=world.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), line
        output += done.stdout
    assert output.count("added: audit") == 2 and "unchanged: billing" in output and "gets nothing" not in output
    waiting = "select count(*) from consumer_messages w join consumers c on c.id = w.consumer_id where name = 'audit'"
    world.execute("insert into u values (1)")
    eventually(lambda: world.value(waiting) == 1, "the leader feeds it")
    leader.kill()
    leader.wait()
    eventually(lambda: "bridge.streaming" in second.log(), "the stand-by leads")
    world.execute("insert into u values (2)")
    eventually(lambda: world.value(waiting) == 2, "the stand-by feeds it, too")
    assert "not_fed" not in second.log()
    stand_by.terminate()
    assert stand_by.wait(30) == 0
    second.close()
